"""Does expanding by conflict pay, or do longer training or LoRA as well: ``python examples/compare.py``.

Two tasks read the same tokens, and for each of them what the other one wants of a token is of no use. Every arm trains
for the same number of steps, from the same start and on the same batches; ``longer`` for as much compute.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import dtme

WIDTH = 16
TASKS = ("even", "odd")


def make_model(seed: int) -> dtme.MultiTaskModel:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
    backbone = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return dtme.MultiTaskModel(backbone, {task: nn.Linear(WIDTH, 1) for task in TASKS})


def items(count: int, seed: int) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Rows of tokens; for every token, the product of two channels, which are other ones for each task."""
    x = torch.randn(count, 6, WIDTH, generator=torch.Generator().manual_seed(seed))
    products = {task: x[..., i : i + 1] * x[..., i + 2 : i + 3] for i, task in enumerate(TASKS)}
    return [(x[i], {task: product[i] for task, product in products.items()}) for i in range(count)]


def main() -> None:
    comparison = dtme.compare(
        make_model,
        {
            "train": DataLoader(items(256, 0), batch_size=32, shuffle=True),
            "val": DataLoader(items(128, 1), batch_size=64),
        },
        losses=dict.fromkeys(TASKS, F.mse_loss),
        metrics={task: (F.mse_loss, "lower") for task in TASKS},
        arms=("joint", "longer", "conflict", "random", "lora"),
        seeds=3,
        budget=60,
        lr=1e-2,
        num_tokens=2,
        progress=False,
    )
    print(comparison)


if __name__ == "__main__":
    main()
