"""Whether a plan is worth its cost on the tasks at hand, over paired seeds."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..model import MultiTaskModel
from ..randomness import random_state, wind_back
from .arms import OwnArm, is_random
from .loop import Loop, Problem, tuned
from .options import Options, arms_of, check_loaders, check_losses_and_metrics, rates_of, seeds_of
from .rehearsal import check_model, rehearse, settings_of
from .result import Comparison, Cost
from .statistics import distributions
from .store import Folder, Memory, Run
from .verdict import MARGIN

__all__ = ["Comparison", "compare"]


def compare(
    make_model: Callable[[int], MultiTaskModel],
    loaders: Mapping[str, Iterable[Any]],
    losses: Mapping[str, Callable[[Any, Any], Tensor]],
    metrics: Mapping[str, tuple[Any, str]],
    *,
    arms: Sequence[str | Mapping[str, OwnArm]] = ("joint", "longer", "conflict", "random", "last"),
    seeds: int | Sequence[int] = 5,
    budget: int = 600,
    share: float = 0.25,
    lr: float | Sequence[float] = 1e-3,
    weight_decay: float = 1e-6,
    num_tokens: int = 6,
    modulation: float = 0.5,
    expansion: float = 0.5,
    read: int | None = None,
    margin: float = MARGIN,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
    device: torch.device | str | None = None,
) -> Comparison:
    """Find out on your own tasks whether expanding by conflict pays, over paired seeds.

    For each seed the model first trains jointly, for ``share`` of the steps. Then its conflicts are read, and every arm
    goes on from there: with the same weights and moments of the optimizer, the same batches in the same order, and the
    same random numbers. So what differs between two arms of a seed is what they are. Adam; the sum of the losses; the
    learning rate falls to zero by a polynomial of power 0.9. The state after the last step is what is scored.

    The arms:

    - ``"joint"``: joint training on, which the others are measured against, and which must be among them.
    - ``"longer"``: joint training for so many steps more that its compute is that of the conflict plan, counted in
      passes through the plain model's blocks (``plan.compute()``).
    - ``"conflict"``: the plan of ``report.plan``; ``"gain"``, ``"pairs"``, ``"reverse"``: its other strategies.
    - ``"random"``, or ``"random-1"``, ``"random-2"``, ... (``"random*4"`` for four of them): plans of as many blocks,
      drawn anew for every seed; ``"first"``, ``"last"``: as many at one end; ``"all"``: all blocks.
    - ``"shared"``: the blocks of the conflict plan with one set of modules for all tasks.
    - ``"lora"``, ``"bitfit"``, ``"norm-affine"``, ``"prompts"``: the adapters of ``dtme.rivals``, with as many
      parameters of the tasks' own as the conflict plan adds.
    - a mapping ``{name: arm}`` of arms of your own: a plan, or a function ``(model, report, seed)`` that returns a plan
      or a model, which may be the given one, changed in place.

    Args:
        make_model: ``make_model(seed)`` makes a new ``MultiTaskModel``, pretrained or not; the seed draws its heads.
            Random numbers begin at the seed before it is called.
        loaders: ``{"train": loader, "val": loader}`` of ``(x, {task: target})``, each of which can be iterated again
            and again; ``"tune"`` too where there are several learning rates. Torch's, NumPy's and Python's random
            numbers begin at a seed before each iteration, so that ``DataLoader(shuffle=True)`` repeats. A batch may
            lack targets of some tasks.
        losses: ``{task: loss(prediction, target)}``, each a scalar, for at least two tasks.
        metrics: ``{task: (metric, "higher" | "lower")}``, which is better. The metric is either a function of all
            predictions and all targets of ``"val"``, concatenated on the CPU, that gives a number; or a meter with
            ``update(prediction, target)`` and ``compute()``, as torchmetrics has them; or what makes such a meter
            without arguments: a class, a ``functools.partial`` of one, or a function. A metric has to be above zero for
            Δm to be relative to it.
        arms: names, and mappings of arms of your own.
        seeds: how many, counted from 0, or the seeds themselves. Seeds can be added later, with ``folder``.
        budget: steps of optimisation per run, the joint ones among them.
        share: of the steps that are joint, in [0, 1).
        lr: the learning rate, or several. Of several, every arm, joint training too, tries all on one seed apart from
            the compared ones and keeps that with the best Δm on ``loaders["tune"]``.
        weight_decay: of Adam; what is added is not decayed.
        num_tokens, modulation, expansion: of the plans, as in ``report.plan``.
        read: batches that an analysis reads; None for all of the training loader, at most 64.
        margin: points of Δm below which a difference does not matter to you: an interval within ± this is "no
            difference".
        folder: keeps every run that is finished. The same call, after Ctrl-C or a kill, goes on with those that are
            missing; with more seeds or arms, those are added.
        progress: show a progress bar.
        device: where the model is moved; by default it stays where ``make_model`` puts it.

    Returns:
        the comparison; print it. Random numbers are as before.

    Raises:
        ImportError: scipy is not installed: ``pip install "dtme-kernels[compare]"``.
        TypeError, ValueError: an argument is not what it has to be, which is found before anything is trained or
            written; a loader does not repeat its batches, a metric changes them in place or a loss that is a module
            changes its own state, so that nothing is paired; joint training, or an arm, diverges at all of several
            learning rates; the folder holds another comparison, and the message says what differs.
    """
    distributions()
    options = Options(
        seeds_of(seeds), budget, share, rates_of(lr), weight_decay, num_tokens, modulation, expansion, read, margin
    )
    own = arms_of(arms)
    check_loaders(loaders, len(options.rates) > 1)
    checked = check_losses_and_metrics(losses, metrics)
    if not callable(make_model):
        raise TypeError(f"make_model must be a function of a seed, got {type(make_model).__name__}")
    if folder is not None and not isinstance(folder, (str, os.PathLike)):
        raise TypeError(f"folder must be None or a path, got {type(folder).__name__}")
    place = None if device is None else torch.device(device)
    problem = Problem(make_model, loaders, losses, checked, own, place)
    store = Memory() if folder is None else Folder(folder)
    state = random_state()
    try:
        return _compare(problem, options, store, progress)
    finally:
        wind_back(state)


def _compare(problem: Problem, options: Options, store: Memory, progress: bool) -> Comparison:
    model = check_model(problem)
    settings = settings_of(problem, options, model)
    loop = Loop(problem, options, store)
    store.check(settings)
    if missing := loop.missing(options.seeds):
        rehearse(problem, options, model)
    store.open(settings)
    tuning: dict[str, dict[float, float | None]] = {}
    loop.bar = _bar(problem, options, len(missing)) if progress and missing else None
    try:
        rates = dict.fromkeys(problem.arms, options.rates[0])
        if len(options.rates) > 1:
            rates, tuning = tuned(loop, options.rates)
        runs = loop.run(rates)
    finally:
        if loop.bar is not None:
            loop.bar.close()
    return _result(problem, options, runs, rates, tuning)


def _bar(problem: Problem, options: Options, missing: int) -> Any:
    """Over steps, as many as are known before: tuning, longer trainings and what was kept change them a little."""
    from tqdm.auto import tqdm

    arms, tries = len(problem.arms), len(options.rates) if len(options.rates) > 1 else 0
    joint = options.start * -(-missing // arms)
    return tqdm(total=joint + (missing + tries * arms) * (options.budget - options.start), unit="step")


def _result(
    problem: Problem,
    options: Options,
    runs: Mapping[str, tuple[Run, ...]],
    rates: Mapping[str, float],
    tuning: Mapping[str, Mapping[float, float | None]],
) -> Comparison:
    nan = float("nan")
    return Comparison(
        tasks={task: metric.direction for task, metric in problem.metrics.items()},
        arms=tuple(problem.arms),
        seeds=options.seeds,
        metrics={
            arm: {
                task: tuple(nan if run.metrics is None else run.metrics[task] for run in those)
                for task in problem.metrics
            }
            for arm, those in runs.items()
        },
        costs={
            arm: tuple(
                Cost(run.added, nan if run.compute is None else run.compute, run.steps, run.seconds) for run in those
            )
            for arm, those in runs.items()
        },
        plans={
            arm: tuple(run.plan for run in those)
            for arm, those in runs.items()
            if any(run.plan is not None for run in those)
        },
        budget=options.budget,
        start=options.start,
        margin=options.margin,
        rates=dict(rates),
        tuning=tuning,
        diverged={
            arm: reasons
            for arm, those in runs.items()
            if (reasons := {run.seed: run.diverged for run in those if run.diverged is not None})
        },
        notes=tuple(_notes(runs, options)),
    )


def _notes(runs: Mapping[str, tuple[Run, ...]], options: Options) -> list[str]:
    """What runs say of themselves, and seeds whose arms did not begin at the same weights."""
    said = dict.fromkeys(run.note for those in runs.values() for run in those if run.note is not None)
    notes = [f"note: {note}" for note in said]
    for i, seed in enumerate(options.seeds):
        if len({those[i].start for those in runs.values() if those[i].start}) > 1:
            notes.append(
                f"warning: the arms of seed {seed} did not begin at the same weights, because the joint part was "
                "trained again and came out differently: delete its runs, or the folder"
            )
    return notes + _same_seeds(runs, options)


def _same_seeds(runs: Mapping[str, tuple[Run, ...]], options: Options) -> list[str]:
    """A warning for every seed whose runs are those of one before it, but for plans that are drawn by the seed."""
    told, notes = [those for arm, those in runs.items() if not is_random(arm)], []
    for i, seed in enumerate(options.seeds):
        for j in range(i):
            if all(
                those[i].metrics is not None
                and (those[i].start, those[i].metrics) == (those[j].start, those[j].metrics)
                for those in told
            ):
                notes.append(
                    f"warning: seeds {options.seeds[j]} and {seed} are the same run: make_model ignores its seed, and "
                    "the training loader does not shuffle, so that an interval over seeds means nothing. Draw the "
                    "heads by the seed"
                )
                break
    return notes
