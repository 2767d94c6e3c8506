"""Where do the tasks fight? Two passes over the data: the token space of every block, then the conflicts in it."""

import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import BlockError, find_blocks
from ..interrupts import Deferred
from ..ranks import Ranks
from ..report import ConflictReport
from ..resampling import MIN_UNITS
from ..sharded import is_sharded, whole_copy
from ..stability import agreement
from ..wrappers import backbone_of
from .arguments import (
    check_counts,
    check_loader,
    check_max_tasks,
    check_method,
    check_model,
    check_settle,
    ratios_of,
)
from .capture import Unchanged
from .folder import Folder, function_name, model_name
from .loop import Pass, length_of
from .losses import Step
from .masks import TokenMask
from .passes import Analysis, Options

__all__ = ["analyze"]


def analyze(
    model: nn.Module,
    loader: Iterable[Any],
    losses: Mapping[str, Callable[[Any, Any], Tensor]] | Step,
    *,
    ratio: float | Sequence[float] = 100.0,
    blocks: str | Sequence[str | nn.Module] | None = None,
    max_batches: int | None = None,
    covariance_batches: int | None = None,
    settle: float | None = None,
    plan_options: Mapping[str, Any] | None = None,
    token_mask: TokenMask | None = None,
    max_tasks: int = 64,
    count_zero_gradients: bool = False,
    train_mode: bool = False,
    autocast: torch.dtype | None = None,
    method: str = "joint",
    folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
    device: torch.device | str | None = None,
    process_group: Any = None,
) -> ConflictReport:
    """Count the tasks' token-gradient conflicts in the range and null space of every block (Eq. 1-4, Algorithm 1).

    The first pass streams the second moment of every block's input tokens; the second takes each task's gradient at
    them, rotates it into their eigenbasis and counts the pairs of tasks that pull apart, per token and space.

    Train the heads first: rates of untrained heads repeat from sample to sample, and are other ones with the next draw
    of heads. ``ConflictReport.label_gains`` tells such heads by their losses. An expanded model is analysed in its
    tasks' own streams: each task's gradients at the tokens that it has there, which enter the block before its
    modulation, and the mean of the tasks' second moments.

    Args:
        model: a ``MultiTaskModel``; with a ``step`` function, any transformer.
        loader: yields ``(x, {task: target})`` (with ``step``: whatever it takes), and can be iterated twice. A batch
            may lack targets of some tasks (no such key, or None), or hold only labels of theirs that are ignored: these
            tasks are then left out of it, which the report counts in ``skipped``.
        losses: ``{task: loss(prediction, target)}`` for at least two tasks, or ``step``, which may run more than
            ``model``: whatever it calls is in the same mode meanwhile. It returns the tasks' losses and no sum of them.
            In the first 32 batches each loss of a mapping is called once more, without gradients, with the labels of
            other images (``report.label_gains()``); one that keeps a state of its own, which is no buffer, sees them.
        ratio: r, range energy over null energy (Eq. 3). Of several, the first is that of the report, and
            ``report.at(r)`` is the report at another; one rotation serves all.
        blocks: None finds them; else the attribute path of their container, names, or modules. Blocks may take
            (B, N, p), (B, H, W, p) or maps (B, p, H, W).
        max_batches: stop each pass after so many; None for all.
        covariance_batches: the same for the first pass alone; by default ``max_batches``.
        settle: a confidence in (0.5, 1): end each pass as soon as the plan would, at that confidence, not change. It is
            looked at when 8, 16, 32, ... batches have been read and at the end, by resampling them, each look getting
            an equal share of the error (half of what is left, where the loader has no length). The first pass ends
            when, at a doubling, both halves of what was read have the same rank, to 1 % of the channels, and the range
            basis of the first keeps within 1 % as much of the second. Give a shuffled loader: batches are taken as
            they come. ``report.settled`` says whether the plan was; the first pass may have read all, unsettled.
        plan_options: of ``report.plan``, the plan that is to settle.
        token_mask: ``token_mask(batch) -> (B, N)`` bool, the tokens that count, those that pad a sentence not among
            them; of what the loader yields, on the device. None takes a mapping input's 2-D ``attention_mask``.
        max_tasks: of more tasks than these, each batch counts so many, drawn at random: a backward pass each.
        count_zero_gradients: Algorithm 1's letter: a zero gradient conflicts with everything, in the blocks that its
            task reaches.
        train_mode: run in training mode (dropout, batch statistics) instead of evaluation mode.
        autocast: ``torch.bfloat16`` or ``torch.float16``: run the model in it; counting stays in float32.
        method: ``"joint"``, or ``"streamed"``: keep the graph of one block at a time, for memory, at the price of one
            more forward of every block per task.
        folder: write the sums there every minute. The same call, after it was killed, goes on from them and ends in
            the same numbers. A loader that shuffles begins with the random state that it had (torch's, NumPy's,
            Python's and its own ``generator``); where it yields other batches than those added, that is an error.
        progress: show two progress bars.
        device: where batches are moved; by default the model's.
        process_group: under ``torch.distributed``, whose sums and counts are reduced; every rank calls this with its
            own shard (``dataset[rank::world]``, uneven ones too) and returns the same report; a
            ``DistributedSampler`` repeats images where they do not divide evenly, which then count twice. What stops
            one rank stops all. Of a model that FSDP2 shards, each rank analyses a copy of the whole.

    Returns:
        The report. The model and whatever else ran, buffers, modes, hooks and the random state are as before, also
        after an error, Ctrl-C or another signal, at whatever moment.

    Raises:
        TypeError, ValueError: bad arguments; a loss that is not a finite scalar or not connected to the blocks, naming
            the task; tokens or gradients that are not finite, naming the block; a task without a gradient anywhere; no
            block that two tasks reach; a loss that is the sum of others; a folder of another analysis.
        RuntimeError: another rank failed; the message has its number and the cause.
    """
    with Deferred() as signals:
        ranks = Ranks(process_group, signals)
        try:
            with ranks.together():
                ratios = ratios_of(ratio)
                check_model(model, losses)
                check_loader(loader)
                check_counts(max_batches=max_batches, covariance_batches=covariance_batches)
                check_max_tasks(max_tasks)
                check_settle(settle, plan_options)
                check_method(method, autocast, folder)
                backbone = backbone_of(model)
                found = find_blocks(backbone, blocks)
            ranks.same({"the names of the blocks": list(found)})
            if is_sharded(model):
                model, found = _whole(model, found)
            streamed = method == "streamed"
            options = Options(
                ratios,
                count_zero_gradients,
                train_mode,
                token_mask,
                autocast,
                streamed,
                max_tasks,
                settle,
                plan_options or {},
            )
            first = max_batches if covariance_batches is None else covariance_batches
            asked = {name: str(value) for name, value in options._asdict().items() if name != "token_mask"}
            ranks.same(asked | {"max_batches": max_batches, "whether there is a folder": folder is not None})
            with prepared(model, losses, found, options, ranks, device) as analysis:
                return _run(analysis, loader, (first, max_batches), folder, progress)
        except BlockError as error:
            error.named = blocks is not None
            raise


