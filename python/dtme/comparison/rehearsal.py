"""Whether everything that a comparison was given works together, before any of it is trained."""

import copy
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..analysis.folder import checksum, function_name, model_name
from ..analysis.loop import length_of
from ..model import MultiTaskModel
from ..plan import ExpansionPlan
from ..streams import is_expanded
from ..trees import leaves, to_device
from .arms import JOINT, Setting, build
from .batches import Summed, check_repeats, repeated
from .loop import MOST_READ, Problem, device_of, read_conflicts
from .metrics import evaluate
from .options import TUNING_SEED, Options
from .training import Diverged, losses_of, optimizer_of

LEAST_READ = 2
"""Batches that gains take."""


def rehearse(problem: Problem, options: Options, model: MultiTaskModel) -> None:
    """Build every arm of ``model`` once, take a step with it, and evaluate the plain one; nothing is kept.

    Raises:
        TypeError, ValueError: something is not what it has to be; the message names it.
    """
    device = device_of(model)
    for name, loader in problem.loaders.items():
        check_repeats(loader, name, TUNING_SEED)
    batches = _until_all_tasks(problem, options)
    _check_losses(problem, model, to_device(batches[-1], device))
    for split in problem.loaders.keys() - {"train"}:
        _check_batch(_first(problem.loaders[split], split), split, problem)
        try:
            evaluate(model, repeated(problem.loaders[split], TUNING_SEED), problem.metrics, device)
        except Diverged as error:
            raise ValueError(f"before any training, {error} (loaders[{split!r}])") from error
    setting = None
    if any(arm != JOINT for arm in problem.arms):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a few batches and untrained heads, there would be much to say
            report = read_conflicts(model, problem, options, TUNING_SEED, device, len(batches))
        setting = Setting(report, options, TUNING_SEED)
        if not setting.reference.blocks:
            raise ValueError("the conflict plan changes no block of this model, so that there is nothing to compare")
    for arm, own in problem.arms.items():
        built = build(arm, own, copy.deepcopy(model), setting).model.to(device).train()
        optimizer_of(built, options.rates[0], options.weight_decay)
        try:
            losses = losses_of(built, to_device(batches[-1], device), problem.losses, 0)
            if losses:
                torch.stack([loss.reshape(()) for loss in losses.values()]).sum().backward()
        except Diverged as error:
            raise ValueError(f"before any training, {error} (arm {arm!r})") from error


def _check_losses(problem: Problem, model: MultiTaskModel, batch: Any) -> None:
    """ValueError naming a task whose loss is a module that changes its own state in one call."""
    names = {task: model_name(loss) for task, loss in problem.losses.items() if isinstance(loss, torch.nn.Module)}
    if not names:
        return
    try:
        losses_of(copy.deepcopy(model).train(), batch, problem.losses, 0)
    except Diverged as error:
        raise ValueError(f"before any training, {error}") from error
    for task, name in names.items():
        if model_name(problem.losses[task]) != name:  # type: ignore[arg-type]  # it is a module
            raise ValueError(
                f"losses[{task!r}] changes its own state when it is called, such as a running mean, which would carry "
                "over from arm to arm, so that they could not be compared in pairs: give a loss without such state"
            )


def check_model(problem: Problem) -> MultiTaskModel:
    """A model of ``make_model``, if it makes a new one each time, and the same one of the same seed.

    Raises:
        TypeError, ValueError: it does not; it makes something else, or for other tasks than there are losses of.
    """
    model, _ = problem.model(TUNING_SEED)
    if not isinstance(model, MultiTaskModel):
        raise TypeError(f"make_model must return a MultiTaskModel, got {type(model).__name__}")
    if is_expanded(model):
        raise ValueError("make_model must return a model that is not expanded: the arms expand it")
    if set(model.tasks) != set(problem.losses):
        raise ValueError(
            f"losses must be of the model's tasks {list(model.tasks)}, and they are of {list(problem.losses)}"
        )
    again, _ = problem.model(TUNING_SEED)
    known = {id(parameter) for parameter in model.parameters()}
    if shared := [name for name, parameter in again.named_parameters() if id(parameter) in known]:
        raise ValueError(
            f"make_model must make its model anew in each call, but {shared[0]!r} is the parameter that it returned "
            "before, which would go on training from run to run: build or copy the backbone and the heads inside of it"
        )
    state = again.state_dict()
    for name, value in model.state_dict().items():
        if checksum([value]) != checksum([state.get(name)]):
            raise ValueError(
                f"make_model must make the same model of the same seed, but {name!r} differs between two calls: draw "
                "its random numbers from torch's, NumPy's or Python's global generator, or by the seed"
            )
    return model


