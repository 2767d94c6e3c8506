"""A small expanded model, batches for it, and the plain loop that stacks which own the loop are compared with."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dtme
from benchmarks.models.subject import randomise

TASKS, WIDTH = ("edges", "depth", "normals"), 24
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {task: F.mse_loss for task in TASKS}
LEARNING_RATE, DECAY, EPS = 1e-2, 0.1, 1e-4  # gradients that are zero but for rounding must not move a weight
Batch = dict[str, Any]


def vit(dropout: float = 0.0) -> nn.Module:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    size = {"hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 48}
    config = ViTConfig(**size, image_size=16, patch_size=8, hidden_dropout_prob=dropout)
    return ViTModel(config, add_pooling_layer=False)


def timm_vit() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    return VisionTransformer(
        img_size=16, patch_size=8, embed_dim=WIDTH, depth=3, num_heads=3, mlp_ratio=2, num_classes=0
    )


def heads(seed: int = 0) -> dict[str, nn.Module]:
    torch.manual_seed(seed)
    return {task: nn.Linear(WIDTH, 2) for task in TASKS}


def plain_model(backbone: nn.Module | None = None, dtype: torch.dtype = torch.float64) -> dtme.MultiTaskModel:
    """Not expanded; of a transformers ViT unless another backbone is given."""
    return dtme.MultiTaskModel(vit() if backbone is None else backbone, heads(), "cls").to(dtype)


def plan(blocks: str = "layers", groups: Mapping[str, Any] | None = None) -> dtme.ExpansionPlan:
    """Streams part in the middle of the backbone, and not every task has every module."""
    some = TASKS[:2]
    modulation = {f"{blocks}.1": some, f"{blocks}.2": TASKS}
    return dtme.ExpansionPlan(TASKS, 2, modulation, {f"{blocks}.2": some}, groups=groups or {})


def expanded_model(
    backbone: nn.Module | None = None, dtype: torch.dtype = torch.float64, **options: Any
) -> dtme.MultiTaskModel:
    """Every weight is drawn large enough to tell."""
    model = plain_model(backbone, dtype)
    blocks = "blocks" if hasattr(model.backbone, "blocks") else "layers"
    dtme.expand(model, plan(blocks, **options))
    randomise(model)
    return model


def images(rows: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, 3, 16, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def samples(count: int, dtype: torch.dtype = torch.float64) -> list[Batch]:
    """What a data set holds: an image, and targets of all tasks."""
    targets = torch.Generator().manual_seed(1)
    return [
        {
            "pixel_values": image,
            "labels": {task: torch.randn(2, generator=targets, dtype=torch.float64).to(dtype) for task in TASKS},
        }
        for image in images(count, dtype=dtype)
    ]


def predictions(model: nn.Module, x: Tensor | None = None) -> dict[str, Tensor]:
    """Of all tasks, in evaluation mode."""
    model.eval()
    with torch.no_grad():
        found: dict[str, Tensor] = model(images(5) if x is None else x)
    return found


def task_loss(model: nn.Module, batch: Batch, task: str) -> Tensor:
    """Of one task, in a pass of its own."""
    return LOSSES[task](model(batch["pixel_values"], task)[task], batch["labels"][task])


def optimizer_of(model: dtme.MultiTaskModel) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameter_groups(lr=LEARNING_RATE, weight_decay=DECAY), eps=EPS)


def train(
    model: dtme.MultiTaskModel,
    steps: Iterable[list[Batch]],
    *,
    clip: float | None = None,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    optimizer: torch.optim.Optimizer | None = None,
) -> dtme.MultiTaskModel:
    """The plain loop: in every step each batch counts alike, and each of its tasks has a pass of its own."""
    optimizer = optimizer_of(model) if optimizer is None else optimizer
    model.train()
    for batches in steps:
        optimizer.zero_grad()
        for batch in batches:
            for task in batch["labels"]:
                with context():
                    loss = task_loss(model, batch, task)
                (loss / len(batches)).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return model


def weights(model: nn.Module) -> dict[str, Tensor]:
    """By name, detached and copied."""
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def in_steps(batches: list[Batch], size: int) -> Iterator[list[Batch]]:
    """So many batches for each step; the last one may have fewer."""
    for start in range(0, len(batches), size):
        yield batches[start : start + size]