def _whole(model: nn.Module, blocks: Mapping[str, nn.Module]) -> tuple[nn.Module, dict[str, nn.Module]]:
    """A copy of a sharded model that each process runs by itself, and its blocks: shards of data may be uneven."""
    whole = whole_copy(model, "analyze")
    backbone = backbone_of(whole)
    return whole, {name: backbone.get_submodule(name) for name in blocks}


@contextmanager
def prepared(
    model: nn.Module,
    losses: Any,
    blocks: dict[str, nn.Module],
    options: Options,
    ranks: Ranks,
    device: torch.device | str | None = None,
) -> Iterator[Analysis]:
    """An analysis of a model that is held still meanwhile: frozen, in one mode, uncompiled, without gradients."""
    at = torch.device(device or next((tensor.device for tensor in model.parameters()), torch.device("cpu")))
    held = Unchanged(model, options.train_mode)
    with held, _without_compiler(), torch.inference_mode(False), torch.no_grad():
        with ranks.together():
            analysis = Analysis(model, losses, blocks, held, options, at, ranks)
        yield analysis


def _run(
    analysis: Analysis,
    loader: Iterable[Any],
    limits: tuple[int | None, int | None],
    path: str | os.PathLike[str] | None,
    progress: bool,
) -> ConflictReport:
    ranks, options = analysis.ranks, analysis.options
    with ranks.together():
        folder = Folder(path, _fingerprint(analysis, loader, limits) if path is not None else {}, ranks)
    saved = _read(analysis, folder)
    may_settle = options.settle is not None
    look_at_spaces = _look_at_spaces(analysis) if may_settle else None
    spaces = Pass(0, analysis, folder, analysis.add_tokens, look_at_spaces, limits[0], progress)
    if saved is None or saved["pass"] == 0:
        spaces.run(loader, saved)
        with ranks.together():
            analysis.end_first_pass()
            spaces.write(over=True)
    analysis.check_masks()
    analysis.split_spaces()
    _say_what_pairs_cost(analysis)
    horizon = _horizon(analysis, loader, limits[1]) if may_settle else None
    look_at_plan = _look_at_plan(analysis, horizon) if may_settle else None
    conflicts = Pass(1, analysis, folder, analysis.add_gradients, look_at_plan, limits[1], progress)
    conflicts.run(loader, saved if saved is not None and saved["pass"] == 1 else None)
    report = analysis.report()
    if options.settle is not None and not conflicts.settled:
        share = _agreement(analysis, report)
        conflicts.settled = share >= _wanted(options.settle, conflicts.rounds * ranks.world, horizon)
    with ranks.together():
        conflicts.write(over=True)
    if options.settle is None:
        return report
    return replace(report, settled=conflicts.settled, plan_options=dict(options.plan_options))


