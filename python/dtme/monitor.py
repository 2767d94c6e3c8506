"""Watch the conflicts all along a training: a few batches every some hundred steps."""

import textwrap
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from inspect import signature
from math import isfinite
from numbers import Real
from statistics import fmean
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .analysis import analyze
from .analysis.arguments import check_max_tasks, check_method, check_model, ratios_of
from .analysis.losses import Step
from .analysis.masks import TokenMasks
from .blocks import BlockError, find_blocks
from .expansion import check_module, parallel_wrapper
from .report import ConflictReport
from .tables import aligned, ruled
from .wrappers import backbone_of

NOT_FORWARDED = {
    # what the monitor says itself
    *("model", "loader", "losses", "ratio", "progress"),
    # what a few batches of one process have no use for: there is nothing to stop early, to go on from or to share
    *("max_batches", "covariance_batches", "settle", "plan_options", "folder", "process_group"),
}
"""Arguments of ``analyze`` that are no options of a monitor."""
ROWS = 10


@dataclass(frozen=True)
class Observation:
    """What the monitor saw at one step."""

    step: int
    seconds: float
    """Its cost."""
    report: ConflictReport | None = field(default=None, repr=False)
    """Of the few batches, without its bases; None where the analysis failed."""
    range_rates: Mapping[str, float] = field(default_factory=dict)
    """By block; of those that at least two tasks reach."""
    null_rates: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None
    """Why the analysis failed."""
    writer_error: str | None = None
    """Why the writer failed."""

    def mean(self, space: str) -> float:
        """Over the blocks, of the ``"range"`` or the ``"null"`` rates; NaN where there is none."""
        rates = self.range_rates if space == "range" else self.null_rates
        return fmean(rates.values()) if rates else float("nan")


