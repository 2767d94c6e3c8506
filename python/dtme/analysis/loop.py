"""A pass over the loader: batch by batch, in step with the other ranks, to its end or to a look that settles it."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

from ..trees import leaves
from .folder import Folder, checksum, random_as_saved, wind_back_to_saved
from .passes import Analysis

FIRST_LOOK = 2
"""Batches; then at every doubling."""
_END = object()


def length_of(loader: Iterable[Any]) -> int | None:
    """Batches in the loader, where it tells."""
    try:
        return len(loader) if isinstance(loader, Sized) else None
    except TypeError:  # as torch's loader of a data set that has no length
        return None


class Pass:
    """One of the two passes.

    Args:
        number: 0 or 1.
        add: what is done with a batch.
        look: at doublings of what was read; returns whether that is enough, and what it still waits for. None: never.
        limit: batches; None for all.
    """

    def __init__(
        self,
        number: int,
        analysis: Analysis,
        folder: Folder,
        add: Callable[[Any], None],
        look: Callable[[int], tuple[bool, str]] | None,
        limit: int | None,
        show: bool,
    ) -> None:
        self.number, self.analysis, self.folder, self.add, self.look = number, analysis, folder, add, look
        self.limit, self.show = limit, show
        self.settled = False
        self.rounds = 0
        """Batches of this rank, and of those that have no more, rounds that they waited."""
        self._begun: dict[str, Any] = {}
        self._now: dict[str, Any] = {}
        """Where random numbers were when the pass began, and behind the last batch that was added."""
        self._first = self._last = 0
        """Checksums of the first batch and of the last one that was added."""

    def run(self, loader: Iterable[Any], saved: dict[str, Any] | None) -> None:
        """Read on behind what ``saved`` has read already.

        Raises:
            ValueError: the loader yields other batches than it did then.
        """
        ranks, signals = self.analysis.ranks, self.analysis.signals
        batches: Iterator[Any] = iter(())
        with ranks.together(), signals.allowed():
            if saved is None:
                self._begun = random_as_saved(loader) if self.folder.path is not None else {}
                batches = iter(loader)
            else:
                batches = self._skipped(loader, saved)
        if saved is not None and saved["over"]:
            return
        bar = self._bar(loader)
        try:
            while self._round(batches, bar):
                pass
        finally:
            if bar is not None:
                bar.close()

    def _skipped(self, loader: Iterable[Any], saved: dict[str, Any]) -> Iterator[Any]:
        """The batches behind those that were added already; of a pass that is over, only the first is read again."""
        self.rounds, self.settled = saved["batches"], saved["settled"]
        self._begun, self._first, self._last = saved["begun"], saved["first"], saved["last"]
        wind_back_to_saved(self._begun, loader)  # a loader that shuffles draws from here
        batches = iter(loader)
        for number in range(1 if saved["over"] else saved["batches"]):
            batch = next(batches, _END)
            expected = {0: self._first, saved["batches"] - 1: self._last}.get(number)
            if batch is not _END and expected is not None and _checksum(batch) != expected:
                raise ValueError(
                    f"the loader does not yield the batches whose sums are in folder {self.folder.path}: number "
                    f"{number} is another one. Make their order the same, or delete the folder"
                )
        wind_back_to_saved(saved["now"])
        return batches

    def _round(self, batches: Iterator[Any], bar: Any) -> bool:
        """One batch, if there is one more; whether to go on."""
        signals = self.analysis.signals
        error: BaseException | None = None
        batch: Any = _END
        if self.folder.path is not None:
            self._now = random_as_saved()
        try:
            if self.limit is None or self.rounds < self.limit:
                with signals.allowed():
                    batch = next(batches, _END)
                if batch is not _END:
                    check = _checksum(batch) if self.folder.path is not None else 0
                    self.add(batch)
                    self._first, self._last = (self._first if self.rounds else check), check
        except BaseException as raised:
            error = raised
            self._write_after(raised)
        has_batch, is_due = self.analysis.ranks.exchange(error, batch is not _END, self.folder.is_due())
        if not has_batch:
            return False
        self.rounds += 1
        if bar is not None:
            with signals.allowed():
                bar.update()
        if self.look is not None and self.rounds >= FIRST_LOOK and self.rounds & (self.rounds - 1) == 0:
            self.settled, waits = self.look(self.rounds)
            if bar is not None and waits:
                with signals.allowed():
                    more = bar.total is None or 2 * self.rounds <= bar.total
                    bar.set_postfix_str(f"{waits}; next look at {2 * self.rounds}" if more else waits)
        if is_due:
            self._now = random_as_saved()
            self.write()
        return not self.settled

    def _write_after(self, error: BaseException) -> None:
        """Sums are of whole batches: those before the one that failed, or was interrupted, can be gone on from."""
        if self.analysis.ranks.world == 1 and self.rounds:
            try:
                self.write()
            except Exception as second:
                warnings.warn(f"after {error!r}, the sums so far could not be written: {second}", stacklevel=2)

    def write(self, *, over: bool = False) -> None:
        """All that was read so far."""
        if self.folder.path is None:
            return
        state = {
            "begun": self._begun,
            "now": self._now,
            "first": self._first,
            "last": self._last,
            "over": over,
            "settled": self.settled,
            "state": self.analysis.state(),
        }
        self.folder.write(self.number, self.rounds, state)

    def _bar(self, loader: Iterable[Any]) -> Any:
        if not self.show or self.analysis.ranks.rank != 0:
            return None
        from tqdm.auto import tqdm

        total = length_of(loader)
        total = self.limit if total is None else min(total, self.limit or total)
        name = ("token space", "conflicts")[self.number]
        return tqdm(desc=f"{name:11}", total=total, initial=self.rounds, unit="batch")


def _checksum(batch: Any) -> int:
    return checksum(leaves(batch))