def _read(analysis: Analysis, folder: Folder) -> dict[str, Any] | None:
    """The last sums that every rank has in the folder; the analysis goes on from them."""
    ranks = analysis.ranks
    names = [{file.name.removeprefix(folder.prefix) for file in folder.files()}]
    common = set.intersection(*[some[0] for some in ranks.gather(names)])
    if not common:
        return None
    with ranks.together():
        saved = folder.read(max(common))
        analysis.load(saved["state"])
    analysis.spaces.prepare()
    return saved


def _look_at_spaces(analysis: Analysis) -> Callable[[int], tuple[bool, str]]:
    def look(rounds: int) -> tuple[bool, str]:
        with analysis.ranks.together():
            analysis.end_first_pass()  # one that has no batch at all
        settled = analysis.spaces.look()
        unsettled = analysis.spaces.unsettled
        return settled, f"the space of {len(unsettled)} of {len(analysis.spaces.names)} blocks still moves"

    return look


def _look_at_plan(analysis: Analysis, horizon: int | None) -> Callable[[int], tuple[bool, str]]:
    def look(rounds: int) -> tuple[bool, str]:
        batches = rounds * analysis.ranks.world
        if batches < MIN_UNITS:
            return False, ""
        share = _agreement(analysis, analysis.report(is_last=False))
        assert analysis.options.settle is not None
        wanted = _wanted(analysis.options.settle, batches, horizon)
        return share >= wanted, f"the plan holds in {share:.1%} of resamples, {wanted:.1%} are needed"

    return look


def _agreement(analysis: Analysis, report: ConflictReport) -> float:
    """The share of resamples that keep the plan: the first rank's, so that all decide the same."""
    with analysis.ranks.together(), analysis.signals.allowed():
        share = agreement(report, **analysis.options.plan_options) if report.shared_blocks else math.nan
    return analysis.ranks.gather(share)[0]


def _horizon(analysis: Analysis, loader: Iterable[Any], limit: int | None) -> int | None:
    """The most batches that all ranks together can read, the same on all; None where a loader has no length."""
    with analysis.ranks.together():
        length = length_of(loader)
    own = limit if length is None else min(length, limit or length)
    found = analysis.ranks.gather(own)
    return None if None in found else max(found) * analysis.ranks.world


def _wanted(settle: float, batches: int, horizon: int | None) -> float:
    """In which share of the resamples the plan has to hold at one of the looks, so that all may err as often as one.

    Every look, at 8, 16, 32, ... batches and at the end, gets an equal share of the error; where the end is not known,
    the first gets a half, the next a quarter, then an eighth ...
    """
    error = 1 - settle
    if horizon is not None and batches <= horizon:
        return 1 - error / _number_of_looks(horizon)
    return 1 - error / 2 ** _number_of_looks(batches)


def _number_of_looks(batches: int) -> int:
    """Up to so many batches, the last look being at the end, whether it is at a doubling or not."""
    return max(0, (batches - 1) // MIN_UNITS).bit_length() + 1


def _say_what_pairs_cost(analysis: Analysis) -> None:
    count, most = len(analysis.tasks), analysis.options.max_tasks
    if count > most:
        warnings.warn(
            f"{count} tasks have {count * (count - 1) // 2:,} pairs: each batch counts the {most * (most - 1) // 2:,} "
            f"of {most} tasks drawn at random, by {most} backward passes. max_tasks={count} counts all, by {count}",
            stacklevel=3,
        )


def _fingerprint(analysis: Analysis, loader: Iterable[Any], limits: Sequence[int | None]) -> dict[str, Any]:
    """What a folder's sums must be of to be gone on from."""
    options = analysis.options
    return {
        "model": model_name(analysis.model),
        "losses": analysis.losses.names(),
        "blocks": list(analysis.inputs.blocks),
        "tasks": list(analysis.tasks),
        "ratio": list(options.ratios),
        "max_batches": list(limits),
        "batches in the loader": length_of(loader),
        "count_zero_gradients": options.count_zero_gradients,
        "train_mode": options.train_mode,
        "token_mask": function_name(options.token_mask),
        "autocast": str(options.autocast),
        "method": "streamed" if options.streamed else "joint",
        "max_tasks": options.max_tasks,
        "settle": options.settle,
        "plan_options": repr(sorted(options.plan_options.items())),
    }


@contextmanager
def _without_compiler() -> Iterator[None]:
    """Run eagerly what is compiled, in all threads: compiled code may not run the hooks that are added here."""
    with warnings.catch_warnings():
        # what torch.compile(module) says of hooks on all modules is about compiled code
        warnings.filterwarnings("ignore", "Using `torch.compile", UserWarning)
        with torch.compiler.set_stance("force_eager"):
            yield
