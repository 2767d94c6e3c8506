"""``dtme.compare`` where something is not as it should be: what it notices, and what it says of it."""

import copy
import functools
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import dtme
from dtme.analysis.folder import function_name
from dtme.comparison.loop import Loop
from dtme.comparison.metrics import Metric, evaluate
from dtme.comparison.store import Folder
from dtme.comparison.training import Diverged, moments_of, take_up
from dtme.rivals.versions import with_copies
from tests.dtme.comparing import LOSSES, METRICS, VAL, WIDTH, Backbone, compared, loaders, make_model

CPU = torch.device("cpu")


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


# --- what a folder holds ----------------------------------------------------------------------------------------------


def unchanged(model, report, seed):
    return model


def zeroed(model, report, seed):
    return model.apply(lambda module: [p.data.zero_() for p in module.parameters(recurse=False)])


def run(arms=("joint",), **options):
    return compared(**{"arms": arms, "seeds": 1, "budget": 4, "share": 0.5, **options})


def test_a_folder_refuses_other_functions_held_out_data_and_models(tmp_path):
    run(folder=tmp_path)
    run(("joint", {"mine": unchanged}), folder=tmp_path)
    run(folder=tmp_path)  # an arm that is not among those of a call is remembered
    later = [(x, {task: target + (i == 12) for task, target in targets.items()}) for i, (x, targets) in enumerate(VAL)]

    def other_dropout(seed):
        return dtme.MultiTaskModel(Backbone(dropout=0.2), {"sum": nn.Linear(WIDTH, 1), "sign": nn.Linear(WIDTH, 1)})

    for options, said in (
        ({"arms": ("joint", {"mine": zeroed})}, "another arm 'mine'"),
        ({"losses": {**LOSSES, "sum": weighted(2.0)}}, "another losses"),
        ({"loaders": loaders(val=DataLoader(later, batch_size=8))}, "another data"),
        ({"make_model": other_dropout}, "another model"),
    ):
        with pytest.raises(ValueError, match=said):
            run(folder=tmp_path, **options)


def test_a_kept_report_keeps_its_seconds(tmp_path, monkeypatch):
    asked = []
    keep = Folder.keep_report

    def interrupted(self, name, report, seconds):
        keep(self, name, report, seconds)
        asked.append(seconds)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Folder, "keep_report", interrupted)
        run(("joint", "conflict"), folder=tmp_path)
    found = []
    setting = Loop._setting
    monkeypatch.setattr(Loop, "_setting", lambda *given: found.append(setting(*given)) or found[-1])
    run(("joint", "conflict"), folder=tmp_path)
    assert [seconds for _, seconds in found] == asked and asked[0] > 0


# --- what is not paired -----------------------------------------------------------------------------------------------


class Meter:
    def __init__(self):
        self.values = []

    def update(self, prediction, target):
        target -= 0.5
        self.values.append(F.mse_loss(prediction, target))

    def compute(self):
        return sum(self.values) / len(self.values)


class Drifting:
    """Held-out batches of which a later one differs at every iteration."""

    iterations = 0

    def __iter__(self):
        self.iterations += 1
        for i, (x, targets) in enumerate(DataLoader(VAL, batch_size=4)):
            yield x + (i == 3) * self.iterations, targets


class Normalised(nn.Module):
    """A loss over its own running mean."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor(1.0))

    def forward(self, prediction, target):
        loss = F.mse_loss(prediction, target)
        self.mean.mul_(0.5).add_(0.5 * loss.detach())
        return loss / self.mean


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"metrics": {**METRICS, "sum": (Meter, "lower")}}, r"metrics\['sum'\] changes .* in place"),
        ({"loaders": loaders(val=Drifting())}, r"loaders\['val'\] \(Drifting\) does not repeat"),
        ({"losses": {**LOSSES, "sum": Normalised()}}, r"losses\['sum'\] changes its own state"),
    ],
    ids=["metric", "held-out data", "loss"],
)
def test_what_would_differ_from_arm_to_arm_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        run(("joint", {"same": unchanged}), **options)


def test_a_copy_takes_over_the_moments_of_the_optimizer():
    found = run(("joint", {"copy": lambda model, report, seed: copy.deepcopy(model)}))
    assert found.metrics["copy"] == found.metrics["joint"] and not found.notes


def test_parameters_without_moments_are_named():
    first, other = nn.Linear(2, 2), nn.Linear(2, 3)
    optimizer = torch.optim.Adam(first.parameters())
    first(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    names = dict(first.named_parameters())
    moments = moments_of(optimizer, names)
    assert take_up(torch.optim.Adam(other.parameters()), moments, names, other) == ["weight", "bias"]
    assert take_up(torch.optim.Adam([first.bias]), moments, names, first) == []


def test_seeds_that_are_the_same_run_are_said():
    def ignoring(seed):
        torch.manual_seed(0)
        return dtme.MultiTaskModel(Backbone(dropout=0.0), {"sum": nn.Linear(WIDTH, 1), "sign": nn.Linear(WIDTH, 1)})

    found = run(make_model=ignoring, seeds=2, loaders=loaders(train=DataLoader(VAL, batch_size=8)))
    assert "seeds 0 and 1 are the same run: make_model ignores its seed" in "".join(found.notes)


# --- what diverges ----------------------------------------------------------------------------------------------------


def test_a_model_that_diverges_in_its_joint_part_is_recorded():
    found = run(("joint", "conflict"), lr=1e30, share=0.25)
    assert set(found.diverged) == {"joint", "conflict"} and "its analysis fails" in found.diverged["conflict"][0]


def careful(predictions, targets):
    if not predictions.isfinite().all():
        raise ValueError("Input contains NaN or infinity")
    return F.mse_loss(predictions, targets)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_predictions_that_a_metric_refuses_are_a_divergence(value):
    model = make_model(0)
    model.heads["sum"].bias.data.fill_(value)
    metrics = {task: Metric(task, (careful, "lower")) for task in LOSSES}
    with pytest.raises(Diverged, match="the predictions of 'sum'"):
        evaluate(model, DataLoader(VAL, batch_size=8), metrics, CPU)
    model.heads["sum"].bias.data.zero_()
    broken = {**metrics, "sum": Metric("sum", (lambda p, t: careful(p / 0, t), "lower"))}
    with pytest.raises(ValueError, match="Input contains"):  # the predictions are finite: this is the metric's fault
        evaluate(model, DataLoader(VAL, batch_size=8), broken, CPU)


def test_versions_draw_as_the_first_head():
    model = make_model(0).train()
    for task in model.tasks:
        model.heads[task] = nn.Sequential(nn.Linear(WIDTH, 1), nn.Dropout(0.5))
    x = torch.stack([x for x, _ in VAL])
    torch.manual_seed(1)
    before = model(x)
    torch.manual_seed(1)
    after = with_copies(model, ["layers.0.norm1.bias"])(x)
    assert torch.equal(before["sum"], after["sum"]) and not torch.equal(before["sign"], after["sign"])
