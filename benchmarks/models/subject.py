"""What the sweep needs to know about a model: how it is called and what it returns."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

TASKS = ("semseg", "depth", "normals")
MAIN = ("last_hidden_state", "encoder_last_hidden_state", "text_embeds", "image_embeds", "audio_embeds", "video_embeds")
MINOR = ("logits_per", "loss", "past_key_values", "hidden_states", "attentions", "position_ids", "cache", "router")


class NotBuilt(Exception):
    """A model of the list that cannot be built small, or that takes no input the sweep can make."""


@dataclass
class Subject:
    """One model under test.

    Args:
        name: library/model type.
        backbone: in evaluation mode, its weights drawn at random.
        inputs: what the backbone takes for so many rows: a mapping or a tensor.
        heads: the number of its attention heads, one of the batch sizes that are tried.
        dtype: float64 wherever the model runs in it.
    """

    name: str
    backbone: nn.Module
    inputs: Callable[[int], Any]
    heads: int = 4
    dtype: torch.dtype = torch.float64

    def call(self, backbone: nn.Module, x: Any) -> list[Tensor]:
        """The main outputs of ``backbone``; random numbers that it draws are the same every time."""
        torch.manual_seed(0)
        run = getattr(backbone, "forward_features", None) if self.name.startswith("timm/") else None
        run = run or backbone
        return features(run(**x) if isinstance(x, Mapping) else run(x))

    @property
    def sizes(self) -> list[int]:
        return sorted({1, 3, 6, self.heads})


def features(output: Any) -> list[Tensor]:
    """The floating tensors of an output that are worth comparing: its main fields, or else all of them."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        main = [output[name] for name in MAIN if isinstance(output.get(name), Tensor)]
        if main:
            return main
        output = [value for name, value in output.items() if not name.startswith(MINOR)]
    if isinstance(output, (list, tuple)):
        return [tensor for item in output for tensor in features(item)]
    return []


def randomise(backbone: nn.Module, seed: int = 0) -> None:
    """Weights large enough that every block tells in the output; layer scales that start at zero are moved, too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter.add_(noise * (0.1 if parameter.ndim < 2 else 0.5 / max(parameter.shape[-1], 4) ** 0.5))
