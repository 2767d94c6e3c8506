"""Ways into a block's attention, so that task keys and values reach it without a token being concatenated.

One file per library. To add one, write a file that holds a ``Library`` (its seams, what its blocks' arguments mean, the
versions it was tried on) and name it in ``LIBRARIES``: the first that knows a module speaks for it. What no library
knows goes by what it does, which is seen when it runs (``generic``, ``deferred``).
"""

import inspect

from torch import Tensor, nn

from . import timm, torch, transformers
from .base import (
    UNKNOWN,
    KeysValues,
    Library,
    NotExpandable,
    Projection,
    Seam,
    Unknown,
    class_of,
    is_hooked,
    is_plain_linear,
    no_positions,
    required_parameters,
)
from .generic import GenericSeam, plain_attention

LIBRARIES: tuple[Library, ...] = (transformers.LIBRARY, timm.LIBRARY, torch.LIBRARY)

__all__ = [
    "LIBRARIES",
    "UNKNOWN",
    "GenericSeam",
    "KeysValues",
    "Library",
    "NotExpandable",
    "Projection",
    "Seam",
    "Unknown",
    "argument_axis",
    "class_of",
    "declared_norm",
    "is_hooked",
    "is_known",
    "is_plain_linear",
    "no_positions",
    "plain_attention",
    "required_parameters",
    "seam_of",
]


def seam_of(module: nn.Module) -> type[Seam] | str | None:
    """The seam of ``module`` itself, not of a child; or why this attention has none; or None: it is no attention."""
    if "forward" in vars(module):
        return None  # somebody else has replaced it: nothing is known about what runs
    for library in LIBRARIES:
        if kind := library.seam(module):
            return kind
    return None


def is_known(block: nn.Module) -> bool:
    """Whether a library's file speaks for the forward of this block."""
    return any(library.defines(block) for library in LIBRARIES)


def declared_norm(block: nn.Module) -> tuple[bool, nn.Module | None]:
    """Whether a library's file says which norm feeds the attention of ``block``, and that norm, if there is one."""
    for library in LIBRARIES:
        if class_of(block) in library.norms and library.defines(block):
            norm = library.norms[class_of(block)]
            return True, None if norm is None else getattr(block, norm)
    return False, None


def argument_axis(block: nn.Module, name: str | int, tensor: Tensor) -> int | Unknown | None:
    """The axis of ``tensor``, an argument of ``block`` or inside one, that images lie on.

    The size of that axis is the number of images, a multiple of it (the heads of torch's three-dimensional masks lie
    there too, each image's side by side), or 1, which stands for all images.

    Args:
        block: the block that is called.
        name: the keyword, or the position among the positional arguments, the tokens' being 0.
        tensor: what was given, or one of the tensors in it.

    Returns:
        None where all images share the tensor, and ``UNKNOWN`` where no library's file says what it means.
    """
    if isinstance(name, int):
        parameters = list(inspect.signature(block.forward).parameters.values())
        positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        if name >= len(positional):
            return UNKNOWN
        name = positional[name]
    for library in LIBRARIES:
        if library.defines(block):
            return library.arguments.get(name, {}).get(tensor.ndim, UNKNOWN)
    return UNKNOWN
