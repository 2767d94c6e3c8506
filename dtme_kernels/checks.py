"""What every public function asks of its tensors. No device is touched: shapes, dtypes and devices only."""

from numbers import Real

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensors(**tensors: Tensor) -> None:
    """Floating-point tensors, all on the first one's device."""
    first = ""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in FLOATING:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
        first = first or name
        if tensor.device != tensors[first].device:
            raise ValueError(f"{name} must be on {tensors[first].device} like {first}, got {tensor.device}")


def check_shape(name: str, tensor: Tensor, symbols: str, expected: tuple[int, ...]) -> None:
    """``weight must be (T, p) = (4, 192), got (4, 191)``."""
    if tensor.shape != expected:
        raise ValueError(f"{name} must be {symbols} = {tuple(expected)}, got {tuple(tensor.shape)}")


def check_number(name: str, value: float, low: float, high: float = float("inf")) -> None:
    """A finite real number in [low, high)."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not low <= value < high or value == float("-inf"):
        raise ValueError(f"{name} must be in [{low:g}, {high:g}), got {value}")


def check_dtypes(**tensors: Tensor) -> None:
    """All of the first one's dtype."""
    (first, like), *others = tensors.items()
    for name, tensor in others:
        if tensor.dtype != like.dtype:
            raise TypeError(f"{name} must be {like.dtype} like {first}, got {tensor.dtype}")
