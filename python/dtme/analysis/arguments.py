"""What an analysis is asked for: checked before anything runs."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import nn

from ..model import MultiTaskModel
from ..plan import check_tasks
from ..stability import rules_of

METHODS = ("joint", "streamed")


def check_model(model: nn.Module, losses: Any) -> None:
    """TypeError, ValueError: no step function, and not the losses of a model's tasks either."""
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


def check_loader(loader: Any) -> None:
    if not isinstance(loader, Iterable):
        raise TypeError(f"loader must be iterable, got {type(loader).__name__}")
    if isinstance(loader, Iterator):
        raise ValueError(
            f"loader ({type(loader).__name__}) can be iterated once only, the analysis needs two passes: "
            "give a DataLoader or a list"
        )


def check_counts(**counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be None or a positive integer, got {value!r}")


def check_max_tasks(max_tasks: int) -> None:
    if isinstance(max_tasks, bool) or not isinstance(max_tasks, int) or max_tasks < 2:
        raise ValueError(f"max_tasks must be an integer of at least 2, got {max_tasks!r}")


def ratios_of(ratio: float | Sequence[float]) -> tuple[float, ...]:
    """One or several, the one of the report first."""
    ratios = tuple(ratio) if isinstance(ratio, Sequence) and not isinstance(ratio, str) else (ratio,)
    for one in ratios:
        if isinstance(one, bool) or not isinstance(one, Real) or not one > 0:
            raise ValueError(f"ratio must be a positive number, or several, got {ratio!r}")
    if not ratios or len(set(ratios)) != len(ratios):
        raise ValueError(f"ratio must be one or more different numbers, got {ratio!r}")
    return tuple(float(one) for one in ratios)


def check_settle(settle: float | None, plan_options: Mapping[str, Any] | None) -> None:
    if settle is not None and (isinstance(settle, bool) or not isinstance(settle, Real) or not 0.5 < settle < 1):
        raise ValueError(f"settle must be None or a confidence in (0.5, 1), got {settle!r}")
    if plan_options is not None and not isinstance(plan_options, Mapping):
        raise TypeError(f"plan_options must map options of report.plan() to values, got {plan_options!r}")
    if plan_options is not None and settle is None:
        raise ValueError("plan_options say which plan is to settle: give settle= too")
    rules_of(plan_options or {})


def check_method(method: str, autocast: Any, folder: Any) -> None:
    if method not in METHODS:
        raise ValueError(f"method must be one of {list(METHODS)}, got {method!r}")
    if autocast is not None and autocast not in (torch.bfloat16, torch.float16):
        raise ValueError(f"autocast must be None, torch.bfloat16 or torch.float16, got {autocast!r}")
    if folder is not None and not isinstance(folder, (str, os.PathLike)):
        raise TypeError(f"folder must be None or a path, got {type(folder).__name__}")
