"""One seed: the joint training of the evaluation, put down at some shares of it to measure the conflicts."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .. import arms
from ..experiments import ARMS
from ..results import read_json, write_json
from ..runner.config import Config
from ..runner.measures import what_is_not_finite
from ..runner.one import RunOfArm, Workplace
from ..runner.tune import JOINT
from .counts import Reading, measure
from .folder import file_name
from .heads import head_losses, heads_file
from .measurement import Measurement

RATIOS = tuple(sorted(arms.RATIOS))
SHARES = (0.0, 0.1, 0.25, 0.5, 0.75)
"""Of the training."""


@dataclass(frozen=True)
class Probe:
    """What is measured of each seed."""

    config: Config
    """Of the joint training; its ``read`` images are what is measured."""
    out: Path
    shares: Sequence[float] = SHARES
    sample: int = 256
    permuted: int = 512

    def path(self, share: float) -> Path:
        return self.out / "measured" / file_name(self.config.seed, share)

    def heads(self, share: float) -> Path:
        return heads_file(self.path(share))

    def is_measured(self, share: float) -> bool:
        return self.path(share).exists() and self.heads(share).exists()

    @property
    def times(self) -> Path:
        """Where the seconds of a seed are kept."""
        return self.out / "work" / f"seed-{self.config.seed}.json"

    def run(self, tell: Callable[[str, str, int], None] = lambda name, what, done: None) -> None:
        """Measure what is not measured yet.

        Args:
            tell: called with a name of the measurement, what is done for it, and how much of that.

        Raises:
            ValueError: the training diverged, or there is nothing to measure.
        """
        torch.set_num_threads(self.config.threads)
        for share in self.shares:
            if self.is_measured(share):
                continue
            config = replace(self.config, arm=JOINT, expand_at=share)
            said = partial(tell, f"seed {config.seed} at {share:.0%}")
            run = RunOfArm(config, ARMS[JOINT], Workplace(self.out, tell=said))
            with _timed(self.times, "training"):
                training = run.joint_part()
            with _timed(self.times, "measuring"):
                if not self.path(share).exists():
                    self._measure(run, training.model, share, partial(said, "images read")).save(self.path(share))
                head_losses(training.model, run.data.tasks, run.to_read()).save(self.heads(share))
            said("measured", self.config.read)

    def _measure(self, run: RunOfArm, model: Any, share: float, tell: Callable[[int], None]) -> Measurement:
        loader = run.to_read()
        reading = Reading(loader, len(loader), self.config.batch, self.sample, self.permuted, RATIOS)
        try:
            return measure(model, run.data.tasks, reading, self.config.seed, share, tell)
        except ValueError as error:
            what = what_is_not_finite(model, loader, run.data.tasks)
            if what is None:
                raise
            raise ValueError(f"seed {self.config.seed} diverged before {share:.0%} of the training: {what}") from error


@contextmanager
def _timed(path: Path, what: str) -> Iterator[None]:
    """Add what the body takes to the seconds in a file, and its CPU time; what is interrupted is not counted."""
    started, cpu = time.perf_counter(), time.process_time()
    yield
    seconds = read_json(path) if path.exists() else {}
    for name, took in ((what, time.perf_counter() - started), ("cpu", time.process_time() - cpu)):
        seconds[name] = seconds.get(name, 0.0) + took
    write_json(path, seconds)
