"""Products of an attention that are written as an Einstein sum."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .deferred import Maps


def _labels(equation: str, ranks: Sequence[int]) -> tuple[str, str, str] | None:
    """The axes of two operands and of their product, one letter each; None where one has an axis twice."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    names = inputs.split(",")
    if not arrow or len(names) != 2:
        return None
    counts = {rank - len(name) + 3 for name, rank in zip(names, ranks, strict=True) if "..." in name}
    if len(counts) > 1:
        return None
    filler = "".join(chr(0x3B1 + i) for i in range(next(iter(counts), 0)))
    first, second, output = (name.replace("...", filler) for name in (*names, output))
    twice = any(len(set(name)) != len(name) for name in (first, second, output))
    return None if twice else (first, second, output)


def queries_and_keys(equation: str, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor] | None:
    """(..., N, d) and (..., M, d) whose scores (..., N, M) the sum is; None if it is something else."""
    labels = _labels(equation, (first.ndim, second.ndim))
    if labels is None or len(labels[2]) < 3:
        return None
    a, b, out = labels
    lead, query, key = out[:-2], out[-2], out[-1]
    if query not in a:
        a, b, first, second = b, a, second, first
    summed = set(a) & set(b) - set(out)
    if len(summed) != 1 or sorted(a) != sorted(lead + query + "".join(summed)):
        return None
    if sorted(b) != sorted(lead + key + "".join(summed)):
        return None
    channel = summed.pop()
    order = [a.index(x) for x in lead + query + channel]
    return first.permute(order), second.permute([b.index(x) for x in lead + key + channel])


def maps_and_values(equation: Any, *operands: Any) -> Any:
    """The sum of maps (..., N, M) and values, if it is their product."""
    if len(operands) != 2:
        return NotImplemented
    first, second = operands
    maps, value = (first, second) if isinstance(first, Maps) else (second, first)
    if not isinstance(maps, Maps) or not isinstance(value, Tensor):
        return NotImplemented
    labels = _labels(equation, (len(first.shape), len(second.shape)))
    if labels is None:
        return NotImplemented
    a, b, out = labels if maps is first else (labels[1], labels[0], labels[2])
    lead, query, key = a[:-2], a[-2], a[-1]
    channels = set(out) - set(a)
    if len(channels) != 1 or sorted(b) != sorted(lead + key + "".join(channels)) or key in out:
        return NotImplemented
    channel = channels.pop()
    attended = maps.attended(value.permute([b.index(x) for x in lead + key + channel]))
    names = lead + query + channel
    return attended.permute([names.index(x) for x in out])
