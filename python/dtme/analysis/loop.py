"""A pass over the loader: batch by batch, in step with the other ranks, to its end or to a look that settles it."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

from ..interrupts import Deferred
from .folder import Folder, random_as_saved, wind_back_to_saved
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

    def run(self, loader: Iterable[Any], saved: dict[str, Any] | None) -> None:
        """Read on behind what ``saved`` has read already."""
        ranks, signals = self.analysis.ranks, self.analysis.signals
        begun = random_as_saved() if saved is None else saved["begun"]
        batches: Iterator[Any] = iter(())
        with ranks.together(), signals.allowed():
            if saved is not None:
                wind_back_to_saved(begun)  # a loader that shuffles draws from here
            batches = iter(loader)
            for _ in range(0 if saved is None else saved["batches"]):
                next(batches, _END)
            if saved is not None:
                wind_back_to_saved(saved["now"])
                self.rounds = saved["batches"]
        if saved is not None and saved["settled"]:
            self.settled = True
            return
        bar = self._bar(loader)
        try:
            while self._round(batches, begun, bar, signals):
                pass
        finally:
            if bar is not None:
                bar.close()

    def _round(self, batches: Iterator[Any], begun: dict[str, Any], bar: Any, signals: Deferred) -> bool:
        """One batch, if there is one more; whether to go on."""
        error: BaseException | None = None
        batch: Any = _END
        before = random_as_saved() if self.folder.path is not None else {}
        try:
            if self.limit is None or self.rounds < self.limit:
                with signals.allowed():
                    batch = next(batches, _END)
                if batch is not _END:
                    self.add(batch)
        except BaseException as raised:
            error = raised
            self._write_after(raised, begun, before)
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
            self.write(begun)
        return not self.settled

    def _write_after(self, error: BaseException, begun: dict[str, Any], now: dict[str, Any]) -> None:
        """Sums are of whole batches: those before the one that failed, or was interrupted, can be gone on from."""
        if self.analysis.ranks.world == 1 and self.rounds:
            try:
                self.write(begun, now)
            except Exception as second:
                warnings.warn(f"after {error!r}, the sums so far could not be written: {second}", stacklevel=2)

    def write(self, begun: dict[str, Any] | None = None, now: dict[str, Any] | None = None) -> None:
        """All that was read so far; without ``begun``, because the pass is over.

        Args:
            begun, now: where random numbers were when the pass began, and behind the last batch that was added.
        """
        if self.folder.path is None:
            return
        state = {
            "begun": begun or {},
            "now": now or random_as_saved(),
            "settled": self.settled or begun is None,
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
