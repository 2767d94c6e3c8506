"""``dtme.compare`` end to end on toy tasks: what is paired, what each arm is, and what comes out by construction."""

import math
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import dtme
from dtme.comparison.arms import ARMS
from dtme.comparison.training import POWER, Schedule
from tests.dtme.comparing import LOSSES, METRICS, TRAIN, TUNE, VAL, WIDTH, Backbone, compared, loaders, make_model

EVERY_ARM = tuple(arm for arm in ARMS if arm != "random")


def unchanged(model, report, seed):
    return model


@pytest.fixture(scope="module")
def everything():
    return compared(arms=(*EVERY_ARM, "random*2"), seeds=1, budget=8)


@pytest.fixture(scope="module")
def paired():
    before = torch.get_rng_state()
    found = compared(arms=("joint", {"same": unchanged}, "conflict"), seeds=2, budget=8)
    assert torch.equal(torch.get_rng_state(), before)
    return found


# --- what is paired ---------------------------------------------------------------------------------------------------


def test_every_arm_trains_and_each_is_something_else(everything):
    assert everything.arms == (*EVERY_ARM, "random-1", "random-2") and not everything.diverged
    ways = {arm: tuple(map(tuple, everything.metrics[arm].values())) for arm in everything.arms}
    # the plans of two tasks' pairs are those of the blocks, and of so few blocks some are drawn twice
    assert ways["pairs"] == ways["conflict"] and len(set(ways.values())) >= len(ways) - 4


def test_an_arm_that_is_joint_training_is_so_to_the_bit(paired):
    assert paired.metrics["same"] == paired.metrics["joint"] != paired.metrics["conflict"]
    same = paired.difference("same")
    assert (same.word, same.difference.mean, same.difference.half_width, same.more) == ("no difference", 0, 0, 0)
    assert paired.delta_m("joint") == (0, 0)


def test_alone_or_among_others_and_in_whatever_order_an_arm_of_a_seed_is_the_same(everything, paired):
    for arm in ("joint", "conflict"):
        assert {task: values[:1] for task, values in paired.metrics[arm].items()} == everything.metrics[arm]
    swapped = compared(arms=("conflict", "joint"), seeds=(1, 0), budget=8)
    for arm in ("joint", "conflict"):
        assert {task: values[::-1] for task, values in swapped.metrics[arm].items()} == paired.metrics[arm]
    assert len(set(paired.metrics["joint"]["sum"])) == 2


def test_the_learning_rate_falls_to_zero_and_is_stretched_for_longer_training():
    plain, longer = Schedule(25, 100, 100), Schedule(25, 100, 175)
    assert [plain.factor(step) for step in (0, 50)] == [1, pytest.approx(0.5**POWER)]
    assert all(plain.factor(step) == longer.factor(step) for step in range(25))
    assert longer.factor(100) == pytest.approx(plain.factor(25 + 37.5)) and 0 < longer.factor(174) < longer.factor(173)
    assert plain.factor(99) == pytest.approx(0.01**POWER)


class Drifting:
    """Batches that begin alike at every iteration, and then do not."""

    def __init__(self, alike):
        self.alike, self.iterations = alike, 0

    def __iter__(self):
        self.iterations += 1
        for i, (x, targets) in enumerate(DataLoader(TRAIN, batch_size=8)):
            yield x + (i >= self.alike) * self.iterations, targets


@pytest.mark.parametrize(
    ("loader", "said"),
    [
        (
            lambda: DataLoader(TRAIN, batch_size=8, shuffle=True, generator=torch.Generator()),
            r"\(DataLoader\) does not",
        ),
        (lambda: Drifting(3), r"\(Drifting\) does not repeat its batches.*seen at step 4"),
    ],
    ids=["its own generator", "later batches"],
)
def test_a_loader_that_does_not_repeat_is_named(loader, said, tmp_path):
    with pytest.raises(ValueError, match=r"loaders\['train'\] " + said):
        compared(arms=("joint", "random"), seeds=1, budget=8, loaders=loaders(train=loader()), folder=tmp_path / "kept")


# --- what the arms are ------------------------------------------------------------------------------------------------


