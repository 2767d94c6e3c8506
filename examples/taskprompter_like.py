"""Prompts and score maps in the manner of TaskPrompter: ``python examples/taskprompter_like.py``.

A learned prompt for every task lies in front of the patch tokens, and the attention returns its raw scores beside its
output: how much each prompt looks at each patch, which the decoder reads. Such an attention calls ``dtme.attention``.
That is plain attention until its block is expanded, and then joins the task tokens of each stream to the keys; the
scores stay those of the model's own tokens. This decoder reads only a task's own features, so a task can be exported.
"""

from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dtme

WIDTH, NUM_HEADS, GRID, DEPTH = 32, 4, 4, 4
CHANNELS = {"semseg": 5, "depth": 1, "normals": 3}
TASKS = tuple(CHANNELS)


class Attention(nn.Module):
    """(B, N, p) to (B, N, p) and the raw scores (B, H, N, N)."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = (WIDTH // NUM_HEADS) ** -0.5
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, NUM_HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        # instead of: scores = q @ k.transpose(-2, -1) * self.scale; attended = scores.softmax(-1) @ v
        attended, scores = dtme.attention(q, k, v, scale=self.scale, return_scores=True)
        return self.proj(attended.transpose(1, 2).flatten(2)), scores


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(WIDTH), Attention()
        self.norm2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        attended, scores = self.attn(self.norm1(x))
        x = x + attended
        return x + self.mlp(self.norm2(x)), scores


class PromptedViT(nn.Module):
    """Images (B, 3, 32, 32) to tokens (B, K + 16, p), the K prompts first, and every layer's scores."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 8, 8)
        self.position = nn.Parameter(0.02 * torch.randn(GRID * GRID, WIDTH))
        self.prompts = nn.Parameter(torch.randn(len(TASKS), WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.position
        x, found = torch.cat([self.prompts.expand(len(x), -1, -1), x], 1), []
        for block in self.blocks:
            x, scores = block(x)
            found.append(scores)
        return x, found


class PromptDecoder(nn.Module):
    """A task's patches, weighed by its prompt, beside the maps of how much that prompt looked at each patch."""

    def __init__(self) -> None:
        super().__init__()
        self.tasks = TASKS
        maps = DEPTH * NUM_HEADS
        self.mix = nn.ModuleDict({task: nn.Conv2d(WIDTH + maps, WIDTH, 3, padding=1) for task in TASKS})
        self.out = nn.ModuleDict({task: nn.Conv2d(WIDTH, channels, 1) for task, channels in CHANNELS.items()})

    def forward(self, features: dict[str, tuple[Tensor, list[Tensor]]]) -> dict[str, Tensor]:
        predictions = {}
        for task, (tokens, scores) in features.items():
            prompt, patches = tokens[:, TASKS.index(task)], tokens[:, len(TASKS) :]
            looks = torch.cat([s[:, :, TASKS.index(task), len(TASKS) :] for s in scores], 1)  # (B, layers * heads, 16)
            patches = patches * prompt.sigmoid()[:, None]
            x = torch.cat([patches.transpose(1, 2), looks], 1).unflatten(2, (GRID, GRID))
            x = F.interpolate(self.mix[task](x).relu(), scale_factor=2.0, mode="bilinear")
            predictions[task] = self.out[task](x)
        return predictions


def prompted(backbone: nn.Module, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    return backbone(images)


LOSSES = {"semseg": F.cross_entropy, "depth": F.l1_loss, "normals": F.l1_loss}


def parts() -> dict:
    """What a model is built, and later rebuilt, from."""
    return {"backbone": PromptedViT(), "features": prompted, "decoder": PromptDecoder()}


def batches() -> list:
    def targets() -> dict[str, Tensor]:
        shapes = {task: (3, channels, 8, 8) for task, channels in CHANNELS.items()}
        return {task: torch.randn(shape) for task, shape in shapes.items()} | {"semseg": torch.randint(5, (3, 8, 8))}

    return [(torch.randn(3, 3, 32, 32), targets()) for _ in range(2)]


def main() -> None:
    torch.manual_seed(0)
    model, loader = dtme.MultiTaskModel(**parts()), batches()
    report = dtme.analyze(model, loader, LOSSES, progress=False)
    print(report)
    dtme.expand(model, report.plan(modulation=0.5, expansion=0.5, num_tokens=2))
    optimizer = torch.optim.Adam(model.parameter_groups(lr=3e-3))
    for epoch in range(4):
        for images, targets in loader:
            predictions = model(images)
            loss = sum(LOSSES[task](predictions[task], targets[task]) for task in predictions)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch}: loss {loss.item():.3f}")
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = dtme.MultiTaskModel.from_pretrained(folder, **parts())
    images, _ = loader[0]
    want = model.eval()(images)
    assert all(torch.equal(again.eval()(images)[task], want[task]) for task in TASKS)
    print("reloaded: the same predictions")
    torch.testing.assert_close(model.export_task("depth")(images), want["depth"])
    print("exported: depth alone predicts the same")


if __name__ == "__main__":
    main()
