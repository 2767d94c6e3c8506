"""Toy tasks for ``dtme.compare``: what a user brings, small enough for seconds."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import dtme

WIDTH, TOKENS = 16, 4


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width=WIDTH, dropout=0.1):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * width, width)
        )

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Backbone(nn.Module):
    def __init__(self, depth=4, dropout=0.1):
        super().__init__()
        self.layers = nn.Sequential(*(Block(dropout=dropout) for _ in range(depth)))

    def forward(self, x):
        return self.layers(x)


def make_model(seed):
    return dtme.MultiTaskModel(Backbone(), {"sum": nn.Linear(WIDTH, 1), "sign": nn.Linear(WIDTH, 1)})


def items(count=32, seed=0):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(count, TOKENS, WIDTH, generator=random)
    total = x.mean(-1, keepdim=True)
    return [(x[i], {"sum": total[i], "sign": (x[i, :, :1] * x[i, :, 1:2])}) for i in range(count)]


TRAIN, VAL, TUNE = items(), items(16, 1), items(16, 2)
LOSSES = {"sum": F.mse_loss, "sign": F.l1_loss}
METRICS = {"sum": (F.mse_loss, "lower"), "sign": (F.l1_loss, "lower")}


def loaders(**more):
    return {"train": DataLoader(TRAIN, batch_size=8, shuffle=True), "val": DataLoader(VAL, batch_size=8), **more}


def compared(**options):
    options = {"seeds": 2, "budget": 8, "num_tokens": 2, "progress": False, "read": 2, **options}
    given = {"make_model": make_model, "loaders": loaders(), "losses": LOSSES, "metrics": METRICS}
    given |= {name: options.pop(name) for name in list(options) if name in given}
    return dtme.compare(**given, **options)
