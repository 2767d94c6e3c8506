"""A decoder in the manner of InvPT behind a ViT whose attention is written out: ``python examples/invpt_like.py``.

It shows a ``MultiTaskModel`` with a decoder and heads behind it. The ViT is tapped after each of its four layers. The
decoder predicts every task once from the deepest features, lets the tokens of all tasks attend to each other at two
scales, and the heads predict again; both predictions are supervised. Each task's features come from its own stream.
"""

from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dtme

WIDTH, NUM_HEADS, GRID = 32, 4, 4
CHANNELS = {"semseg": 5, "depth": 1, "normals": 3}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.scale = NUM_HEADS, (WIDTH // NUM_HEADS) ** -0.5
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        qkv = self.qkv(x).reshape(rows, length, 3, self.num_heads, width // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        attn = (q @ k.transpose(-2, -1)) * self.scale
        attn = self.attn_drop(attn.softmax(dim=-1))
        x = (attn @ v).transpose(1, 2).reshape(rows, length, width)
        return self.proj_drop(self.proj(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(WIDTH), Attention()
        self.norm2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Images (B, 3, 32, 32) to the tokens (B, 16, p) behind each of four layers."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 8, 8)
        self.position = nn.Parameter(0.02 * torch.randn(GRID * GRID, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, images: Tensor) -> list[Tensor]:
        x, taps = self.patches(images).flatten(2).transpose(1, 2) + self.position, []
        for block in self.blocks:
            x = block(x)
            taps.append(x)
        return taps


class CrossTaskAttention(nn.Module):
    """Every token of every task attends to the tokens of all tasks, which are pooled where the map is large."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, NUM_HEADS, batch_first=True)

    def forward(self, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        size = next(iter(maps.values())).shape[-2:]
        query = torch.cat([tokens_of(x) for x in maps.values()], 1)
        key = torch.cat([tokens_of(F.adaptive_avg_pool2d(x, GRID)) for x in maps.values()], 1)
        query, key = self.norm(query), self.norm(key)
        mixed = self.attention(query, key, key, need_weights=False)[0].chunk(len(maps), 1)
        return {task: x + map_of(part, *size) for (task, x), part in zip(maps.items(), mixed, strict=True)}


class InvertedPyramid(nn.Module):
    """``{task: four taps}`` to ``{task: (features (B, p, 8, 8), preliminary prediction (B, c, 4, 4))}``."""

    def __init__(self) -> None:
        super().__init__()
        self.preliminary = nn.ModuleDict({task: nn.Conv2d(WIDTH, c, 1) for task, c in CHANNELS.items()})
        self.enter = nn.ModuleDict({task: nn.Conv2d(WIDTH + c, WIDTH, 1) for task, c in CHANNELS.items()})
        self.skips = nn.ModuleList(nn.Conv2d(2 * WIDTH, WIDTH, 1) for _ in range(2))
        self.scales = nn.ModuleList(CrossTaskAttention() for _ in range(2))

    def forward(self, features: dict[str, list[Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
        taps = {task: [map_of(x, GRID, GRID) for x in found] for task, found in features.items()}
        first = {task: self.preliminary[task](found[-1]) for task, found in taps.items()}
        maps = {task: self.enter[task](torch.cat([taps[task][-1], first[task]], 1)) for task in taps}
        # from the deepest taps and coarse tokens to earlier taps and finer tokens
        for i, (skip, attend) in enumerate(zip(self.skips, self.scales, strict=True)):
            size = 2**i * GRID
            for task, found in taps.items():
                pair = skip(torch.cat(found[2:] if i == 0 else found[:2], 1))
                maps[task] = upsampled(maps[task], size) + upsampled(pair, size)
            maps = attend(maps)
        return {task: (maps[task], first[task]) for task in maps}


class Head(nn.Module):
    """The final prediction beside the preliminary one, which is supervised too."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.out = nn.Conv2d(WIDTH, channels, 1)

    def forward(self, found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self.out(found[0]), found[1]


def tokens_of(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def map_of(tokens: Tensor, height: int, width: int) -> Tensor:
    return tokens.transpose(1, 2).unflatten(2, (height, width))


def upsampled(x: Tensor, size: int) -> Tensor:
    return F.interpolate(x, (size, size), mode="bilinear")


def taps(backbone: nn.Module, images: Tensor) -> list[Tensor]:
    return backbone(images)


def supervised(predictions: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    final, preliminary = predictions
    loss = F.cross_entropy if target.ndim == 3 else F.l1_loss  # a map of classes, or of values
    return loss(final, target) + 0.5 * loss(upsampled(preliminary, target.shape[-1]), target)


def parts() -> dict:
    """What a model is built, and later rebuilt, from."""
    heads = {task: Head(channels) for task, channels in CHANNELS.items()}
    return {"backbone": ViT(), "heads": heads, "features": taps, "decoder": InvertedPyramid()}


def batches() -> list:
    def targets() -> dict[str, Tensor]:
        shapes = {task: (3, channels, 8, 8) for task, channels in CHANNELS.items()}
        return {task: torch.randn(shape) for task, shape in shapes.items()} | {"semseg": torch.randint(5, (3, 8, 8))}

    return [(torch.randn(3, 3, 32, 32), targets()) for _ in range(2)]


def main() -> None:
    torch.manual_seed(0)
    model, loader = dtme.MultiTaskModel(**parts()), batches()
    report = dtme.analyze(model, loader, dict.fromkeys(CHANNELS, supervised), progress=False)
    print(report)
    dtme.expand(model, report.plan(modulation=0.5, expansion=0.5, num_tokens=2))
    model.print_trainable_parameters()
    optimizer = torch.optim.Adam(model.parameter_groups(lr=3e-3))
    for epoch in range(4):
        for images, targets in loader:
            predictions = model(images)
            loss = sum(supervised(predictions[task], targets[task]) for task in predictions)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch}: loss {loss.item():.3f}")
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = dtme.MultiTaskModel.from_pretrained(folder, **parts())
    images, _ = loader[0]
    for task, predictions in model.eval()(images).items():
        assert all(map(torch.equal, predictions, again.eval()(images)[task])), task
    print("reloaded: the same predictions")


if __name__ == "__main__":
    main()
