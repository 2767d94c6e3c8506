"""A loop of your own and a decoder in the manner of MTFormer: ``python examples/mtformer_like.py``.

The decoder lets every task's features attend to those of all tasks and returns a dict of predictions. The losses are
made by a ``step`` of your own, which the analysis calls as the training loop does; ``blocks=`` names the blocks of an
encoder in which they are not recognised. At the end the encoder is called by itself, as a model that is no
``MultiTaskModel`` would call it.
"""

from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dtme

WIDTH, NUM_HEADS, GRID = 32, 4, 4
CHANNELS = {"semseg": 5, "depth": 1, "saliency": 1}
TASKS = tuple(CHANNELS)


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_qkv, self.to_out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(x).unflatten(-1, (3, NUM_HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(WIDTH), SelfAttention()
        self.feed = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.norm(x))
        return x + self.feed(x)


class Encoder(nn.Module):
    """Images (B, 3, 32, 32) to tokens (B, 16, p); shared by all tasks."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 8, 8)
        self.position = nn.Parameter(0.02 * torch.randn(GRID * GRID, WIDTH))
        self.layers = nn.Sequential(*(Layer() for _ in range(4)))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(self.patches(images).flatten(2).transpose(1, 2) + self.position)


class CrossTaskDecoder(nn.Module):
    """Each task's tokens query those of every task; what they find is fused, and predicted from as a map."""

    def __init__(self) -> None:
        super().__init__()
        self.tasks = TASKS
        self.norms = nn.ModuleDict({task: nn.LayerNorm(WIDTH) for task in TASKS})
        self.attention = nn.MultiheadAttention(WIDTH, NUM_HEADS, batch_first=True)
        self.fuse = nn.ModuleDict({task: nn.Linear(len(TASKS) * WIDTH, WIDTH) for task in TASKS})
        self.out = nn.ModuleDict({task: nn.Linear(WIDTH, channels) for task, channels in CHANNELS.items()})

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        normed = {task: self.norms[task](x) for task, x in features.items()}
        predictions = {}
        for task, x in features.items():
            found = [self.attention(normed[task], y, y, need_weights=False)[0] for y in normed.values()]
            mixed = x + self.fuse[task](torch.cat(found, -1))
            predictions[task] = self.out[task](mixed).transpose(1, 2).unflatten(2, (GRID, GRID))
        return predictions


def step(model: nn.Module, batch: tuple[Tensor, dict[str, Tensor]]) -> dict[str, Tensor]:
    """One loss for every task: all that the analysis has to know of a loop."""
    images, targets = batch
    predictions = model(images)
    return {
        "semseg": F.cross_entropy(predictions["semseg"], targets["semseg"]),
        "depth": F.l1_loss(predictions["depth"], targets["depth"]),
        "saliency": F.binary_cross_entropy_with_logits(predictions["saliency"], targets["saliency"]),
    }


def parts() -> dict:
    """What a model is built, and later rebuilt, from."""
    return {"backbone": Encoder(), "decoder": CrossTaskDecoder()}


def batches() -> list:
    def targets() -> dict[str, Tensor]:
        size = (3, GRID, GRID)
        return {
            "semseg": torch.randint(5, size),
            "depth": torch.rand(size)[:, None],
            "saliency": torch.randint(2, size)[:, None].float(),
        }

    return [(torch.randn(3, 3, 32, 32), targets()) for _ in range(2)]


def main() -> None:
    torch.manual_seed(0)
    model, loader = dtme.MultiTaskModel(**parts()), batches()
    report = dtme.analyze(model, loader, step, blocks="layers", progress=False)
    print(report)
    dtme.expand(model, report.plan(modulation=0.5, expansion=0.5, num_tokens=2))
    optimizer = torch.optim.Adam(model.parameter_groups(lr=3e-3))
    for epoch in range(4):
        for batch in loader:
            losses = step(model, batch)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
        print(f"epoch {epoch}: " + ", ".join(f"{task} {loss.item():.3f}" for task, loss in losses.items()))
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = dtme.MultiTaskModel.from_pretrained(folder, **parts())
    images, _ = loader[0]
    want = model.eval()(images)
    assert all(torch.equal(again.eval()(images)[task], want[task]) for task in TASKS)
    print("reloaded: the same predictions")
    with dtme.tasks(model.backbone, TASKS):
        features = dtme.split(model.backbone(images), TASKS)
    by_hand = model.decoder(features)
    for task in TASKS:
        torch.testing.assert_close(by_hand[task], want[task])
    print("the encoder called by itself: the same predictions")


if __name__ == "__main__":
    main()
