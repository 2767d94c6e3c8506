"""Where do the tasks fight? Two passes over the data: the token space of every block, then the conflicts in it."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from itertools import islice
from math import isfinite
from numbers import Real
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dtme_kernels import ConflictCounts, StreamingCovariance, TokenSpace, count_conflicts, split_token_space

from .blocks import BlockError, find_blocks
from .capture import BlockInputs, Entered, Unchanged
from .gradients import any_gradient, nothing_shared, only_of, token_gradients
from .model import MultiTaskModel
from .plan import check_tasks
from .report import ConflictReport, stack_if_equal
from .streams import Layout, together
from .sums import SumFinder
from .trees import map_tensors, tensors, to_device

Step = Callable[[nn.Module, Any], Mapping[str, Tensor | float]]
"""``step(model, batch) -> {task: scalar loss}``, for models that own their loop.

A number, such as 0.0 where a batch has no label of a task, says that the task has no gradient in this batch.
"""


def analyze(
    model: nn.Module,
    loader: Iterable[Any],
    losses: Mapping[str, Callable[[Any, Any], Tensor]] | Step,
    *,
    ratio: float = 100.0,
    blocks: str | Sequence[str | nn.Module] | None = None,
    max_batches: int | None = None,
    covariance_batches: int | None = None,
    count_zero_gradients: bool = False,
    train_mode: bool = False,
    progress: bool = True,
    device: torch.device | str | None = None,
    process_group: Any = None,
) -> ConflictReport:
    """Count the tasks' token-gradient conflicts in the range and null space of every block (Eq. 1-4, Algorithm 1).

    The first pass streams the second moment of every block's input tokens; the second takes each task's gradient at
    them, rotates it into their eigenbasis and counts the pairs of tasks that pull apart, per token and space.

    Args:
        model: a ``MultiTaskModel``; with a ``step`` function, any transformer.
        loader: yields ``(x, {task: target})`` (with ``step``: whatever it takes), and can be iterated twice.
        losses: ``{task: loss(prediction, target)}`` for at least two tasks, or ``step``, which may run more than
            ``model``: whatever it calls is in the same mode meanwhile. It returns the tasks' losses and no sum of them.
        ratio: r, range energy over null energy (method.md, section 1).
        blocks: None finds them; else the attribute path of their container, names, or modules.
        max_batches: stop each pass after so many; None for all.
        covariance_batches: the same for the first pass alone; by default ``max_batches``.
        count_zero_gradients: Algorithm 1's letter: a zero gradient conflicts with everything, in the blocks that its
            task reaches.
        train_mode: run in training mode (dropout, batch statistics) instead of evaluation mode.
        progress: show two progress bars.
        device: where batches are moved; by default the model's.
        process_group: under ``torch.distributed``, whose sums and counts are reduced; every rank brings its own shard
            (``dataset[rank::world]``) and returns the same report.

    Returns:
        The report. The model and whatever else ran, buffers, modes, hooks and the random state are as before, also
        after an error or Ctrl-C.

    Raises:
        TypeError, ValueError: bad arguments; a loss that is not a finite scalar or not connected to the blocks, naming
            the task; tokens or gradients that are not finite, naming the block; a task without a gradient anywhere; no
            block that two tasks reach; a loss that is the sum of others.
    """
    _check_arguments(model, loader, losses, ratio, max_batches, covariance_batches)
    backbone = model.backbone if isinstance(model, MultiTaskModel) else model
    if device is None:
        device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    try:
        found = find_blocks(backbone, blocks)
        with Unchanged(model, train_mode) as held, _without_compiler(), torch.inference_mode(False), torch.no_grad():
            options = (ratio, count_zero_gradients, torch.device(device), process_group)
            analysis = _Analysis(model, losses, found, held, *options)
            first = max_batches if covariance_batches is None else covariance_batches
            for batch in _batches(loader, first, "token space", progress):
                analysis.add_tokens(batch)
            spaces = analysis.token_spaces()
            for batch in _batches(loader, max_batches, "conflicts", progress):
                analysis.add_gradients(batch, spaces)
            return analysis.report(spaces)
    except BlockError as error:
        error.named = blocks is not None
        raise


_NO_LABELS = "; where a batch has no labels of a task, step returns the number 0.0 for it"


class _Analysis:
    """Running sums of one analysis."""

    def __init__(
        self,
        model: Any,
        losses: Any,
        blocks: dict[str, nn.Module],
        held: Unchanged,
        ratio: float,
        zero: bool,
        device: torch.device,
        group: Any,
    ) -> None:
        self.model, self.losses, self.held, self.device = model, losses, held, device
        self.ratio, self.zero, self.group = ratio, zero, group
        functions = [*(losses.values() if isinstance(losses, Mapping) else [losses]), *_functions(model)]
        for owner in [getattr(function, "__self__", None) for function in functions]:
            if isinstance(owner, nn.Module):  # whose method is called, but not it itself
                held.hold(owner)
        self.inputs = BlockInputs(blocks)
        self.names = list(blocks)
        self.tasks: tuple[str, ...] = tuple(losses) if isinstance(losses, Mapping) else ()
        self.widths: list[int] = []
        self.moments: dict[int, StreamingCovariance] = {}
        self.counts: list[ConflictCounts | None] = [None] * len(blocks)
        self.alive: Tensor | None = None
        self.reached: Tensor | None = None
        self.sums: SumFinder | None = None
        self.distributed = dist.is_available() and dist.is_initialized()

    # --- first pass ---------------------------------------------------------------------------------------------------

    def add_tokens(self, batch: Any) -> None:
        with self.inputs.record(gradients=False) as inputs, self.held.watch():
            self._forward(to_device(batch, self.device))
        self.inputs.check(inputs)
        self.names = list(inputs)  # in the order they ran
        tokens = [torch.cat([run.by_image(num_tasks(inputs[name])) for run in inputs[name]], 1) for name in self.names]
        widths = [x.shape[-1] for x in tokens]
        if not self.moments:
            self.widths = widths
            for p in sorted(set(widths)):
                self.moments[p] = StreamingCovariance(p, widths.count(p), device=tokens[0].device)
        elif widths != self.widths:
            changed = [name for name, old, new in zip(self.names, self.widths, widths, strict=True) if old != new]
            raise BlockError(f"the width of the tokens of {', '.join(map(repr, changed))} changed between batches")
        for p, moment in self.moments.items():  # one launch for all blocks of a width
            moment.update([x for x in tokens if x.shape[-1] == p])

    def _forward(self, batch: Any) -> None:
        if isinstance(self.losses, Mapping):
            self.model.extract(self._unpack(batch)[0], self.tasks)
        else:
            self.losses(self.model, batch)

    def token_spaces(self) -> dict[str, tuple[Tensor, Tensor, int]]:
        """{block: (basis, eigenvalues, rank)}."""
        if not self.moments:
            raise ValueError("loader yielded no batch")
        spaces: dict[str, tuple[Tensor, Tensor, int]] = {}
        for p, moment in self.moments.items():
            names = [name for name, width in zip(self.names, self.widths, strict=True) if width == p]
            if self.distributed:
                moment.all_reduce_(self.group)
            finite = moment.accumulator.isfinite().flatten(1).all(1).tolist()
            if bad := [name for name, fine in zip(names, finite, strict=True) if not fine]:
                raise BlockError(f"the tokens of {', '.join(map(repr, bad))} hold NaN or Inf")
            space = split_token_space(moment.compute(), self.ratio)
            self._same_everywhere(space)
            ranks = space.rank.tolist() if isinstance(space.rank, Tensor) else [space.rank]
            spaces |= dict(zip(names, zip(space.basis, space.eigenvalues, ranks, strict=True), strict=True))
        return spaces

    def _same_everywhere(self, space: TokenSpace) -> None:
        """Eigenvectors are unique only up to sign and rounding: all ranks use the first one's."""
        if self.distributed:
            source = dist.get_global_rank(self.group, 0) if self.group else 0
            for tensor in (space.basis, space.eigenvalues, space.rank):
                assert isinstance(tensor, Tensor)  # a stack of layers has a tensor of ranks
                dist.broadcast(tensor, source, self.group)

    # --- second pass --------------------------------------------------------------------------------------------------

    def add_gradients(self, batch: Any, spaces: dict[str, tuple[Tensor, Tensor, int]]) -> None:
        batch = to_device(batch, self.device)
        with torch.enable_grad(), self.inputs.record(gradients=True) as inputs:
            with self.held.watch():
                outputs, seeds = (self._heads_first if isinstance(self.losses, Mapping) else self._step)(batch)
            self.inputs.check(inputs)
            entered = [inputs[name] for name in self.names]
            gradients, reached = token_gradients(self.tasks, entered, outputs, seeds, self._sharing(entered))
        nonfinite: list[Tensor] = []
        for d, name in enumerate(self.names):
            basis, _, rank = spaces[name]
            counts = count_conflicts(gradients[d], basis, rank, count_zero_gradients=self.zero)
            nonfinite.append(torch.as_tensor(counts.nonfinite_pairs))
            if self.zero and not reached[d].all():
                counts = only_of(reached[d], counts)
            self.counts[d] = counts if self.counts[d] is None else self.counts[d] + counts  # type: ignore[operator]
        bad_blocks = torch.stack(nonfinite).nonzero().flatten().tolist()  # the one wait for the device
        if bad_blocks:
            d = bad_blocks[-1]  # nearest to the loss, where it began
            finite = gradients[d].isfinite().flatten(1).all(1).tolist()
            bad = [task for task, fine in zip(self.tasks, finite, strict=True) if not fine]
            raise ValueError(
                f"the token gradients of task {', '.join(map(repr, bad))} at block {self.names[d]!r} hold NaN or Inf"
            )
        self.reached = reached if self.reached is None else self.reached | reached
        alive = any_gradient(gradients, reached)
        self.alive = alive if self.alive is None else self.alive | alive
        if not isinstance(self.losses, Mapping):
            self._refuse_sums(gradients, reached, inputs)

    def _sharing(self, entered: list[list[Entered]]) -> list[Layout] | None:
        """Which tasks share the tokens that enter each block of an expanded backbone, in the order the blocks ran."""
        tasks = [task for run in entered[0] for task in run.layout.tasks]
        if not tasks:
            return None
        layouts = [together(tasks)]
        for name in self.names:
            adapter = self.inputs.blocks[name]._modules.get("dtme")
            layouts.append(layouts[-1].part(getattr(adapter, "own_tasks", {})))
        return layouts[:-1]

    def _refuse_sums(self, gradients: list[Tensor], reached: Tensor, inputs: dict[str, list[Entered]]) -> None:
        num_tasks = reached.sum(1).tolist()
        d = max(range(len(num_tasks)), key=lambda d: (num_tasks[d], d))  # near to the losses there is little rounding
        precisions = {run.precision for runs in inputs.values() for run in runs}
        self.sums = self.sums or SumFinder(self.tasks)
        if found := self.sums.add(gradients[d], max(precisions, key=lambda dtype: torch.finfo(dtype).eps)):
            total, parts = found
            raise ValueError(
                f"the loss of task {total!r} is a sum of those of {', '.join(map(repr, parts))}: leave it out of what "
                "step returns, which is a loss for every task and no total"
            )

    def _heads_first(self, batch: Any) -> tuple[list[Tensor], list[list[Tensor | None]]]:
        """Every head's own graph is walked once and freed; K gradients at the features then go through the encoder.

        The graph of a decoder is every task's, and kept for the last of them.
        """
        model = self.model
        x, targets = self._unpack(batch)
        _, needed = model.tasks_for(self.tasks)
        features = model.extract(x, needed)
        leaves = list({id(leaf): leaf for leaf in tensors(features) if leaf.requires_grad}.values())
        cut = {id(leaf): leaf.detach().requires_grad_() for leaf in leaves}
        parts = map_tensors(lambda leaf: cut.get(id(leaf), leaf), features)
        predictions = model.predict(parts, self.tasks)
        values = {task: self.losses[task](predictions[task], targets[task]) for task in self.tasks}
        self._check_losses(values)
        keep = [model.decoder is not None and task != self.tasks[-1] for task in self.tasks]
        seeds: list[list[Tensor | None]] = [
            list(torch.autograd.grad(values[task], list(cut.values()), retain_graph=kept, allow_unused=True))
            for task, kept in zip(self.tasks, keep, strict=True)
        ]
        return leaves, seeds

    def _step(self, batch: Any) -> tuple[list[Tensor], list[list[Tensor | None] | None]]:
        values: Any = self.losses(self.model, batch)
        if not isinstance(values, Mapping):
            raise TypeError(f"step must return {{task: scalar loss}}, got {type(values).__name__}")
        tasks = check_tasks(list(values))
        if len(tasks) < 2:
            raise ValueError(f"step must return the losses of at least two tasks, got {list(tasks)}")
        if self.tasks and set(tasks) != set(self.tasks):
            before = f"in the first batch of {list(self.tasks)}"
            raise ValueError(f"step returned losses of {list(tasks)}, {before}{_NO_LABELS}")
        self.tasks = self.tasks or tasks
        present = [task for task in self.tasks if not _is_number(values[task])]
        self._check_losses({task: values[task] for task in present})
        if bad := [task for task in self.tasks if task not in present and not isfinite(values[task])]:
            raise ValueError(f"the loss of task {bad[0]!r} is not finite: {values[bad[0]]}")
        seeds = [
            [torch.ones_like(values[t]) if t == task else None for t in present] if task in present else None
            for task in self.tasks
        ]
        return [values[task] for task in present], seeds

    def _check_losses(self, values: Mapping[str, Tensor]) -> None:
        hint = "" if isinstance(self.losses, Mapping) else _NO_LABELS
        for task, value in values.items():
            if not isinstance(value, Tensor) or value.numel() != 1:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"the loss of task {task!r} must be a scalar tensor, got {got}{hint}")
            if not value.requires_grad:
                problem = "is not connected to the blocks: it has no gradient"
                raise ValueError(f"the loss of task {task!r} {problem}{hint}")
        finite = [value.detach().double().reshape(()) for value in values.values()]
        for task, fine in zip(values, torch.stack(finite).isfinite().tolist() if finite else (), strict=True):
            if not fine:
                raise ValueError(f"the loss of task {task!r} is not finite: {values[task].item()}")

    def _unpack(self, batch: Any) -> tuple[Any, Mapping[str, Any]]:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not isinstance(batch[1], Mapping):
            raise ValueError(f"loader must yield (x, {{task: target}}), got {type(batch).__name__}")
        if missing := [task for task in self.tasks if task not in batch[1]]:
            raise ValueError(f"loader yields no target for task {missing[0]!r}, only for {list(batch[1])}")
        return batch[0], batch[1]

    # --- result -------------------------------------------------------------------------------------------------------

    def report(self, spaces: dict[str, tuple[Tensor, Tensor, int]]) -> ConflictReport:
        if self.alive is None:
            raise ValueError("loader yielded no batch in the second pass: it must be possible to iterate it twice")
        counts = [torch.stack([getattr(c, name) for c in self.counts]) for name in ("range", "null", "valid")]
        assert self.reached is not None
        if self.distributed:
            alive, reached = self.alive.int(), self.reached.to(self.alive.device, torch.int32)
            for tensor in (*counts, alive, reached):
                dist.all_reduce(tensor, group=self.group)
            self.alive, self.reached = alive.bool(), reached.bool().cpu()
        if dead := [task for task, alive in zip(self.tasks, self.alive.tolist(), strict=True) if not alive]:
            raise ValueError(
                f"task {dead[0]!r} has no gradient anywhere: are all its labels ignored, or did step return numbers?"
            )
        if not counts[2].any():
            raise ValueError(nothing_shared(self.names, self.tasks, self.reached))
        range_counts, null_counts, valid_counts = (tensor.cpu() for tensor in counts)
        return ConflictReport(
            tasks=self.tasks,
            blocks=tuple(self.names),
            ranks=torch.tensor([spaces[name][2] for name in self.names]),
            range_counts=range_counts,
            null_counts=null_counts,
            valid_counts=valid_counts,
            eigenvalues=stack_if_equal([spaces[name][1].double().cpu() for name in self.names]),
            num_samples=next(iter(self.moments.values())).num_samples,
            ratio=float(self.ratio),
            bases=tuple(spaces[name][0].cpu() for name in self.names),
        )


