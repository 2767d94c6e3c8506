"""Small models in float64 whose every weight tells, and what an expanded one predicts by plain hooks."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import dtme
from benchmarks.models.oracle import concatenated, modulated
from benchmarks.models.subject import randomise
from dtme.blocks import block_widths, find_blocks

TASKS, WIDTH = ("semseg", "depth"), 24
Added = dict[str, Tensor]


def vit(seed: int = 0, dtype: torch.dtype = torch.float64, width: int = WIDTH) -> nn.Module:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(seed)
    heads = 3 if width == WIDTH else 4
    size = {"hidden_size": width, "num_hidden_layers": 3, "num_attention_heads": heads, "intermediate_size": 2 * width}
    model = ViTModel(ViTConfig(**size, image_size=16, patch_size=8), add_pooling_layer=False)
    randomise(model, seed)
    return model.to(dtype).eval()


def images(rows: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, 3, 16, 16, generator=torch.Generator().manual_seed(rows), dtype=torch.float64).to(dtype)


def heads(dtype: torch.dtype = torch.float64, width: int = WIDTH) -> dict[str, nn.Module]:
    torch.manual_seed(1)
    return {task: nn.Linear(width, 2 + i).to(dtype) for i, task in enumerate(TASKS)}


def plan_of(backbone: nn.Module) -> dtme.ExpansionPlan:
    """Streams part behind the first block, and not every task has every module."""
    first, second, third = blocks = find_blocks(backbone)
    modulation, expansion = {first: TASKS[:1], second: TASKS}, {second: TASKS, third: TASKS[1:]}
    width = block_widths(blocks[first])[0]
    return dtme.ExpansionPlan(TASKS, 2, modulation, expansion, dict.fromkeys(blocks, width))


def move(module: nn.Module, part: str, seed: int = 7, scale: float = 0.3) -> None:
    """Random numbers for the parameters whose names hold ``part``."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if part in name:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter))


def added_of(backbone: nn.Module) -> Added:
    """What was added, by the names that it would have in a backbone that nothing is around."""
    inner = getattr(backbone, "get_base_model", lambda: backbone)()
    return {name: parameter for name, parameter in inner.named_parameters() if ".dtme." in name}


@contextmanager
def plainly(backbone: nn.Module, added: Mapping[str, Tensor], task: str) -> Iterator[None]:
    """A backbone that was never expanded, or what PEFT has put around one, runs as one task would."""
    inner = getattr(backbone, "get_base_model", lambda: backbone)()
    with modulated(inner, dict(added), task), concatenated(inner, dict(added), task):
        yield


def features_of(backbone: nn.Module, x: Any) -> Tensor:
    return backbone(x).last_hidden_state


def predict(
    backbone: nn.Module, heads: Mapping[str, nn.Module], added: Mapping[str, Tensor], x: Any
) -> dict[str, Tensor]:
    """Of every task, one after the other."""
    found: dict[str, Tensor] = {}
    for task in TASKS:
        with plainly(backbone, added, task):
            found[task] = heads[task](features_of(backbone, x))
    return found
