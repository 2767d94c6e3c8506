"""What a value that was read from a file may be: small checks that are put together to whole files."""

import reprlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Check = Callable[[Any, str], Any]
"""``check(value, where)``: the value, made into what it stands for; ValueError names ``where`` it is."""


def refuse(where: str, wanted: str, value: Any) -> ValueError:
    return ValueError(f"{where} must be {wanted}, got {reprlib.repr(value)}")


def anything(value: Any, where: str) -> Any:
    """For what somebody else checks."""
    return value


def boolean(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise refuse(where, "true or false", value)
    return value


def text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise refuse(where, "a non-empty string", value)
    return value


def number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
        raise refuse(where, "a number", value)
    return value


def positive(value: Any, where: str) -> float:
    if number(value, where) <= 0:
        raise refuse(where, "a positive number", value)
    return value


def at_least(least: int) -> Check:
    """An integer that 64 bits hold."""

    def check(value: Any, where: str) -> int:
        if type(value) is not int or not least <= value < 2**63:
            raise refuse(where, f"an integer of at least {least}", value)
        return value

    return check


def one_of(*known: Any) -> Check:
    def check(value: Any, where: str) -> Any:
        if not any(type(value) is type(one) and value == one for one in known):
            raise refuse(where, f"one of {list(known)}", value)
        return value

    return check


def or_null(inner: Check) -> Check:
    return lambda value, where: None if value is None else inner(value, where)


def list_of(inner: Check) -> Check:
    def check(value: Any, where: str) -> list[Any]:
        if not isinstance(value, list):
            raise refuse(where, "a list", value)
        return [inner(one, f"{where}[{i}]") for i, one in enumerate(value)]

    return check


def names(value: Any, where: str) -> list[str]:
    """Different strings."""
    found = list_of(text)(value, where)
    if len(set(found)) != len(found):
        raise refuse(where, "different names", found)
    return found


def mapping_of(inner: Check) -> Check:
    def check(value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise refuse(where, "a mapping", value)
        return {name: inner(one, f"{where}[{name!r}]") for name, one in value.items()}

    return check


def tensor_of(inner: Check, ndim: int, dtype: torch.dtype) -> Check:
    """Lists in lists, ``ndim`` deep, as a tensor."""
    entries = inner
    for _ in range(ndim):
        entries = list_of(entries)

    def check(value: Any, where: str) -> torch.Tensor:
        checked = entries(value, where)
        try:
            return torch.tensor(checked, dtype=dtype)
        except ValueError as error:  # lists of different lengths
            raise ValueError(f"{where} is no array: {error}") from error

    return check


@dataclass(frozen=True)
class Record:
    """A mapping with a check for every field that it must or may have, and no other field."""

    needed: Mapping[str, Check]
    optional: Mapping[str, Check] = field(default_factory=dict)

    def __call__(self, value: Any, where: str = "") -> dict[str, Any]:
        """``value`` checked; without ``where``, fields go by their own names."""
        if not isinstance(value, dict):
            raise refuse(where, f"a mapping with {list(self.needed)}", value)
        prefix, of = (f"{where}.", f"{where}: ") if where else ("", "")
        if missing := self.needed.keys() - value.keys():
            raise ValueError(f"{of}lacks the field {min(missing)!r}")
        checks = {**self.needed, **self.optional}
        if unknown := value.keys() - checks.keys():
            raise ValueError(f"{of}has the unknown field {min(unknown)!r}")
        return {name: checks[name](one, prefix + name) for name, one in value.items()}
