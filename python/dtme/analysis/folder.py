"""The sums of an analysis in a folder, so that one that was killed goes on where it was."""

import functools
import hashlib
import io
import os
import time
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import CellType, CodeType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..files import write_beside
from ..randomness import State, random_state, wind_back
from ..ranks import Ranks
from ..trees import leaves

EVERY = 60.0
"""Seconds between two files."""
HEAD = b"dtme sums, version 1\n"
"""How every file begins; then come a checksum of the rest and the rest."""


class Folder:
    """Files ``sums-<rank>-of-<world>-<pass>-<batches>.pt``; the last two of every rank are kept.

    Args:
        path: None keeps nothing.
        analysis: what the analysis is of: the sums of another one are refused.

    Raises:
        ValueError: ``path`` cannot be written to, or holds sums of another number of ranks.
    """

    def __init__(self, path: str | os.PathLike[str] | None, analysis: Mapping[str, Any], ranks: Ranks) -> None:
        self.path, self.analysis, self.ranks = None if path is None else Path(path), dict(analysis), ranks
        self.prefix = f"sums-{ranks.rank}-of-{ranks.world}-"
        self._written = time.monotonic()
        if self.path is None:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_beside(self.path / f"{self.prefix}probe", lambda beside: beside.touch())
            (self.path / f"{self.prefix}probe").unlink()
        except OSError as error:
            raise ValueError(f"folder {self.path} cannot be written to: {error}") from error
        for file in self.path.glob("sums-*.pt"):
            if f"-of-{ranks.world}-" not in file.name:
                raise ValueError(f"folder {self.path} holds {file.name}, of an analysis with another number of ranks")

    def is_due(self) -> bool:
        return self.path is not None and time.monotonic() - self._written >= EVERY

    def write(self, number: int, batches: int, state: Mapping[str, Any]) -> None:
        """The sums of pass ``number`` after so many batches."""
        if self.path is None:
            return
        content = {"analysis": self.analysis, "pass": number, "batches": batches, **state}
        write_beside(
            self.path / f"{self.prefix}{number}-{batches:09}.pt", lambda beside: write_checked(beside, content)
        )
        for old in self.files()[:-2]:
            old.unlink(missing_ok=True)
        self._written = time.monotonic()

    def files(self) -> list[Path]:
        """Of this rank, the oldest first."""
        return [] if self.path is None else sorted(self.path.glob(f"{self.prefix}*.pt"))

    def read(self, name: str) -> dict[str, Any]:
        """The sums in the file of that name, behind the prefix.

        Raises:
            ValueError: the file is damaged, or of another analysis; the message says what differs.
        """
        assert self.path is not None
        file = self.path / f"{self.prefix}{name}"
        try:
            content = read_checked(file)
            saved = content["analysis"]
        except Exception as error:  # whatever torch finds wrong with it
            raise ValueError(f"{file} is damaged: {error}. Delete it to begin anew") from error
        for key, value in self.analysis.items():
            if saved.get(key) != value:
                raise ValueError(
                    f"folder {self.path} holds the sums of another analysis: its {key} is {saved.get(key)!r}, not "
                    f"{value!r}. Give another folder, or delete that one"
                )
        return content


def write_checked(file: Path, content: Mapping[str, Any]) -> None:
    """Tensors, and what else a file of weights may hold, with a checksum."""
    torch.save(content, buffer := io.BytesIO())
    data = buffer.getvalue()
    file.write_bytes(HEAD + hashlib.sha256(data).digest() + data)


def read_checked(file: Path) -> dict[str, Any]:
    """What ``write_checked`` wrote; ValueError, or whatever torch raises, where the file is damaged."""
    data = file.read_bytes()
    if not data.startswith(HEAD):
        raise ValueError(f"it does not begin with {HEAD!r}, as files of this release do")
    start = len(HEAD) + hashlib.sha256().digest_size
    if hashlib.sha256(memoryview(data)[start:]).digest() != data[len(HEAD) : start]:
        raise ValueError("its checksum is that of other sums")  # torch looks at none
    return torch.load(io.BytesIO(data[start:]), map_location="cpu", weights_only=True)


