"""Which tasks a report puts together, and plans over such groups."""

import warnings
from dataclasses import replace

import pytest
import torch

import dtme
from dtme.grouping import group_names
from tests.dtme.reports import made_up, numbers


def pair_rates(num_tasks, friends, low=0.3, high=0.6, num_blocks=4):
    """(D, P): low within each set of ``friends``, high between them; block by block a little higher."""
    pairs = torch.combinations(torch.arange(num_tasks)).tolist()
    within = [any(i in group and j in group for group in friends) for i, j in pairs]
    return torch.tensor([[low if w else high for w in within]] * num_blocks) + 0.01 * torch.arange(num_blocks)[:, None]


def test_tasks_that_hardly_conflict_are_put_together():
    rates = pair_rates(5, [{0, 2, 4}, {1, 3}])
    report = made_up(rates, 1 - rates, num_tasks=5)
    assert report.groups() == {
        "semseg+normals+saliency": ("semseg", "normals", "saliency"),
        "depth+edges": ("depth", "edges"),
    }
    assert report.groups() == report.groups("range") != report.groups("null")
    # in the null space only pairs across agree, and no two clusters agree in all their pairs
    assert {len(tasks) for tasks in report.groups("null").values()} <= {1, 2}
    assert report.groups(max_groups=1) == {"semseg+4more": report.tasks}
    assert report.groups(max_groups=5) == report.groups()


def test_a_pair_whose_interval_holds_chance_stays_apart():
    rates = torch.tensor([[0.3, 0.49, 0.3]])  # 0-1 and 1-2 agree, 0-2 may not
    report = made_up(rates, rates, noise=0.06)
    assert report.groups() in (
        {"semseg+depth": ("semseg", "depth"), "normals": ("normals",)},
        {"semseg": ("semseg",), "depth+normals": ("depth", "normals")},
    )
    # more batches of the same make it sure
    assert len(made_up(rates, rates, noise=0.02, num_units=200, valid=4000).groups()) == 1


def test_pairs_that_never_met_are_not_known_to_agree():
    rates = pair_rates(3, [{0, 1, 2}])
    report = made_up(rates, rates)
    for counts in (*report.units[:3],):
        counts[:, :, 2] = 0  # depth and normals
    for counts in (report.range_counts, report.null_counts, report.valid_counts):
        counts[:, 1, 2] = counts[:, 2, 1] = 0
    assert len(report.groups()) == 2 and len(report.groups(max_groups=1)) == 1
    assert report.pair_rates("range")[:, 1, 2].isnan().all() and report.pair_rates("null")[:, 0, 0].isnan().all()


def test_without_intervals_only_max_groups_puts_together():
    rates = pair_rates(4, [{0, 3}, {1, 2}])
    report = made_up(rates, rates, num_tasks=4, num_units=5)
    with pytest.warns(UserWarning, match="only max_groups"):
        assert report.groups() == {task: (task,) for task in report.tasks}
    with pytest.warns(UserWarning, match="fewer than 8"):
        assert list(report.groups(max_groups=2).values()) == [("semseg", "edges"), ("depth", "normals")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made_up(rates, rates, num_tasks=4).groups()


@pytest.mark.parametrize("max_groups", [0, -1, 1.5, True, "2"])
def test_bad_max_groups(max_groups):
    with pytest.raises(ValueError, match="max_groups must be"):
        made_up([0.3], [0.3]).groups(max_groups=max_groups)


def test_names_of_groups_can_name_parameters():
    tasks = ("a", "b", "a+b", "left hand pose", "right hand pose", "a+2more")
    groups = [["a", "b"], ["a+b"], ["left hand pose", "right hand pose"], ["a+2more"]]
    names = group_names(groups, tasks)
    assert names == ["a+b_2", "a+b", "left_hand_pose+1more", "a+2more"]
    plan = dtme.ExpansionPlan(tasks, groups=dict(zip(names, groups, strict=True)))
    holder = torch.nn.ParameterDict({plan.owner(task): torch.zeros(1) for task in tasks})
    assert len(list(holder.named_parameters())) == 4
    twice = group_names([["left", "x" * 30], ["left", "y" * 30]], ("left",))
    assert twice == ["left+1more", "left+1more_2"]


def test_a_hundred_tasks_in_groups():
    friends = [set(range(k, 100, 8)) for k in range(8)]
    rates = pair_rates(100, friends, num_blocks=3)
    report = made_up(rates, rates, num_tasks=100, num_units=12, valid=50)
    groups = report.groups()
    assert {frozenset(int(t[4:]) for t in tasks) for tasks in groups.values()} == {frozenset(f) for f in friends}
    plan = report.plan(groups=True)
    assert plan.groups == groups and plan.compute() <= 8
    assert plan.added_parameters() == 8 * 2 * (2 * 8 + 6 * 8)
    assert len(str(report)) < 4000 and "100 tasks" in str(report)


def test_a_group_gets_a_module_if_any_of_its_tasks_does():
    rates = torch.full((2, 6), 0.3)
    rates[1, 0] = 0.6  # semseg and depth, in the second block
    report = made_up(rates, rates, num_tasks=4)
    groups = {"left": ("semseg", "edges"), "right": ("normals",)}
    plan = report.plan(modulation=1, expansion=0, pair_threshold=0.5, groups=groups)
    assert plan.modulation == {"encoder.layer.1": ("semseg", "depth", "edges")}
    assert plan.owners(plan.modulation["encoder.layer.1"]) == ("left", "depth")
    assert plan.added_parameters() == 2 * 2 * 8 and plan.groups == groups
    with pytest.raises(ValueError, match="overlap"):
        report.plan(groups={"a": ("semseg", "depth"), "b": ("depth",)})
    for wrong in (False, "left", 3):
        with pytest.raises(ValueError, match="groups must map"):
            report.plan(groups=wrong)


def test_only_tasks_that_reach_a_block_get_modules_there():
    reached = torch.ones(3, 4, dtype=torch.bool)
    reached[2, 0] = False
    report = made_up([0.3, 0.4, 0.5], [0.3, 0.4, 0.5], num_tasks=4)
    for counts in report.units[:3]:
        counts[:, 2, :3] = 0  # the pairs of semseg
    for counts in (report.range_counts, report.null_counts, report.valid_counts):
        counts[2, 0] = counts[2, :, 0] = 0
    report = replace(report, reached=reached)
    plan = report.plan(modulation=1, expansion=0.3)
    assert plan.modulation["encoder.layer.2"] == ("depth", "normals", "edges") == plan.expansion["encoder.layer.2"]
    assert plan.modulation["encoder.layer.1"] == report.tasks and numbers(plan.expansion) == [2]
    together = report.plan(modulation=1, groups={"seen": ("semseg", "depth")})
    assert together.modulation["encoder.layer.2"] == report.tasks  # the group is there for depth
