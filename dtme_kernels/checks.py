"""What every public function asks of its arguments before an operator, whose table says the rest, takes them."""

from numbers import Real

from torch import Tensor


def check_tensors(**tensors: Tensor) -> None:
    """That they are tensors."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")


def check_number(name: str, value: float, low: float, high: float = float("inf")) -> None:
    """A finite real number in [low, high)."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not low <= value < high or value == float("-inf"):
        raise ValueError(f"{name} must be in [{low:g}, {high:g}), got {value}")
