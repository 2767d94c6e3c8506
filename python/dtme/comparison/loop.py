"""The trainings of a comparison, one after the other: a joint part for each seed, and from there on every arm."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..analysis import analyze
from ..model import MultiTaskModel
from ..report import ConflictReport
from .arms import BY_ANALYSIS, JOINT, Built, Setting, build
from .batches import Batches, Marks, Summed, not_repeating, repeated, seed_everything, seed_of
from .metrics import HIGHER, Metric, evaluate, is_known
from .options import TUNING_SEED, Options
from .store import Memory, Run
from .training import (
    Diverged,
    Losses,
    Schedule,
    Start,
    Training,
    moments_of,
    optimizer_of,
    take_up,
)

MOST_READ = 64
"""Batches that an analysis reads where nothing else is said."""
NOT_FINITE = ("not finite", "NaN or Inf")
"""What an analysis says of a model that diverged; nothing else that it refuses does."""


@dataclass(frozen=True)
class Problem:
    """The tasks at hand, as a user gives them."""

    make_model: Callable[[int], MultiTaskModel]
    loaders: Mapping[str, Iterable[Any]]
    losses: Losses
    metrics: Mapping[str, Metric]
    arms: Mapping[str, Any]
    """``{name: None, or a plan or function of the user's}``."""
    device: torch.device | None

    def model(self, seed: int) -> tuple[MultiTaskModel, torch.device]:
        """A new one, and where it is."""
        seed_everything(seed_of(seed, "model"))
        model = self.make_model(seed)
        if self.device is not None:
            model = model.to(self.device)
        return model, device_of(model)


class Loop:
    """Runs what is missing.

    Args:
        bar: a progress bar with ``update``, ``set_description`` and ``total``; None for none.
    """

    def __init__(self, problem: Problem, options: Options, store: Memory, bar: Any = None) -> None:
        self.problem, self.options, self.store, self.bar = problem, options, store, bar
        self._marks: dict[int, dict[int, int]] = {}
        """Checksums of the batches of every seed, which all of its runs must have."""
        self._held_out: dict[tuple[int, str], int] = {}
        """The same of the batches that they are scored on, by seed and split."""

    def missing(self, seeds: Sequence[int]) -> list[str]:
        """Names of the compared runs that are still to be done."""
        names = [name_of(arm, seed) for seed in seeds for arm in self.problem.arms]
        return [name for name in names if self.store.run(name) is None]

    def run(self, rates: Mapping[str, float]) -> dict[str, tuple[Run, ...]]:
        """The runs of every arm by seed, at the arms' learning rates."""
        for seed in self.options.seeds:
            self.run_seed(seed, {arm: (rates[arm],) for arm in self.problem.arms}, rates[JOINT])
        return {
            arm: tuple(self._finished(name_of(arm, seed)) for seed in self.options.seeds) for arm in self.problem.arms
        }

    def run_seed(
        self, seed: int, rates: Mapping[str, Sequence[float]], joint: float, split: str = "val"
    ) -> dict[str, dict[float, Run]]:
        """Every arm at every one of its rates, from one joint part at the rate ``joint``.

        Args:
            split: the loader that the runs are scored on; another than ``"val"`` is part of their names.
        """
        wanted = {(arm, lr): name_of(arm, seed, lr, split) for arm, those in rates.items() for lr in those}
        missing = {key: name for key, name in wanted.items() if self.store.run(name) is None}
        if missing:
            self._run_missing(missing, seed, joint, split)
        found: dict[str, dict[float, Run]] = {arm: {} for arm in rates}
        for (arm, lr), name in wanted.items():
            found[arm][lr] = self._finished(name)
        return found

    def _run_missing(self, missing: Mapping[tuple[str, float], str], seed: int, joint: float, split: str) -> None:
        start_name = f"seed-{seed}-{joint!r}"
        try:
            start = self._start(start_name, seed, joint)
            setting = self._setting(start_name, seed, start) if any(arm != JOINT for arm, _ in missing) else None
        except Diverged as error:
            for (arm, lr), name in missing.items():
                self.store.add(name, Run(arm, seed, lr, None, f"the joint part: {error}", 0, None, 1, 0.0, 0))
            return
        for (arm, lr), name in missing.items():
            self.store.add(name, self._run(arm, lr, seed, start, setting, split))
        self.store.forget(start_name)

    def _finished(self, name: str) -> Run:
        run = self.store.run(name)
        assert run is not None
        return run

    # --- the joint part -----------------------------------------------------------------------------------------------

    def _start(self, name: str, seed: int, lr: float) -> Start:
        """The joint part of a seed, trained or taken up again."""
        if (known := self.store.start(name)) is not None:
            return known
        self._say(f"seed {seed}, joint part")
        began, options = time.perf_counter(), self.options
        model, device = self.problem.model(seed)
        training = self._training(model, device, seed, lr, options.budget, Batches(self._train, seed))
        training.run(options.start, self._step)
        names = dict(model.named_parameters())
        start = Start(
            weights={key: value.detach().cpu().clone() for key, value in model.state_dict().items()},
            moments=moments_of(training.optimizer, names),
            epoch=training.batches.epoch,
            index=training.batches.index,
            checksum=training.batches.checksum,
            marks=training.marks.noted,
            seconds=time.perf_counter() - began,
        )
        self.store.keep_start(name, start)
        return start

    def _setting(self, name: str, seed: int, start: Start) -> tuple[Setting, float]:
        """The analysis at the end of the joint part, and the seconds that it took."""
        if (known := self.store.report(name)) is not None:
            return Setting(known[0], self.options, seed), known[1]
        self._say(f"seed {seed}, analysis")
        began = time.perf_counter()
        model, device = self.problem.model(seed)
        model.load_state_dict(start.weights)
        try:
            report = read_conflicts(model, self.problem, self.options, seed, device)
        except ValueError as error:
            if not any(said in str(error) for said in NOT_FINITE):
                raise
            raise Diverged(f"its analysis fails: {error}") from error
        seconds = time.perf_counter() - began
        self.store.keep_report(name, report, seconds)
        return Setting(report, self.options, seed), seconds

    # --- an arm -------------------------------------------------------------------------------------------------------

    def _run(
        self, arm: str, lr: float, seed: int, start: Start, setting: tuple[Setting, float] | None, split: str
    ) -> Run:
        self._say(f"seed {seed}, {arm}" + ("" if split == "val" else f" at {lr:g}"))
        options, began = self.options, time.perf_counter()
        model, device = self.problem.model(seed)
        model.load_state_dict(start.weights)
        names, plain = dict(model.named_parameters()), count_parameters(model)
        built = build(arm, self.problem.arms[arm], model, setting and setting[0])
        steps = setting[0].steps(arm) if setting is not None else options.budget
        if self.bar is not None:
            self.bar.total += steps - options.budget
        batches = Batches(self._train, seed, start.epoch, start.index, start.checksum)
        training = self._training(built.model.to(device), device, seed, lr, steps, batches, start.marks)
        left = take_up(training.optimizer, start.moments, names, built.model)
        note = built.note
        if left and self.problem.arms[arm] is not None:
            note = (
                f"the model of arm {arm!r} has no parameter {left[0]!r} of that name and shape"
                + (f", nor {len(left) - 1} others" if len(left) > 1 else "")
                + ": what it has instead begins without moments of the optimizer"
            )
        training.step = options.start
        run = Run(
            arm=arm,
            seed=seed,
            lr=lr,
            metrics=None,
            diverged=None,
            added=count_parameters(built.model) - plain,
            compute=_compute(built, options, steps),
            steps=steps,
            seconds=0.0,
            start=start.name,
            plan=built.plan,
            note=note,
        )
        try:
            training.run(steps, self._step)
        except Diverged as error:
            return replace(run, diverged=str(error), steps=max(1, training.step), marks=training.marks.noted)
        seconds = start.seconds + time.perf_counter() - began
        if setting is not None and arm in BY_ANALYSIS:
            seconds += setting[1]
        run = replace(run, seconds=seconds, marks=training.marks.noted)
        held_out = Summed(repeated(self.problem.loaders[split], seed))
        try:
            metrics = evaluate(built.model, held_out, self.problem.metrics, device)
        except Diverged as error:
            return replace(run, diverged=str(error))
        self._check_held_out(seed, split, held_out.checksum)
        run = replace(run, held_out=held_out.checksum)
        if not is_known(metrics):
            return replace(run, diverged=f"its metrics are {metrics}")
        return replace(run, metrics=metrics)

    def _training(
        self,
        model: nn.Module,
        device: torch.device,
        seed: int,
        lr: float,
        steps: int,
        batches: Batches,
        marks: Mapping[int, int] | None = None,
    ) -> Training:
        options = self.options
        if seed not in self._marks:  # of a run in the process that was ended, if there was one
            self._marks[seed] = self._marks_in_store(seed)
        return Training(
            model,
            optimizer_of(model, lr, options.weight_decay),
            batches,
            self.problem.losses,
            Schedule(options.start, options.budget, steps),
            Marks(options.start, options.budget, self._marks[seed], marks or {}),
            seed,
            device,
        )

    def _marks_in_store(self, seed: int) -> dict[int, int]:
        runs = (self.store.run(name_of(arm, seed)) for arm in self.problem.arms)
        return next((dict(run.marks) for run in runs if run is not None and run.marks), {})

    def _check_held_out(self, seed: int, split: str, checksum: int) -> None:
        """ValueError where a run is scored on other batches than those before it of the seed."""
        if (seed, split) not in self._held_out:
            runs = (self.store.run(name_of(arm, seed)) for arm in self.problem.arms if split == "val")
            known = (run.held_out for run in runs if run is not None and run.held_out is not None)
            self._held_out[seed, split] = next(known, checksum)
        if self._held_out[seed, split] != checksum:
            raise ValueError(
                f"{not_repeating(self.problem.loaders[split], split)}, whose tensors neither the model nor a loss nor "
                "a metric changes in place"
            )

    @property
    def _train(self) -> Iterable[Any]:
        return self.problem.loaders["train"]

    def _say(self, what: str) -> None:
        if self.bar is not None:
            self.bar.set_description(what)

    def _step(self) -> None:
        if self.bar is not None:
            self.bar.update()


def read_conflicts(
    model: MultiTaskModel, problem: Problem, options: Options, seed: int, device: torch.device, read: int | None = None
) -> ConflictReport:
    """The analysis that an arm's plan is made of."""
    loader = repeated(problem.loaders["train"], seed_of(seed, "analysis"))
    most = read or options.read or MOST_READ
    return analyze(model, loader, problem.losses, max_batches=most, progress=False, device=device)


def name_of(arm: str, seed: int, lr: float = 0.0, split: str = "val") -> str:
    """Of a run, and of its file."""
    return f"seed-{seed}-{arm}" if split == "val" else f"{split}-{arm}-{lr!r}"


def device_of(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _compute(built: Built, options: Options, steps: int) -> float | None:
    if built.compute is None:
        return None
    return (options.start + (steps - options.start) * built.compute) / options.budget


def tuned(loop: Loop, rates: Sequence[float]) -> tuple[dict[str, float], dict[str, dict[float, float | None]]]:
    """Every arm's best learning rate of ``rates``, and the score of each: Δm on the items that are held out for it.

    All arms, joint training included, try all rates on one seed that is not compared. Joint training comes first: the
    others leave its joint part at its best rate. Scores are relative to the mean of its runs.
    """
    arms = loop.problem.arms
    joint = {lr: loop.run_seed(TUNING_SEED, {JOINT: (lr,)}, lr, "tune")[JOINT][lr] for lr in rates}
    base = _mean_metrics(joint)
    scores: dict[str, dict[float, float | None]] = {JOINT: _scores(joint, base, loop.problem.metrics)}
    best = {JOINT: _best(JOINT, scores[JOINT])}
    others = {arm: tuple(rates) for arm in arms if arm != JOINT}
    for arm, runs in loop.run_seed(TUNING_SEED, others, best[JOINT], "tune").items() if others else ():
        scores[arm] = _scores(runs, base, loop.problem.metrics)
        best[arm] = _best(arm, scores[arm])
    return {arm: best[arm] for arm in arms}, {arm: scores[arm] for arm in arms}


def _mean_metrics(runs: Mapping[float, Run]) -> dict[str, float]:
    known = [run.metrics for run in runs.values() if run.metrics is not None]
    if not known:
        reasons = "; ".join(f"at {lr:g}, {run.diverged}" for lr, run in runs.items())
        raise ValueError(f"joint training diverges at every learning rate that was given ({reasons}): give lower ones")
    return {task: sum(metrics[task] for metrics in known) / len(known) for task in known[0]}


def _scores(
    runs: Mapping[float, Run], base: Mapping[str, float], metrics: Mapping[str, Metric]
) -> dict[float, float | None]:
    """The mean gain over ``base`` in %, as Δm, but relative to its size alone: to choose by, it may be negative."""
    signs = {task: 100.0 if metric.direction == HIGHER else -100.0 for task, metric in metrics.items()}
    return {
        lr: None
        if run.metrics is None
        else sum(signs[task] * (value - base[task]) / (abs(base[task]) or 1.0) for task, value in run.metrics.items())
        / len(signs)
        for lr, run in runs.items()
    }


def _best(arm: str, scores: Mapping[float, float | None]) -> float:
    known = {lr: score for lr, score in scores.items() if score is not None}
    if not known:
        raise ValueError(f"arm {arm!r} diverges at every learning rate that was given: give lower ones")
    return max(known, key=known.__getitem__)