def checksum(values: Iterable[Any]) -> int:
    """Of tensors, and of whatever else there is by how it is written."""
    total = 0
    for value in values:
        if isinstance(value, Tensor) and not value.is_meta:
            plain = value.detach().cpu().contiguous()
            total = zlib.crc32(plain.flatten().view(torch.uint8).numpy().tobytes() if plain.numel() else b"", total)
            value = tuple(value.shape)
        if isinstance(value, (bool, int, float, str, tuple)):
            total = zlib.crc32(repr(value).encode(), total)
    return total


def model_name(model: nn.Module) -> str:
    """Its class, and a checksum of all parameters and buffers."""
    state = model.state_dict()
    return f"{type(model).__name__} {checksum([*state, *leaves(state)]):08x}"


def function_name(function: Any) -> str | None:
    """Tells functions apart, as far as their names, code, defaults and the values that they close over do.

    What they look up elsewhere, such as a module's global variables, is not looked into. The same in every process.
    """
    if function is None:
        return None
    if isinstance(function, nn.Module):
        return model_name(function)
    name = getattr(function, "__qualname__", type(function).__qualname__)
    if not isinstance(function, functools.partial) and not isinstance(getattr(function, "__code__", None), CodeType):
        return name
    return f"{name} {zlib.crc32(_written(function, ()).encode()):08x}"


def _written(value: Any, above: tuple[int, ...]) -> str:
    """A value of a function as text without addresses; ``above`` are those that it is part of, which may be itself."""
    if id(value) in above:
        return "itself"
    above = (*above, id(value))
    if isinstance(value, (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)):
        return repr(value)
    if isinstance(value, (Tensor, np.ndarray)):
        return f"tensor {value.dtype} {checksum([torch.as_tensor(value)])}"
    if isinstance(value, nn.Module):
        return model_name(value)
    if isinstance(value, Mapping):
        return _written([list(pair) for pair in value.items()], above)
    if isinstance(value, (list, tuple, set, frozenset)):
        parts = [_written(one, above) for one in value]
        return f"{type(value).__name__} {sorted(parts) if isinstance(value, (set, frozenset)) else parts}"
    if isinstance(value, CodeType):
        return f"{value.co_code!r} {value.co_names} {_written(value.co_consts, above)}"
    if isinstance(value, functools.partial):
        return f"partial {_written([value.func, value.args, value.keywords], above)}"
    if isinstance(code := getattr(value, "__code__", None), CodeType):
        held = [_held(cell) for cell in value.__closure__ or ()]
        return f"{value.__qualname__} {_written([code, value.__defaults__, value.__kwdefaults__, held], above)}"
    return f"{type(value).__qualname__} {getattr(value, '__qualname__', '')}"


def _held(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is filled later, or was emptied
        return None


def random_as_saved(loader: Any = None) -> dict[str, Any]:
    """Where random numbers are, in types that a file of weights may hold; also those of a loader's own generator."""
    state = random_state()
    if state is None:
        return {}
    kind, keys, *rest = state.numpy
    own = getattr(loader, "generator", None)
    return {
        "python": state.python,
        "numpy": [kind, torch.from_numpy(keys.astype("int64")), *rest],
        "cpu": state.cpu,
        "cuda": list(state.cuda),
        "loader": own.get_state() if isinstance(own, torch.Generator) else None,
    }


def wind_back_to_saved(saved: Mapping[str, Any], loader: Any = None) -> None:
    if not saved:
        return
    kind, keys, *rest = saved["numpy"]
    numpy = (kind, keys.numpy().astype("uint32"), *rest)
    wind_back(State(saved["python"], numpy, saved["cpu"], tuple(saved["cuda"])))
    own = getattr(loader, "generator", None)
    if saved["loader"] is not None and isinstance(own, torch.Generator):
        own.set_state(saved["loader"])