def _functions(model: Any) -> list[Any]:
    """What a model calls beside its modules."""
    return [getattr(model, name, None) for name in ("features", "decoder")]


def num_tasks(runs: list[Entered]) -> int:
    """How many tasks' tokens all runs of a block hold together; 1 where the backbone is not expanded."""
    return sum(len(run.layout.tasks) for run in runs) or 1


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


@contextmanager
def _without_compiler() -> Iterator[None]:
    """Run eagerly what is compiled, in all threads: compiled code may not run the hooks that are added here."""
    with warnings.catch_warnings():
        # what torch.compile(module) says of hooks on all modules is about compiled code
        warnings.filterwarnings("ignore", "Using `torch.compile", UserWarning)
        with torch.compiler.set_stance("force_eager"):
            yield


def _batches(loader: Iterable[Any], limit: int | None, name: str, progress: bool) -> Iterator[Any]:
    if not progress or (dist.is_available() and dist.is_initialized() and dist.get_rank() != 0):
        yield from islice(loader, limit)
        return
    from tqdm.auto import tqdm

    total = len(loader) if isinstance(loader, Sized) else None
    total = limit if total is None else min(total, limit or total)
    yield from tqdm(islice(loader, limit), desc=f"{name:11}", total=total, unit="batch")


def _check_arguments(
    model: nn.Module, loader: Any, losses: Any, ratio: float, max_batches: int | None, covariance_batches: int | None
) -> None:
    if isinstance(ratio, bool) or not isinstance(ratio, Real) or not ratio > 0:  # now rather than after the first pass
        raise ValueError(f"ratio must be a positive number, got {ratio!r}")
    if isinstance(losses, Mapping):
        if not isinstance(model, MultiTaskModel):
            raise TypeError(
                f"losses by task need a MultiTaskModel, got {type(model).__name__}: give a step(model, batch) function"
            )
        if len(losses) < 2:
            raise ValueError(f"losses must name at least two tasks, got {list(losses)}")
        known = model.tasks or check_tasks(list(losses))
        if unknown := [task for task in losses if task not in known]:
            raise ValueError(f"losses name the unknown task {unknown[0]!r}; the model's tasks are {list(known)}")
        if broken := [task for task, loss in losses.items() if not callable(loss)]:
            raise TypeError(f"losses[{broken[0]!r}] must be a function, got {type(losses[broken[0]]).__name__}")
    elif not callable(losses):
        raise TypeError(f"losses must be {{task: loss}} or a function step(model, batch), got {type(losses).__name__}")
    if not isinstance(loader, Iterable):
        raise TypeError(f"loader must be iterable, got {type(loader).__name__}")
    if isinstance(loader, Iterator):
        raise ValueError(
            f"loader ({type(loader).__name__}) can be iterated once only, the analysis needs two passes: "
            "give a DataLoader or a list"
        )
    for name, value in (("max_batches", max_batches), ("covariance_batches", covariance_batches)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be None or a positive integer, got {value!r}")