class ConflictMonitor:
    """Analyse a few batches of a running training every some hundred steps.

    ``step(batch)`` is called once per training step, anywhere in it, with the batch as the loader yields it. The last
    ``batches`` ones before every ``every``-th step go through ``dtme.analyze``, which leaves the model, gradients,
    modes and random numbers as they were: the training is the same as without the monitor. An analysis that fails, as
    where a task has no label in these few batches, or a writer that does, is recorded with its error, and the first of
    them warned of; it does not end the training. Rates of so few batches are rough: look at their course, and plan by
    an analysis of more.

    >>> monitor = dtme.ConflictMonitor(model, losses, writer=SummaryWriter())
    >>> for batch in loader:
    ...     train(batch)
    ...     monitor.step(batch)
    >>> print(monitor)

    Args:
        model, losses: as for ``analyze``; a loop of one's own gives its ``step(model, batch)`` for the losses.
        every: steps from one analysis to the next.
        ratio: r, range energy over null energy; one number.
        writer: anything with TensorBoard's ``add_scalar(tag, value, step)``; it is given ``dtme/range/<block>``,
            ``dtme/null/<block>``, ``dtme/range_mean``, ``dtme/null_mean`` and ``dtme/overhead``.
        batches: how many consecutive batches an analysis reads; by default 2, or ``every`` if that is less. With K
            tasks, a batch costs about as much as K training steps of one task and a forward or two.
        max_overhead: a share of the time, such as 0.03: an analysis that would bring ``overhead`` above it, going by
            what the last one took, is left out. None for no such limit.
        options: of ``analyze``: ``blocks``, ``token_mask``, ``max_tasks``, ``count_zero_gradients``, ``train_mode``,
            ``autocast``, ``method`` and ``device``.

    Attributes:
        history: an ``Observation`` for each analysis.

    Raises:
        RuntimeError: the model is wrapped by DDP, FSDP or DataParallel, or more than one process trains: the other
            processes would wait for gradients that never come. Watch one process's training, or analyse between epochs.
        TypeError: a writer without ``add_scalar``; other options; or as ``analyze``.
        ValueError: ``every`` or ``batches`` is not a positive integer, ``batches`` is more than ``every``, or
            ``max_overhead`` no share; several ratios; or as ``analyze``.

        All of these come at once, before the training has begun.
    """

    def __init__(
        self,
        model: nn.Module,
        losses: Mapping[str, Callable[[Any, Any], Tensor]] | Step,
        *,
        every: int = 200,
        ratio: float = 100.0,
        writer: Any = None,
        batches: int | None = None,
        max_overhead: float | None = None,
        **options: Any,
    ) -> None:
        check_module(model)
        _refuse_parallel(model)
        if writer is not None and not callable(getattr(writer, "add_scalar", None)):
            raise TypeError(f"writer must have add_scalar(tag, value, step), got {type(writer).__name__}")
        for name, value in (("every", every), ("batches", batches)):
            given = isinstance(value, int) and not isinstance(value, bool) and value > 0
            if not given and (name, value) != ("batches", None):
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        batches = min(2, every) if batches is None else batches
        if batches > every:
            raise ValueError(f"batches must be at most every, as those before a step are read: {batches} > {every}")
        is_number = isinstance(max_overhead, Real) and not isinstance(max_overhead, bool)
        if max_overhead is not None and not (is_number and 0 < max_overhead <= 1):
            raise ValueError(f"max_overhead must be None or a share in (0, 1], got {max_overhead!r}")
        if ratios_of(ratio) != (ratio,):
            raise ValueError(f"ratio must be one positive number, got {ratio!r}: a monitor shows the rates at one")
        check_model(model, losses)
        _check_options(model, options)
        self.model, self.losses, self.every, self.ratio, self.writer = model, losses, every, ratio, writer
        self.batches, self.max_overhead, self.options = batches, max_overhead, options
        self.num_steps = 0
        self.history: list[Observation] = []
        self._waiting: deque[Any] = deque(maxlen=batches)
        self._begun: float | None = None
        self._spent = 0.0

    @property
    def overhead(self) -> float:
        """The share of the time since the first step that went into the monitor; 0 before."""
        return 0.0 if self._begun is None else self._spent / max(perf_counter() - self._begun, self._spent, 1e-12)

    def step(self, batch: Any) -> Observation | None:
        """Count one training step.

        Args:
            batch: what this step trains on, as the loader yields it; it must not be changed in the steps until the
                analysis, ``batches`` at the most.

        Returns:
            What was seen, at steps that end in an analysis; else None.
        """
        begun = perf_counter()
        if self._begun is None:
            self._begun = begun
        self.num_steps += 1
        if -self.num_steps % self.every < self.batches:
            self._waiting.append(batch)
        if self.num_steps % self.every or self._is_too_dear(begun):
            self._spent += perf_counter() - begun
            return None
        if torch.cuda.is_initialized():  # what the training has under way is not the monitor's time
            torch.cuda.synchronize()
            begun = perf_counter()
        seen = self._observe(begun)
        self.history.append(seen)
        self._spent += perf_counter() - begun
        if self.writer is not None:
            begun = perf_counter()
            self.history[-1] = seen = self._written(seen)
            self._spent += perf_counter() - begun
        return seen

    def _is_too_dear(self, now: float) -> bool:
        """Whether another analysis like the last would take more than its share of the time."""
        if self.max_overhead is None or not self.history or self._begun is None:
            return False
        seconds = self.history[-1].seconds
        return self._spent + seconds > self.max_overhead * (now - self._begun + seconds)

    def _observe(self, begun: float) -> Observation:
        some = list(self._waiting)
        self._waiting.clear()
        try:
            report = analyze(self.model, some, self.losses, ratio=self.ratio, progress=False, **self.options)
        except Exception as error:  # whatever it is, the training is worth more
            seconds, is_first = perf_counter() - begun, not any(earlier.error for earlier in self.history)
            return Observation(self.num_steps, seconds, error=self._said("analysis", error, is_first))
        in_range, in_null = (
            {block: rate for block, rate in zip(report.blocks, rates.tolist(), strict=True) if isfinite(rate)}
            for rates in (report.range_rates, report.null_rates)
        )
        return Observation(self.num_steps, perf_counter() - begun, replace(report, bases=None), in_range, in_null)

    def _said(self, what: str, error: Exception, is_first: bool) -> str:
        """The error in words, which are warned of where it is the first of its kind."""
        said = f"{type(error).__name__}: {error}"
        if is_first:
            warnings.warn(
                f"the conflict monitor's {what} at step {self.num_steps} failed, and the training goes on; later "
                f"failures are only recorded in its history: {said}",
                stacklevel=4,
            )
        return said

    def _written(self, seen: Observation) -> Observation:
        """What was seen, given to the writer; a full disk or a lost connection must not end the training either."""
        try:
            self._write(seen)
        except Exception as error:
            is_first = not any(earlier.writer_error for earlier in self.history)
            return replace(seen, writer_error=self._said("writer", error, is_first))
        return seen

    def _write(self, seen: Observation) -> None:
        for space, rates in (("range", seen.range_rates), ("null", seen.null_rates)):
            for block, rate in rates.items():
                self.writer.add_scalar(f"dtme/{space}/{block}", rate, seen.step)
            if rates:
                self.writer.add_scalar(f"dtme/{space}_mean", seen.mean(space), seen.step)
        self.writer.add_scalar("dtme/overhead", self.overhead, seen.step)

    def __str__(self) -> str:
        failed = sum(seen.error is not None for seen in self.history)
        failures = f", {failed} of them failed" if failed else ""
        head = (
            f"Conflicts every {self.every} steps, {self.batches} batches each: {len(self.history)} analyses{failures} "
            f"in {self.num_steps:,} steps, {self.overhead:.1%} of the time"
        )
        rows = [["step", "range", "null", "highest range", "highest null", "seconds"]]
        rows += [_row(seen) for seen in self.history[-ROWS:]]
        left_out = [f"(the last {ROWS})"] if len(self.history) > ROWS else []
        return "\n".join([head, *left_out, *ruled(aligned(rows, ">>><<>"))] if self.history else [head])