def test_plans_are_of_their_strategy_and_of_one_size(everything):
    plans = everything.plans
    blocks = tuple(f"layers.{i}" for i in range(4))
    conflict, shared = plans["conflict"][0], plans["shared"][0]
    assert len(conflict.modulation) == len(conflict.expansion) == 2 and conflict.num_tokens == 2
    for arm in ("pairs", "reverse", "random-1", "random-2", "first", "last"):
        assert plans[arm][0].added_parameters() == conflict.added_parameters(), arm
    assert set(plans["reverse"][0].modulation) == set(blocks) - set(conflict.modulation)
    assert tuple(plans["first"][0].modulation) == tuple(plans["first"][0].expansion) == blocks[:2]
    assert tuple(plans["last"][0].modulation) == blocks[2:]
    assert plans["all"][0].blocks == blocks == tuple(plans["all"][0].expansion)
    assert dict(shared.modulation) == dict(conflict.modulation) and len(shared.groups) == 1
    assert 2 * shared.added_parameters() == conflict.added_parameters() and everything.costs["shared"][0].compute == 1
    assert plans["random-1"] != plans["random-2"]


def test_longer_training_takes_the_compute_of_the_conflict_plan(everything):
    for longer, conflict, plan in zip(
        everything.costs["longer"], everything.costs["conflict"], everything.plans["conflict"], strict=True
    ):
        assert conflict.steps == 8 and conflict.compute == (2 + 6 * plan.compute()) / 8 > 1
        assert longer.steps == 2 + round(6 * plan.compute()) and abs(longer.steps - 8 * conflict.compute) <= 0.5
        assert longer.compute == longer.steps / 8 and longer.added == 0


def test_adapters_are_of_the_conflict_plans_size(everything):
    for i, plan in enumerate(everything.plans["conflict"]):
        assert everything.costs["conflict"][i].added == plan.added_parameters() > 0
        for arm in ("lora", "bitfit", "norm-affine", "prompts"):
            assert abs(everything.costs[arm][i].added / plan.added_parameters() - 1) < 0.02, arm
    assert everything.costs["lora"][0].compute == (2 + 6 * 2) / 8  # the backbone runs once for each task
    assert everything.plans["prompts"][0].expansion and "lora" not in everything.plans


def test_arms_of_ones_own_are_plans_and_functions():
    tasks = ("sum", "sign")
    seen = []

    def chosen(model, report, seed):
        seen.append((seed, report.blocks))
        return dtme.ExpansionPlan(tasks, 1, {"layers.3": tasks})

    plan = dtme.ExpansionPlan(tasks, 1, {"layers.3": tasks})
    found = compared(arms=("joint", {"plan": plan, "function": chosen}), seeds=(3,), budget=4)
    assert found.metrics["plan"] == found.metrics["function"] != found.metrics["joint"]
    assert seen[-1] == (3, ("layers.0", "layers.1", "layers.2", "layers.3"))
    assert found.costs["plan"][0].added == 2 * 2 * WIDTH and found.plans["plan"] == found.plans["function"]
    assert found.costs["plan"][0].compute == (1 + 3 * 1.25) / 4
    assert found.answers == () and "add it to the arms" in found.next_step


# --- what comes out ---------------------------------------------------------------------------------------------------


class Readout(nn.Module):
    """Reads one channel, with nothing to learn."""

    def forward(self, tokens):
        return tokens[..., :1]


def opposed(seed):
    return dtme.MultiTaskModel(Backbone(2, dropout=0.0), {"up": Readout(), "down": Readout()})


def opposed_loader(seed):
    x = torch.randn(24, 3, WIDTH, generator=torch.Generator().manual_seed(seed))
    target = 2 + x[..., 1:2]
    return DataLoader([(x[i], {"up": target[i], "down": -target[i]}) for i in range(24)], batch_size=12, shuffle=True)


def test_tasks_that_contradict_each_other_are_better_with_modules_of_their_own():
    """One prediction for both is at best 0, far from either target; W and b per task can tell them apart."""
    found = dtme.compare(
        opposed,
        {"train": opposed_loader(0), "val": opposed_loader(1)},
        {"up": F.mse_loss, "down": F.mse_loss},
        {"up": (F.mse_loss, "lower"), "down": (F.mse_loss, "lower")},
        arms=("joint", "longer", "conflict", "shared"),
        seeds=3,
        budget=60,
        lr=1e-2,
        num_tokens=1,
        modulation=1.0,
        progress=False,
    )
    against_joint, against_longer = found.answers
    assert against_joint.verdict.word == against_longer.verdict.word == "better" and found.settled
    assert against_joint.mean > 10 and against_joint.mean - against_joint.half_width > 0 and against_joint.n == 3
    assert found.difference("conflict", "shared").word == "better"  # modules that both share do not help
    assert found.difference("joint", "conflict").word == "worse"
    assert "Next: Expand by conflict" in str(found) and "Yes: +" in str(found)


