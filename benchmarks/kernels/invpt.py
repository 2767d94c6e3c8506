"""A model in the manner of InvPT: attention written out, features of four layers, a decoder across all tasks."""

import torch
from torch import Tensor, nn

import dtme

from .conftest import Shape

NUM_TAPS, POOLED = 4, 7


class Attention(nn.Module):
    """As in the releases of timm that such models are built on."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.num_heads, self.scale = shape.heads, (shape.channels // shape.heads) ** -0.5
        self.qkv, self.proj = nn.Linear(shape.channels, 3 * shape.channels), nn.Linear(shape.channels, shape.channels)
        self.attn_drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        rows, n, p = x.shape
        qkv = self.qkv(x).reshape(rows, n, 3, self.num_heads, p // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        weights = self.attn_drop((q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1))
        return self.proj((weights @ v).transpose(1, 2).reshape(rows, n, p))


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        p = shape.channels
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(p), Attention(shape), nn.LayerNorm(p)
        self.mlp = nn.Sequential(nn.Linear(p, 4 * p), nn.GELU(), nn.Linear(4 * p, p))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Backbone(nn.Module):
    """Tokens (B, N, p) → four of them, from as many depths."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.blocks))
        self.taps = [shape.blocks * (i + 1) // NUM_TAPS - 1 for i in range(NUM_TAPS)]

    def forward(self, x: Tensor) -> list[Tensor]:
        taps = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            taps += [x] if i in self.taps else []
        return taps


class Decoder(nn.Module):
    """Every task's tokens attend to the pooled tokens of all tasks."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tasks = [f"task{i}" for i in range(shape.tasks)]
        p = shape.channels
        self.fuse = nn.ModuleDict({task: nn.Linear(NUM_TAPS * p, p) for task in self.tasks})
        self.attention = nn.MultiheadAttention(p, shape.heads, batch_first=True)

    def forward(self, features: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        fused = {task: self.fuse[task](torch.cat(taps, -1)) for task, taps in features.items()}
        pooled = [nn.functional.adaptive_avg_pool1d(x.mT, POOLED**2).mT for x in fused.values()]
        keys = torch.cat(pooled, 1)
        return {task: x + self.attention(x, keys, keys, need_weights=False)[0] for task, x in fused.items()}


def plain_model(shape: Shape) -> dtme.MultiTaskModel:
    heads = {f"task{i}": nn.Linear(shape.channels, 4) for i in range(shape.tasks)}
    return dtme.MultiTaskModel(Backbone(shape), heads, features=taps_of, decoder=Decoder(shape))


def taps_of(backbone: nn.Module, x: Tensor) -> list[Tensor]:
    return backbone(x)


def concatenated(plain: dtme.MultiTaskModel, expanded: dtme.MultiTaskModel, x: Tensor) -> dict[str, Tensor]:
    """All predictions as one would write them: every task's own forward, its tokens appended and dropped again."""
    return plain.predict({task: _taps(plain, expanded, task, x) for task in plain.tasks}, plain.tasks)


def _taps(plain: dtme.MultiTaskModel, expanded: dtme.MultiTaskModel, task: str, x: Tensor) -> list[Tensor]:
    taps = []
    for i, (block, other) in enumerate(zip(plain.backbone.blocks, expanded.backbone.blocks, strict=True)):
        num_tokens = x.shape[1]
        if hasattr(other, "dtme") and task in other.dtme.tokens:
            x = x * other.dtme.weight[task] + other.dtme.bias[task]
            x = torch.cat([x, other.dtme.tokens[task].expand(len(x), -1, -1)], 1)
        x = block(x)[:, :num_tokens]
        taps += [x] if i in plain.backbone.taps else []
    return taps