def settings_of(problem: Problem, options: Options, model: MultiTaskModel) -> dict[str, Any]:
    """What must be the same for a folder to be gone on with: all that decides a run, but for the seeds."""
    loaders: Mapping[str, Iterable[Any]] = problem.loaders
    numbers = ("budget", "share", "weight_decay", "num_tokens", "modulation", "expansion", "read")
    own = {name: arm for name, arm in problem.arms.items() if arm is not None}
    return {
        "tasks": list(problem.losses),
        **{name: getattr(options, name) for name in numbers},
        "lr": list(options.rates),
        "model": f"{model_name(model)} {_layout(model):08x}",
        "losses": {task: function_name(loss) for task, loss in problem.losses.items()},
        "metrics": {task: [function_name(m.given), m.direction] for task, m in problem.metrics.items()},
        "data": {name: [length_of(loader), _data_checksum(loader, name)] for name, loader in loaders.items()},
        "own arms": {
            name: arm.as_dict() if isinstance(arm, ExpansionPlan) else function_name(arm) for name, arm in own.items()
        },
    }


def _layout(model: torch.nn.Module) -> int:
    """A checksum of how the model is written, which tells rates of dropout and other options apart."""
    return checksum([re.sub(r"0x[0-9a-f]+", "", repr(model))])  # an address is another one in every process


def _data_checksum(loader: Iterable[Any], name: str) -> int:
    """Of all batches that are held out; of the training data the first, as the others are checked while they train."""
    if name == "train":
        return checksum(leaves(_first(loader, name)))
    held_out = Summed(repeated(loader, TUNING_SEED))
    if not sum(1 for _ in held_out):
        raise _empty(name)
    return held_out.checksum


def _first(loader: Iterable[Any], name: str) -> Any:
    for batch in repeated(loader, TUNING_SEED):
        return batch
    raise _empty(name)


def _empty(name: str) -> ValueError:
    return ValueError(f"loaders[{name!r}] yields no batches")


def _check_batch(batch: Any, name: str, problem: Problem) -> None:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not isinstance(batch[1], Mapping):
        raise ValueError(f"loaders[{name!r}] must yield pairs (x, {{task: target}}), got {type(batch).__name__}")
    if not any(task in batch[1] for task in problem.losses):
        raise ValueError(
            f"loaders[{name!r}] yields targets of {list(batch[1])}, none of which is one of the tasks "
            f"{list(problem.losses)}"
        )


def _until_all_tasks(problem: Problem, options: Options) -> list[Any]:
    """The first training batches of an analysis, until every task had a target; two where there are two."""
    missing, batches = set(problem.losses), []
    for batch in repeated(problem.loaders["train"], TUNING_SEED):
        _check_batch(batch, "train", problem)
        batches.append(batch)
        missing -= {task for task in batch[1] if batch[1][task] is not None}
        if (not missing and len(batches) >= LEAST_READ) or len(batches) == (options.read or MOST_READ):
            break
    if not missing:
        return batches
    if not batches:
        raise _empty("train")
    raise ValueError(
        f"loaders['train'] has no target of task {min(missing)!r} in its first {len(batches)} batches, which an "
        "analysis reads: check the names of the targets, or read more"
    )