def test_metrics_are_functions_of_everything_or_meters():
    from torchmetrics import MeanAbsoluteError, MeanSquaredError

    given = {
        "function": (F.mse_loss, F.l1_loss),
        "class": (MeanSquaredError, MeanAbsoluteError),
        "meter": (MeanSquaredError(), MeanAbsoluteError()),
        "factory": (lambda: MeanSquaredError(), lambda: MeanAbsoluteError()),
    }
    uneven = loaders(val=DataLoader(VAL, batch_size=5))
    results = {}
    for kind, (first, second) in given.items():
        metrics = {"sum": (first, "lower"), "sign": (second, "lower")}
        found = compared(arms=("joint",), seeds=1, budget=2, metrics=metrics, loaders=uneven)
        results[kind] = [found.metrics["joint"][task][0] for task in metrics]
    for values in results.values():
        assert values == pytest.approx(results["function"], rel=1e-5)


def test_batches_may_lack_targets_of_a_task():
    x = torch.randn(8, 4, WIDTH)
    alternating = [(x, {"sum": x[..., :1]} if i % 2 else {"sum": x[..., :1], "sign": x[..., 1:2]}) for i in range(4)]
    ignored = [(x, {"sum": x[..., :1], "sign": x[..., 1:2] * (math.nan if i % 2 else 1)}) for i in range(4)]

    def known_only(prediction, target):
        return (prediction - target)[~target.isnan()].abs().mean()

    results = []
    for train in (alternating, ignored):
        losses = {"sum": F.mse_loss, "sign": known_only}
        found = compared(arms=("joint", "conflict"), losses=losses, seeds=1, budget=4, loaders=loaders(train=train))
        assert not found.diverged
        results.append(found.metrics)
    assert results[0] == results[1]


def test_progress_counts_the_steps_of_longer_training_too(capsys):
    found = compared(arms=("joint", "longer", "conflict"), seeds=1, budget=4, progress=True)
    shown = capsys.readouterr().err
    done, total = map(int, re.findall(r"(\d+)/(\d+)", shown)[-1])
    assert done == total == 1 + 3 + (found.costs["longer"][0].steps - 1) + 3
    assert "seed 0, conflict" in shown


# --- learning rates ---------------------------------------------------------------------------------------------------


def test_every_arm_tries_all_learning_rates_on_a_seed_of_its_own(tmp_path):
    rates, arms = (1e-2, 1e-7), ("joint", "longer", "conflict")
    tuning = loaders(tune=DataLoader(TUNE, batch_size=8))
    options = {"arms": arms, "seeds": 1, "budget": 8, "lr": rates, "loaders": tuning, "folder": tmp_path}
    found = compared(**options)
    assert all(set(found.tuning[arm]) == set(rates) for arm in arms)
    assert all(found.rates[arm] == max(rates, key=found.tuning[arm].get) for arm in arms)
    assert len(list((tmp_path / "runs").glob("tune-*.json"))) == len(arms) * len(rates)
    assert found.rates["joint"] == 1e-2 and "chosen of 1e-07, 0.01" in str(found)
    one = compared(arms=arms, seeds=1, budget=8, lr=1e-2)
    assert found.metrics["joint"] == one.metrics["joint"]


# --- runs that fail ---------------------------------------------------------------------------------------------------


class FailsLater(nn.Module):
    def __init__(self, model, steps):
        super().__init__()
        self.model, self.left = model, steps

    def forward(self, x):
        self.left -= self.training
        scale = math.inf if self.left < 0 else 1
        return {task: scale * prediction for task, prediction in self.model(x).items()}


def test_a_run_that_diverges_is_named_and_takes_its_arm_out_of_better():
    def fails(model, report, seed):
        return FailsLater(model, 2 if seed == 1 else 99)

    found = compared(arms=("joint", {"fails": fails}), seeds=3, budget=8, share=0.5)
    assert set(found.diverged) == {"fails"} and "loss of 'sum' is inf at step 7" in found.diverged["fails"][1]
    assert math.isnan(found.delta_m("fails")[1]) and found.delta_m("fails")[0] == 0
    assert "diverged: fails, seed 1: the loss of 'sum'" in str(found)
    assert found.difference("fails").difference.n == 2


def test_scipy_is_needed_by_a_comparison_and_not_by_the_package(monkeypatch):
    code = "import sys; sys.modules['scipy'] = None; import dtme; dtme.compare"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ".:python"})
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ImportError, match=r'pip install "dtme-kernels\[compare\]"'):
        dtme.compare(make_model, loaders(), LOSSES, METRICS)
