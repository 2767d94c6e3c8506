"""Backbones by name, and a head for every task of a data set."""

from inspect import signature
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dtme

from ..clients import import_torchvision
from .data import Data

SMALL_IMAGE = {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 384}
SMALL_TEXT = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256}
"""What ``--backbone small`` is: a transformer that two cores train in minutes, not pretrained."""
SMALL_PATCH = 8
VIT = {
    "vit-tiny": (192, 12, 3),
    "vit-small": (384, 12, 6),
    "vit-base": (768, 12, 12),
    "vit-large": (1024, 24, 16),
}
"""Width, blocks and heads of the paper's backbones, patches of 16 pixels; untrained: ``--backbone`` with a folder or a
name of a hub brings weights."""


def build(data: Data, backbone: str, seed: int) -> dtme.MultiTaskModel:
    """A backbone, untrained heads for all tasks of ``data``; ``seed`` draws what is not pretrained.

    Args:
        backbone: ``"small"``, a key of ``VIT``, or any name or folder that transformers loads.

    Raises:
        ValueError: the backbone does not fit the data's inputs.
    """
    torch.manual_seed(seed)
    network = load_backbone(backbone, data.size, data.vocabulary)
    return with_heads(network, data)


def with_heads(network: nn.Module, data: Data) -> dtme.MultiTaskModel:
    """A transformers model and a head for every task."""
    width = network.config.hidden_size
    heads: dict[str, nn.Module] = {}
    for name, task in data.tasks.items():
        if task.is_dense:
            patch = network.config.patch_size
            grid = data.size[0] // patch, data.size[1] // patch
            heads[name] = PixelHead(width, task.channels, grid, patch)
        else:
            heads[name] = TokenHead(width, task.channels)
    return dtme.MultiTaskModel(network, heads, features=tokens_of)


def load_backbone(name: str, size: tuple[int, int] | None, vocabulary: int | None) -> nn.Module:
    """A transformers model for images of ``size`` (height, width), or for texts of so many different tokens."""
    import_torchvision()
    from transformers import BertConfig, BertModel, ViTConfig, ViTModel

    if size is None:
        if name == "small":
            return BertModel(BertConfig(vocab_size=vocabulary, **SMALL_TEXT), add_pooling_layer=False)
        network = _pretrained(name)
        known = getattr(network.config, "vocab_size", None)
        if known is None:
            raise ValueError(f"--backbone {name}: {type(network).__name__} takes no texts")
        if vocabulary is not None and vocabulary > known:
            raise ValueError(f"--backbone {name} knows {known} tokens, the texts hold {vocabulary}: see --tokenizer")
        return network
    if name == "small" or name in VIT:
        options: dict[str, Any] = dict(SMALL_IMAGE)
        if name in VIT:
            width, depth, heads = VIT[name]
            options = {
                "hidden_size": width,
                "num_hidden_layers": depth,
                "num_attention_heads": heads,
                "intermediate_size": 4 * width,
            }
        patch = 16 if name in VIT else SMALL_PATCH
        network = ViTModel(ViTConfig(image_size=size, patch_size=patch, **options), add_pooling_layer=False)
    else:
        network = _pretrained(name)
    patch = getattr(network.config, "patch_size", None)
    if not isinstance(patch, int):
        raise ValueError(f"--backbone {name}: {type(network).__name__} has no square patch_size in its config")
    if any(side % patch for side in size):
        fits = " ".join(str(ceil(side / patch) * patch) for side in size)
        raise ValueError(f"--backbone {name}: patches of {patch} pixels do not tile {size[0]} × {size[1]}, try {fits}")
    return network


def _pretrained(name: str) -> nn.Module:
    """Raises: ValueError: there is no such folder or name, or it holds no model; the message says what was wrong."""
    from transformers import AutoModel

    try:
        return AutoModel.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"--backbone {name} cannot be loaded: {reason}") from error


def tokens_of(backbone: nn.Module, x: Any) -> Tensor:
    """(B, N, p), positions interpolated where the backbone was trained at another size."""
    if not isinstance(x, Tensor):
        return backbone(**x).last_hidden_state
    options = {"interpolate_pos_encoding": True} if _is_of_another_size(backbone, x) else {}
    return backbone(x, **options).last_hidden_state


def _is_of_another_size(backbone: nn.Module, x: Tensor) -> bool:
    if "interpolate_pos_encoding" not in signature(backbone.forward).parameters:
        return False  # it interpolates by itself, or raises
    size = backbone.config.image_size
    return tuple(x.shape[-2:]) != (tuple(size) if isinstance(size, (tuple, list)) else (size, size))


class PixelHead(nn.Module):
    """The paper's decoder, one 3×3 Conv-BN-ReLU on the grid of patch tokens, then each becomes its patch of pixels.

    Args:
        num_features: p, width of the tokens.
        channels: C, outputs a pixel.
        grid: (h, w) patches; tokens before the last h * w (class, registers) are left out.
        patch: pixels along a patch's side.
    """

    def __init__(self, num_features: int, channels: int, grid: tuple[int, int], patch: int) -> None:
        super().__init__()
        self.grid, self.patch = grid, patch
        self.mix = nn.Sequential(
            nn.Conv2d(num_features, num_features, 3, padding=1, bias=False), nn.BatchNorm2d(num_features), nn.ReLU()
        )
        self.project = nn.Conv2d(num_features, channels * patch**2, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, p) → (B, C, h * patch, w * patch)."""
        height, width = self.grid
        patches = tokens[:, tokens.shape[1] - height * width :].mT.unflatten(2, self.grid)
        return F.pixel_shuffle(self.project(self.mix(patches)), self.patch)


class TokenHead(nn.Module):
    """From the first token, (B, N, p), to (B, channels)."""

    def __init__(self, num_features: int, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(num_features)
        self.project = nn.Linear(num_features, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.project(self.norm(tokens[:, 0]))
