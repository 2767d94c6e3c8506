"""The two passes over the data, and what they add up."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dtme_kernels import count_conflicts

from ..layouts import Layout, together
from ..ranks import Ranks
from ..report import ConflictReport
from ..trees import to_device
from .capture import BlockInputs, Entered, Unchanged
from .gains import map_gradients
from .gradients import any_gradient, token_gradients, tokens_of_tasks
from .heads import HEAD_BATCHES
from .losses import ByStep, ByTask, Started
from .masks import Mask, TokenMask, TokenMasks
from .outcome import Sums, report_of
from .recompute import recomputed
from .spaces import Space, TokenSpaces
from .sums import SumFinder


class Options(NamedTuple):
    """What an analysis was asked for, and its sums depend on."""

    ratios: tuple[float, ...]
    count_zero_gradients: bool = False
    train_mode: bool = False
    token_mask: TokenMask | None = None
    autocast: torch.dtype | None = None
    streamed: bool = False
    max_tasks: int = 64
    settle: float | None = None
    plan_options: Mapping[str, Any] = MappingProxyType({})


class Gradients(NamedTuple):
    """Of the tasks of one batch at the inputs of its blocks."""

    names: list[str]
    """The blocks in the order they ran."""
    started: Started
    entered: list[list[Entered]]
    gradients: list[Tensor]
    """(K', B, N, p) of every block."""
    reached: Tensor
    """(D, K') bool."""


class Analysis:
    """The running sums of one analysis."""

    def __init__(
        self,
        model: Any,
        losses: Any,
        blocks: dict[str, nn.Module],
        held: Unchanged,
        options: Options,
        device: torch.device,
        ranks: Ranks,
    ) -> None:
        self.model, self.held, self.options, self.device, self.ranks = model, held, options, device, ranks
        self.signals = ranks.signals
        functions = [*(losses.values() if isinstance(losses, Mapping) else [losses])]
        functions += [getattr(model, name, None) for name in ("features", "decoder")]
        for owner in [getattr(function, "__self__", None) for function in functions]:
            if isinstance(owner, nn.Module):  # whose method is called, but not it itself
                held.hold(owner)
        by = ByTask if isinstance(losses, Mapping) else ByStep
        self.losses: ByTask | ByStep = by(model, losses, self.signals)
        self.inputs = BlockInputs(blocks)
        self.masks = TokenMasks(options.token_mask, blocks)
        self.spaces = TokenSpaces(options.ratios, ranks)
        self.split: dict[str, Space] = {}
        self.num_samples = 0
        self.sums: Sums | None = None
        self.totals: SumFinder | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.losses.tasks

    # --- first pass -------------------------------------------------------------------------------------------------

    def add_tokens(self, batch: Any) -> None:
        batch = to_device(batch, self.device)
        mask = self.masks.of(batch)
        with self.inputs.record(gradients=False) as entered, self.held.watch(), self._precision():
            self.losses.forward(batch)
        self.inputs.check(entered)
        with self.signals.allowed():
            tokens = {name: self._tokens(name, runs, mask) for name, runs in entered.items()}
        self.spaces.add(tokens)
        self.masks.note(mask)

    def _tokens(self, name: str, runs: list[Entered], mask: Mask) -> Tensor:
        """(B, n, p) of all streams."""
        num_tasks = sum(len(run.layout.tasks) for run in runs) or 1
        return torch.cat([run.by_image(num_tasks, self._mask_at(name, run, mask)) for run in runs], 1)

    def _mask_at(self, name: str, run: Entered, mask: Mask) -> Tensor | None:
        found = self.masks.at(mask, name, run.in_streams(run.tokens).shape[1:])
        return None if found is None else found.to(run.tokens.device)

    def _precision(self) -> AbstractContextManager[Any]:
        dtype = self.options.autocast
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def end_first_pass(self) -> None:
        if not self.spaces.num_samples:
            raise ValueError("loader yielded no batch")

    def check_masks(self) -> None:
        counted, masked = zip(*self.ranks.gather((self.masks.num_counted, self.masks.num_masked)), strict=True)
        self.masks.check(sum(counted), sum(masked))

    def split_spaces(self) -> None:
        self.split, self.num_samples = self.spaces.split()

    # --- second pass ------------------------------------------------------------------------------------------------

    def gradients(self, batch: Any, swap: bool = False) -> Gradients:
        """Of one batch, already on the device; ``swap`` as for ``ByTask.start``."""
        again = recomputed(self.inputs.blocks) if self.options.streamed else nullcontext()
        with torch.enable_grad(), again, self.inputs.record(gradients=True) as inputs:
            with self.held.watch(), self._precision():
                started = self.losses.start(batch, self._drawn(), swap)
            self.inputs.check(inputs)
            names = self.spaces.names or list(inputs)
            entered = [inputs[name] for name in names]
            with self.signals.allowed():
                sharing = self._sharing(names, entered)
                found = token_gradients(started.tasks, entered, started.outputs, started.seeds, sharing)
        return Gradients(names, started, entered, *found)

    def add_gradients(self, batch: Any) -> None:
        batch = to_device(batch, self.device)
        mask = self.masks.of(batch)
        swap = self._sums().num_batches < HEAD_BATCHES if self.tasks else False
        _, started, entered, gradients, reached = self.gradients(batch, swap)
        with self.signals.allowed():
            masks = [self._mask_at(name, runs[0], mask) for name, runs in zip(self.spaces.names, entered, strict=True)]
            range_, null, valid = self._count(gradients, reached, started, masks)
            maps = [
                map_gradients(gradient, tokens_of_tasks(started.tasks, runs), at) if started.tasks else gradient
                for gradient, runs, at in zip(gradients, entered, masks, strict=True)
            ]
            alive = any_gradient(gradients, reached).cpu() if started.tasks else torch.zeros(0, dtype=torch.bool)
            if isinstance(self.losses, ByStep):
                self._refuse_totals(gradients, reached, started, entered)
        self._add(started, range_, null, valid, maps, reached, alive)

    def _add(
        self, started: Started, range_: Tensor, null: Tensor, valid: Tensor, maps: Any, reached: Tensor, alive: Tensor
    ) -> None:
        """All of a batch or nothing: no signal comes through here."""
        sums = self._sums()
        index = [self.tasks.index(task) for task in started.tasks]
        sums.tally.add(range_, null, valid)
        sums.gains.add(maps, index, started.losses)
        sums.heads.add(index, started.losses, started.swapped)
        sums.reached[:, index] |= reached
        sums.alive[index] |= alive
        for task in self._drawn():
            sums.drawn[task] += 1
            sums.skipped[task] += task not in started.tasks
        sums.num_batches += 1

    def _sums(self) -> Sums:
        if self.sums is None:
            self.sums = Sums(self.tasks, self.spaces.widths, len(self.options.ratios))
        return self.sums

    def _drawn(self) -> tuple[str, ...]:
        """The tasks that are looked at in the next batch: all, or as many as may be.

        They are drawn at random, in rounds in which each task has its turn: every pair meets equally often in the mean.
        """
        count, num_tasks = self.options.max_tasks, len(self.tasks)
        if num_tasks <= count:
            return self.tasks
        number = (0 if self.sums is None else self.sums.num_batches) * self.ranks.world + self.ranks.rank
        a_round, turn = divmod(number, -(-num_tasks // count))
        order = torch.randperm(num_tasks, generator=torch.Generator().manual_seed(a_round)).tolist()
        drawn = sorted(order[(turn * count + i) % num_tasks] for i in range(count))
        return tuple(self.tasks[i] for i in drawn)

    def _count(
        self, gradients: list[Tensor], reached: Tensor, started: Started, masks: list[Tensor | None]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Range and null counts (D, R, K, K) and valid ones (D, K, K) of one batch, of the tasks that reach a block."""
        num_blocks, num_ratios, num_tasks = len(masks), len(self.options.ratios), len(self.tasks)
        index = torch.tensor([self.tasks.index(task) for task in started.tasks], dtype=torch.int64)
        counts = torch.zeros(
            num_blocks, 2 * num_ratios + 1, num_tasks, num_tasks, dtype=torch.int64, device=self.device
        )
        nonfinite = torch.zeros(num_blocks, dtype=torch.int64, device=self.device)
        for d, (name, mask) in enumerate(zip(self.spaces.names, masks, strict=True)):
            some = reached[d].nonzero().flatten()
            if len(some) < 2:
                continue
            grads = gradients[d] if len(some) == len(started.tasks) else gradients[d][some.to(gradients[d].device)]
            grads = grads if mask is None else grads[:, mask]
            space = self.split[name]
            found = count_conflicts(
                grads, space.basis, space.ranks, count_zero_gradients=self.options.count_zero_gradients
            )
            rows = index[some].to(counts.device)
            counts[d][:, rows[:, None], rows] = torch.cat([found.range, found.null, found.valid[:1]])
            nonfinite[d] = found.nonfinite_pairs
        self._check_finite(nonfinite, gradients, started)
        range_, null, valid = counts.cpu().split([num_ratios, num_ratios, 1], 1)
        return range_, null, valid[:, 0]

    def _check_finite(self, nonfinite: Tensor, gradients: list[Tensor], started: Started) -> None:
        bad_blocks = nonfinite.nonzero().flatten().tolist()
        if bad_blocks:
            d = bad_blocks[-1]  # nearest to the loss, where it began
            finite = gradients[d].isfinite().flatten(1).all(1).tolist()
            bad = [task for task, fine in zip(started.tasks, finite, strict=True) if not fine]
            raise ValueError(
                f"the token gradients of task {', '.join(map(repr, bad))} at block {self.spaces.names[d]!r} hold NaN "
                "or Inf"
            )

    def _sharing(self, names: list[str], entered: list[list[Entered]]) -> list[Layout] | None:
        """Which tasks share the tokens that enter each block of an expanded backbone, in the order the blocks ran."""
        tasks = [task for run in entered[0] for task in run.layout.tasks]
        if not tasks:
            return None
        layouts = [together(tasks)]
        for name in names:
            adapter = self.inputs.blocks[name]._modules.get("dtme")
            layouts.append(layouts[-1].part(getattr(adapter, "own_tasks", {})))
        return layouts[:-1]

    def _refuse_totals(
        self, gradients: list[Tensor], reached: Tensor, started: Started, entered: list[list[Entered]]
    ) -> None:
        if len(started.tasks) < 2:
            return
        num_tasks = reached.sum(1).tolist()
        d = max(range(len(num_tasks)), key=lambda d: (num_tasks[d], d))  # near to the losses there is little rounding
        found = gradients[d]
        if len(started.tasks) < len(self.tasks):
            found = found.new_zeros(len(self.tasks), *found.shape[1:])
            found[[self.tasks.index(task) for task in started.tasks]] = gradients[d]
        precisions = {run.precision for runs in entered for run in runs}
        self.totals = self.totals or SumFinder(self.tasks)
        if total := self.totals.add(found, max(precisions, key=lambda dtype: torch.finfo(dtype).eps)):
            name, parts = total
            raise ValueError(
                f"the loss of task {name!r} is a sum of those of {', '.join(map(repr, parts))}: leave it out of what "
                "step returns, which is a loss for every task and no total"
            )

    # --- result -----------------------------------------------------------------------------------------------------

    def report(self, *, is_last: bool = True) -> ConflictReport:
        """Of all that the ranks have read so far."""
        parts, problems = self.ranks.gather(self.sums), self.losses.last_problem
        return report_of(parts, self.split, self.options.ratios, self.num_samples, problems, is_last)

    # --- kept in a file ---------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        return {
            "spaces": self.spaces.state(),
            "masked": [self.masks.num_counted, self.masks.num_masked],
            "sums": None if self.sums is None else self.sums.state(),
            "tasks": list(self.tasks),
            "problems": self.losses.last_problem,
            "totals": None if self.totals is None else self.totals.state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.spaces.load(state["spaces"], self.device)
        self.masks.num_counted, self.masks.num_masked = state["masked"]
        self.losses.tasks, self.losses.last_problem = tuple(state["tasks"]), dict(state["problems"])
        if state["sums"] is not None:
            self._sums().load(state["sums"])
        if state["totals"] is not None:
            self.totals = SumFinder(self.tasks)
            self.totals.load(state["totals"])
