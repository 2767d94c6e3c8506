"""Controls of a comparison: joint training at equal compute, a frozen backbone, random plans, one block, two groups."""

import json
import math
from dataclasses import replace
from itertools import islice

import pytest
import torch

from benchmarks.paper.data import Options
from benchmarks.paper.experiments import ARMS, EXPERIMENTS, RANDOM
from benchmarks.paper.results import run_path
from benchmarks.paper.runner.config import Config
from benchmarks.paper.runner.one import RunOfArm, Stopped, Workplace
from benchmarks.paper.smoke import figures
from benchmarks.paper.structures.one_block import BATCHES, gradient_norms
from dtme.blocks import find_blocks
from dtme.comparison.training import POWER
from tests.paper.small import NAMES, TASKS, backward, batches, small_model, small_setting

BLOCKS = [f"layers.{index}" for index in range(6)]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    options = Options(tasks=NAMES, size=(32, 32), train=24, val=8, cache=cache)
    return Config("longer", 0, options=options, backbone="narrow", steps=8, batch=4, read=8, expand_at=0.5)


def run(config, out, **place):
    return RunOfArm(config, ARMS[config.arm], Workplace(out, **place)).run()


def test_longer_training_takes_the_compute_of_the_plan(config, tmp_path):
    longer, joint, expanded = (run(replace(config, arm=arm), tmp_path) for arm in ("longer", "joint", "tm+te"))
    compute = expanded["structure"]["compute"]
    assert longer["structure"]["passes"] == compute > 1
    more = round(4 * (compute - 1))
    steps = {name: sum(map(len, content["losses"].values())) for name, content in (("l", longer), ("j", joint))}
    assert steps["l"] == 3 * min(10, 8 + more) and steps["j"] == 3 * 8
    assert longer["weights"] != joint["weights"] and longer["structure"]["added"] == 0


def test_longer_training_follows_one_polynomial_from_where_it_leaves_the_joint_part(config, tmp_path):
    rates = []

    def tell(what, step):
        if what == "training":
            rates.append((step, training[0].optimizer.param_groups[0]["lr"]))

    training = []
    arm = RunOfArm(config, ARMS["longer"], Workplace(tmp_path, tell=tell))
    build = arm._train

    def seen(what, *args):
        training[:] = [what]
        build(what, *args)

    arm._train = seen
    arm.run()
    own = [(step, rate) for step, rate in rates if step > 4]
    last = own[-1][0]
    assert last > 8 and len(own) == last - 4
    for step, rate in own:
        assert math.isclose(rate, config.lr * (1 - (step - 1) / last) ** POWER)


def test_longer_training_that_is_put_down_goes_on_to_the_same_bits(config, tmp_path):
    whole = run(config, tmp_path / "whole")
    steps = iter(range(100))
    with pytest.raises(Stopped):
        run(config, tmp_path / "parts", stop=lambda: next(steps) == 9)
    assert figures(run(config, tmp_path / "parts")) == figures(whole)


def test_of_a_frozen_joint_model_the_heads_alone_train(config, tmp_path):
    frozen = replace(config, arm="joint-frozen")
    trunk = RunOfArm(frozen, ARMS["joint-frozen"], Workplace(tmp_path)).joint_part().model.state_dict()
    kept = {}

    class Kept(RunOfArm):
        def evaluate(self, model):
            kept.update(model.state_dict())
            return super().evaluate(model)

    Kept(frozen, ARMS["joint-frozen"], Workplace(tmp_path)).run()
    changed = {name for name, value in kept.items() if not torch.equal(value, trunk[name])}
    assert changed and all(name.startswith("heads.") for name in changed)


def test_random_plans_of_a_seed_differ_and_repeat():
    def plans(seed):
        found = []
        for arm in RANDOM:
            plan, _ = ARMS[arm].structure().plan(small_setting(seed=seed))
            assert len(plan.modulation) == len(plan.expansion) == 3
            found.append((tuple(plan.modulation), tuple(plan.expansion)))
        return found

    first = plans(0)
    assert first == plans(0) != plans(1)
    assert len(RANDOM) == 8 and len(set(first)) >= 6  # of 20 × 20 choices


@pytest.mark.parametrize("arm", ["tm-at-0", "te-at-4"])
def test_one_block_is_given_modules_and_no_other(arm):
    setting = small_setting()
    joint = setting.report
    model, facts = ARMS[arm].structure().apply(setting)
    json.dumps(facts, allow_nan=False)
    kind, other = ("modulation", "expansion") if arm.startswith("tm") else ("expansion", "modulation")
    assert facts["plan"][kind] == {BLOCKS[int(arm[-1])]: list(NAMES)} and facts["plan"][other] == {}
    assert facts["report"]["range"] == joint.range_rates.tolist()
    added = [p for name, p in model.named_parameters() if ".dtme." in name]
    assert sum(p.numel() for p in added) == facts["added"] == 3 * 128 * (2 if arm.startswith("tm") else 6)
    backward(model)
    assert all(p.grad.any() for p in added)


def test_a_block_that_the_backbone_lacks_is_named():
    with pytest.raises(ValueError, match=r"block 6 needs that block: the backbone has 6"):
        ARMS["tm-at-6"].structure().apply(small_setting())


def test_gradient_norms_are_those_of_a_backward_pass_per_task():
    model = small_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = gradient_norms(model, batches(), TASKS)
    total, tokens = torch.zeros(6, dtype=torch.float64), 0
    seen = {}
    for index, block in enumerate(find_blocks(model.backbone).values()):
        block.register_forward_pre_hook(lambda module, args, index=index: seen.__setitem__(index, args[0]))
    for x, labels in islice(batches(), BATCHES):
        for name in NAMES:
            predictions = model.eval()(x)
            for value in seen.values():
                value.retain_grad()
            TASKS[name].loss(predictions[name], labels[name]).backward()
            total += torch.stack([seen[index].grad.double().norm(dim=-1).sum() for index in range(6)])
        tokens += seen[0].shape[0] * seen[0].shape[1]
    assert torch.allclose(found, total / tokens, rtol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_groups_share_modules():
    model, facts = ARMS["grouped"].structure().apply(small_setting())
    groups = facts["plan"]["groups"]
    named = sorted(task for tasks in groups.values() for task in tasks)
    assert groups and set(named) <= set(NAMES)
    names = {tuple(tasks) for kind in ("modulation", "expansion") for tasks in facts["plan"][kind].values()}
    units = len(groups) + len(NAMES) - len(named)
    assert all(len(tasks) <= 3 for tasks in names) and units <= 2
    backward(model)


def test_an_aggregator_joins_after_half_of_the_training(config, tmp_path):
    plain, aggregated = (run(replace(config, arm=arm), tmp_path) for arm in ("imtl-after-50", "imtl+tm+te"))
    assert plain["settings"]["branch"] == aggregated["settings"]["branch"] == 4
    assert plain["structure"]["added"] == 0 < aggregated["structure"]["added"]
    assert (tmp_path / "work" / "trunk.lr-0.001.seed-0.step-4.pt").exists()  # which both go on from
    assert run_path(tmp_path, "imtl+tm+te.seed-0").exists()


def test_every_backbone_has_the_arms_of_everything():
    every = EXPERIMENTS["everything"].arms
    assert not any("-at-" in arm for arm in every) and {"longer", "grouped", "random"} <= set(every)
    assert set(EXPERIMENTS["compare"].arms) <= set(every) | set(RANDOM)
