"""Backbones by name, and a head for every task of a data set."""

from inspect import signature
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

import dtme

from ..clients import import_torchvision
from .data import Data
from .decoders import DECODERS, TokenHead

SMALL_IMAGE = {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 384}
NARROW_IMAGE = SMALL_IMAGE | {"hidden_size": 64, "intermediate_size": 128}
SMALL_TEXT = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256}
"""What ``--backbone small`` is: a transformer that two cores train in minutes, not pretrained. ``narrow`` is as
deep and takes a third of the time, for experiments of hundreds of runs."""
SMALL_PATCH = 8
VIT = {
    "vit-tiny": (192, 12, 3),
    "vit-small": (384, 12, 6),
    "vit-base": (768, 12, 12),
    "vit-large": (1024, 24, 16),
}
"""Width, blocks and heads of the paper's backbones, patches of 16 pixels; untrained: ``--backbone`` with a folder or a
name of a hub brings weights."""


PRETRAINED_LR, UNTRAINED_LR = 5e-5, 1e-3


OWN_IMAGE = {"small": SMALL_IMAGE, "narrow": NARROW_IMAGE}
"""Backbones of images with patches of ``SMALL_PATCH`` pixels."""
UNTRAINED = "untrained:"
"""Before the name of a pretrained backbone: its architecture, with weights that are drawn."""


def is_pretrained(backbone: str) -> bool:
    return backbone not in OWN_IMAGE and backbone not in VIT and not backbone.startswith(UNTRAINED)


def default_lr(backbone: str) -> float:
    """The learning rate where none is named."""
    return PRETRAINED_LR if is_pretrained(backbone) else UNTRAINED_LR


def build(data: Data, backbone: str, seed: int, decoder: str = "pixels") -> dtme.MultiTaskModel:
    """A backbone, untrained heads for all tasks of ``data``; ``seed`` draws what is not pretrained.

    Args:
        backbone: ``"small"``, for images ``"narrow"`` or a key of ``VIT``, or any name or folder that transformers
            loads; ``"untrained:"`` before it draws the weights.
        decoder: a key of ``decoders.DECODERS``: the heads of dense tasks.

    Raises:
        ValueError: the backbone does not fit the data's inputs.
    """
    torch.manual_seed(seed)
    network = load_backbone(backbone, data.size, data.vocabulary)
    return with_heads(network, data, decoder)


def with_heads(network: nn.Module, data: Data, decoder: str = "pixels") -> dtme.MultiTaskModel:
    """A transformers model and a head for every task."""
    width = network.config.hidden_size
    heads: dict[str, nn.Module] = {}
    for name, task in data.tasks.items():
        if task.is_dense:
            patch = network.config.patch_size
            grid = data.size[0] // patch, data.size[1] // patch
            heads[name] = DECODERS[decoder](width, task.channels, grid, patch)
        else:
            heads[name] = TokenHead(width, task.channels)
    return dtme.MultiTaskModel(network, heads, features=taps_of if decoder == "taps" and data.size else tokens_of)


def load_backbone(name: str, size: tuple[int, int] | None, vocabulary: int | None) -> nn.Module:
    """A transformers model for images of ``size`` (height, width), or for texts of so many different tokens.

    Raises:
        ValueError: no such model, or it does not fit the images or the texts; the message names the option.
    """
    network = _for_texts(name, vocabulary) if size is None else _for_images(name, size)
    if size is None:
        return network
    patch = getattr(network.config, "patch_size", None)
    if not isinstance(patch, int):
        raise ValueError(f"--backbone {name}: {type(network).__name__} has no square patch_size in its config")
    if any(side % patch for side in size):
        fits = " ".join(str(ceil(side / patch) * patch) for side in size)
        raise ValueError(f"--backbone {name}: patches of {patch} pixels do not tile {size[0]} × {size[1]}, try {fits}")
    return network


def _for_texts(name: str, vocabulary: int | None) -> nn.Module:
    import_torchvision()
    from transformers import BertConfig, BertModel

    if name == "small":
        return BertModel(BertConfig(vocab_size=vocabulary, **SMALL_TEXT), add_pooling_layer=False)
    if name in VIT or name in OWN_IMAGE:
        raise ValueError(f"--backbone {name} looks at images, and the data set holds texts: name a text transformer")
    network = _loaded(name)
    known = getattr(network.config, "vocab_size", None)
    if known is None:
        raise ValueError(
            f"--backbone {name}: {type(network).__name__} has no vocab_size in its config: it reads no texts"
        )
    if vocabulary is not None and vocabulary > known:
        raise ValueError(f"--backbone {name} knows {known} tokens, the texts hold {vocabulary}: see --tokenizer")
    return network


def _for_images(name: str, size: tuple[int, int]) -> nn.Module:
    import_torchvision()
    from transformers import ViTModel

    if name not in OWN_IMAGE and name not in VIT:
        return _loaded(name)
    return ViTModel(image_config(name, size), add_pooling_layer=False)


def image_config(name: str, size: tuple[int, int]) -> Any:
    """The ``transformers.ViTConfig`` of ``small``, ``narrow`` or a key of ``VIT`` for images of ``size``."""
    import_torchvision()
    from transformers import ViTConfig

    if name in OWN_IMAGE:
        return ViTConfig(image_size=size, patch_size=SMALL_PATCH, **OWN_IMAGE[name])
    width, depth, heads = VIT[name]
    return ViTConfig(
        image_size=size,
        patch_size=16,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
    )


def _loaded(name: str) -> nn.Module:
    from transformers import AutoConfig, AutoModel

    try:
        if name.startswith(UNTRAINED):
            return AutoModel.from_config(AutoConfig.from_pretrained(name.removeprefix(UNTRAINED)))
        return AutoModel.from_pretrained(name)
    except OSError as error:
        raise ValueError(f"--backbone {name} cannot be loaded: {error}") from error


def tokens_of(backbone: nn.Module, x: Any) -> Tensor:
    """(B, N, p), positions interpolated where the backbone was trained at another size."""
    return _run(backbone, x).last_hidden_state


def taps_of(backbone: nn.Module, x: Any) -> tuple[Tensor, ...]:
    """The tokens behind a quarter, a half, three quarters and all of the blocks, (B, N, p) each."""
    output = _run(backbone, x, output_hidden_states=True)
    depth = len(output.hidden_states) - 1  # the first are what goes into the first block
    return (*(output.hidden_states[depth * quarter // 4] for quarter in (1, 2, 3)), output.last_hidden_state)


def _run(backbone: nn.Module, x: Any, **options: Any) -> Any:
    if not isinstance(x, Tensor):
        return backbone(**x, **options)
    if _is_of_another_size(backbone, x):
        options["interpolate_pos_encoding"] = True
    return backbone(x, **options)


def _is_of_another_size(backbone: nn.Module, x: Tensor) -> bool:
    if "interpolate_pos_encoding" not in signature(backbone.forward).parameters:
        return False  # it interpolates by itself, or raises
    size = backbone.config.image_size
    return tuple(x.shape[-2:]) != (tuple(size) if isinstance(size, (tuple, list)) else (size, size))
