"""``dtme.compare`` where something is not as it should be: what it notices, and what it says of it."""

import functools
import subprocess
import sys

import torch
import torch.nn.functional as F

from dtme.analysis.folder import function_name


def weighted(weight):
    return lambda prediction, target: weight * F.mse_loss(prediction, target)


def recursive():
    def again(count):
        return again(count - 1) if count in {"a", "b", "c"} else 0

    return again


# --- functions that a folder is told apart by -------------------------------------------------------------------------


def test_functions_that_call_or_hold_something_else_have_other_names():
    functions = [
        lambda p, t: F.mse_loss(p, t),
        lambda p, t: F.l1_loss(p, t),
        lambda p, t: [F.mse_loss(q, t) for q in p],
        lambda p, t: [F.l1_loss(q, t) for q in p],
        lambda p, t, weight=1: weight,
        lambda p, t, weight=2: weight,
        lambda p, t, *, weight=2: weight,
        weighted(1.0),
        weighted(2.0),
        weighted(torch.ones(2)),
        weighted(torch.zeros(2)),
        weighted(weighted(1.0)),
        weighted(weighted(2.0)),
        functools.partial(F.mse_loss, reduction="sum"),
        functools.partial(F.mse_loss, reduction="mean"),
        functools.partial(F.l1_loss, reduction="mean"),
        functools.partial(F.mse_loss, 1),
        recursive(),
    ]
    assert len({function_name(function) for function in functions}) == len(functions)
    assert function_name(weighted(2.0)) == function_name(weighted(2.0))


def test_the_names_are_the_same_in_every_process():
    held = weighted((recursive(), {"b", "a"}, object()))
    code = (
        "from dtme.analysis.folder import function_name;"
        "from tests.dtme.test_comparison_faults import recursive, weighted;"
        "print(function_name(weighted((recursive(), {'b', 'a'}, object()))))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == f"{function_name(held)}\n"
