"""The sums of an analysis in a folder, so that one that was killed goes on where it was."""

import os
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..files import write_beside
from ..randomness import State, random_state, wind_back
from .ranks import Ranks

EVERY = 60.0
"""Seconds between two files."""


class Folder:
    """Files ``sums-<rank>-of-<world>-<pass>-<batches>.pt``; the last two of every rank are kept.

    Args:
        path: None keeps nothing.
        analysis: what the analysis is of: the sums of another one are refused.
    """

    def __init__(self, path: str | os.PathLike[str] | None, analysis: Mapping[str, Any], ranks: Ranks) -> None:
        self.path, self.analysis, self.ranks = None if path is None else Path(path), dict(analysis), ranks
        self.prefix = f"sums-{ranks.rank}-of-{ranks.world}-"
        self._written = time.monotonic()

    def is_due(self) -> bool:
        return self.path is not None and time.monotonic() - self._written >= EVERY

    def write(self, number: int, batches: int, state: Mapping[str, Any]) -> None:
        """The sums of pass ``number`` after so many batches."""
        if self.path is None:
            return
        content = {"analysis": self.analysis, "pass": number, "batches": batches, **state}
        write_beside(self.path / f"{self.prefix}{number}-{batches:09}.pt", lambda beside: torch.save(content, beside))
        for old in self._files()[:-2]:
            old.unlink(missing_ok=True)
        self._written = time.monotonic()

    def read(self) -> dict[str, Any] | None:
        """The last sums that every rank has.

        Raises:
            ValueError: a file is damaged, or of another analysis; the message says what differs.
        """
        if self.path is None:
            return None
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"folder must be a folder, got the file {self.path}")
        self._refuse_other_worlds()
        names = {file.name.removeprefix(self.prefix): file for file in self._files()}
        common = set.intersection(*map(set, self.ranks.gather(list(names))))
        if not common:
            return None
        file = names[max(common)]
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
            saved = content["analysis"]
        except Exception as error:  # whatever torch finds wrong with it
            raise ValueError(f"{file} is damaged: {error}. Delete it to begin anew") from error
        for name, value in self.analysis.items():
            if saved.get(name) != value:
                raise ValueError(
                    f"folder {self.path} holds the sums of another analysis: its {name} is {saved.get(name)!r}, not "
                    f"{value!r}. Give another folder, or delete that one"
                )
        return content

    def _files(self) -> list[Path]:
        assert self.path is not None
        return sorted(self.path.glob(f"{self.prefix}*.pt"))

    def _refuse_other_worlds(self) -> None:
        assert self.path is not None
        for file in self.path.glob("sums-*.pt"):
            if f"-of-{self.ranks.world}-" not in file.name:
                raise ValueError(f"folder {self.path} holds {file.name}, of an analysis with another number of ranks")


def checksum(model: nn.Module) -> int:
    """Of all parameters and buffers."""
    total = 0
    for name, value in model.state_dict().items():
        total = zlib.crc32(name.encode(), total)
        if isinstance(value, torch.Tensor) and value.numel():
            flat = value.detach().cpu().contiguous().flatten().view(torch.uint8)
            total = zlib.crc32(flat.numpy().tobytes(), total)
    return total


def random_as_saved() -> dict[str, Any]:
    """Where random numbers are, in types that a file of weights may hold."""
    state = random_state()
    if state is None:
        return {}
    kind, keys, *rest = state.numpy
    return {
        "python": state.python,
        "numpy": [kind, torch.from_numpy(keys.astype("int64")), *rest],
        "cpu": state.cpu,
        "cuda": list(state.cuda),
    }


def wind_back_to_saved(saved: Mapping[str, Any]) -> None:
    if saved:
        kind, keys, *rest = saved["numpy"]
        numpy = (kind, keys.numpy().astype("uint32"), *rest)
        wind_back(State(saved["python"], numpy, saved["cpu"], tuple(saved["cuda"])))