def _row(seen: Observation) -> list[str]:
    if seen.report is None:
        why = textwrap.shorten(seen.error or "", 60, placeholder=" …")
        return [str(seen.step), "-", "-", f"failed: {why}", "", f"{seen.seconds:.2f}"]
    highest = [
        "{} {:.0%}".format(*max(rates.items(), key=lambda item: item[1])) if rates else "-"
        for rates in (seen.range_rates, seen.null_rates)
    ]
    means = [f"{seen.mean(space):.1%}" for space in ("range", "null")]
    return [str(seen.step), *means, *highest, f"{seen.seconds:.2f}"]


def _check_options(model: nn.Module, options: Mapping[str, Any]) -> None:
    """What ``analyze`` would refuse at every step."""
    known = [name for name in signature(analyze).parameters if name not in NOT_FORWARDED]
    if unknown := [name for name in options if name not in known]:
        raise TypeError(f"ConflictMonitor got {unknown[0]!r}; its options for dtme.analyze are {known}")
    try:
        blocks = find_blocks(backbone_of(model), options.get("blocks"))
    except BlockError as error:
        error.named = options.get("blocks") is not None
        raise
    TokenMasks(options.get("token_mask"), blocks)
    if "max_tasks" in options:
        check_max_tasks(options["max_tasks"])
    check_method(options.get("method", "joint"), options.get("autocast"), None)
    try:
        torch.device(options.get("device") or "cpu")
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be None or name a device, got {options['device']!r}: {error}") from error


def _refuse_parallel(model: nn.Module) -> None:
    wrapper = parallel_wrapper(model)
    what = None if wrapper is None else wrapper[1]
    if what is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        what = f"a group of {dist.get_world_size()} processes"
    if what is not None:
        raise RuntimeError(
            f"{type(model).__name__} is trained by {what}: a monitor runs the model in one process alone, for which "
            "the others would wait. Call dtme.analyze on the plain model in all processes, between epochs, say"
        )
