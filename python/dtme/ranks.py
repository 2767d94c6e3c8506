"""Processes that do something together, kept in step: what stops one of them stops all."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .interrupts import Deferred


class Ranks:
    """All processes of ``group``; a single one where ``torch.distributed`` is not in use.

    Args:
        signals: Ctrl-C comes through while one process waits for the others.
        alone: this process does something by itself.
        what: they do, for messages.
    """

    def __init__(self, group: Any, signals: Deferred, *, alone: bool = False, what: str = "the analysis") -> None:
        self.group, self.signals, self.what = group, signals, what
        in_group = dist.is_available() and dist.is_initialized() and not alone
        self.world = dist.get_world_size(group) if in_group else 1
        self.rank = dist.get_rank(group) if in_group else 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what needs all processes: where it fails, as after one of them was killed, the error says so."""
        with self.signals.allowed():
            try:
                yield
            except RuntimeError as error:  # torch's own errors of a process group are of this class
                raise RuntimeError(
                    f"{self.what} ended on rank {self.rank}: another rank is gone, or did not come in the time that "
                    f"the process group allows: {error}"
                ) from error

    def gather(self, value: Any) -> list[Any]:
        """What every process gives, in the order of ranks."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        with self.waiting():
            dist.all_gather_object(values, value, group=self.group)
        return values

    def same(self, values: Mapping[str, Any]) -> None:
        """ValueError, in all processes, unless every one gives the same values under their names."""
        first, *others = self.gather(dict(values))
        for rank, other in enumerate(others, 1):
            for name in first | other:
                if first.get(name) != other.get(name):
                    said = f"rank 0 has {first.get(name)}, rank {rank} {other.get(name)}"
                    raise ValueError(f"{name} must be the same on all ranks: {said}")

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors if self.world > 1 else ():
            with self.waiting():
                dist.all_reduce(tensor, group=self.group)

    def take_first_(self, tensors: Sequence[Tensor]) -> None:
        """Let all have the tensors of the first rank."""
        if self.world > 1:
            source = dist.get_global_rank(self.group, 0) if self.group else 0
            for tensor in tensors:
                with self.waiting():
                    dist.broadcast(tensor, source, self.group)

    @contextmanager
    def together(self) -> Iterator[None]:
        """What every process does by itself; if it fails in one, it fails in all, which name the rank and the cause."""
        error: BaseException | None = None
        try:
            yield
        except BaseException as raised:
            error = raised
        self.exchange(error)

    def exchange(self, error: BaseException | None, *flags: bool) -> list[bool]:
        """Whether any process has each of the ``flags``.

        Raises:
            BaseException: ``error``, where it is this process's own.
            RuntimeError: another process's, by its rank.
        """
        if self.world == 1:
            if error is not None:
                raise error
            return list(flags)
        kind = "cuda" if "nccl" in dist.get_backend(self.group) else "cpu"
        state = torch.tensor([error is not None, *flags], dtype=torch.int32, device=kind)
        try:
            with self.waiting():
                dist.all_reduce(state, group=self.group)
            failed, *found = (state > 0).tolist()
            said = self.gather(None if error is None else f"{type(error).__name__}: {error}") if failed else []
        except RuntimeError:
            if error is None:
                raise
        if error is not None:  # this process's own, whatever became of the others
            raise error
        for rank, cause in enumerate(said):
            if cause is not None:
                raise RuntimeError(f"{self.what} ended on all ranks because of rank {rank}: {cause}")
        return found
