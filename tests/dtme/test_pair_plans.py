"""``strategy="pairs"``: modules go to the tasks of the pairs that conflict most, block by block, as many as before."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from dtme import ExpansionPlan
from dtme.stability import agreement
from tests.dtme.reports import made_up, other_split


def drawn(seed, num_blocks=4, num_tasks=4, **options):
    draw = torch.Generator().manual_seed(seed)
    num_pairs = num_tasks * (num_tasks - 1) // 2
    rates = [0.2 + 0.5 * torch.rand(num_blocks, num_pairs, generator=draw, dtype=torch.float64) for _ in range(2)]
    return made_up(*rates, num_tasks=num_tasks, seed=seed, **options)


def cells(report, space, groups=None):
    """{(block, task): the highest rate of a pair of the task and one that is not of its group}."""
    rates, found = report.pair_rates(space), {}
    group_of = {task: name for name, tasks in (groups or {}).items() for task in tasks}
    for d, block in enumerate(report.blocks):
        for i, task in enumerate(report.tasks):
            together = [group_of.get(task, task) == group_of.get(other, other) for other in report.tasks]
            met = [rates[d, i, j].item() for j in range(len(report.tasks)) if not together[j]]
            found[block, task] = max([rate for rate in met if not math.isnan(rate)], default=-1.0)
    return found


def chosen(added):
    return {(block, task) for block, tasks in added.items() for task in tasks}


@pytest.mark.parametrize("seed", range(6))
def test_the_highest_cells_are_chosen_and_no_more_than_by_blocks(seed):
    report = drawn(seed)
    by_blocks, plan = (
        report.plan(modulation=0.5, expansion=0.25),
        report.plan(modulation=0.5, expansion=0.25, strategy="pairs"),
    )
    for space, kind, number in (("range", "modulation", 8), ("null", "expansion", 4)):
        rates = cells(report, space)
        got = chosen(getattr(plan, kind))
        assert len(got) == number == len(chosen(getattr(by_blocks, kind)))
        assert sorted(rates[cell] for cell in got) == sorted(rates.values())[-number:]
    assert plan.added_parameters() == by_blocks.added_parameters()


def test_it_is_the_pair_threshold_that_gives_so_many():
    report = drawn(3)
    plan = report.plan(modulation=0.5, expansion=0, strategy="pairs")
    rates = cells(report, "range")
    lowest = min(rates[cell] for cell in chosen(plan.modulation))
    assert plan.modulation == report.plan(modulation=1, expansion=0, pair_threshold=lowest).modulation
    assert report.plan(strategy="pairs", modulation=0.5, expansion=0, pair_threshold=1).modulation == {}


def test_two_tasks_have_one_pair_so_that_it_is_the_choice_of_blocks():
    report = drawn(1, num_blocks=6, num_tasks=2)
    assert report.plan(strategy="pairs") == report.plan()
    assert torch.equal(report.stability(strategy="pairs")["modulation"], report.stability()["modulation"])


def test_tasks_of_a_group_do_not_fight_and_share_a_module():
    report = drawn(2)
    groups = {"both": report.tasks[:2]}
    plan = report.plan(strategy="pairs", groups=groups)
    rates = cells(report, "range", groups)
    owners = {"both": report.tasks[:2]} | {task: (task,) for task in report.tasks[2:]}
    best = {(b, o): max(rates[b, t] for t in tasks) for b in report.blocks for o, tasks in owners.items()}
    got = {(block, owner) for block, tasks in plan.modulation.items() for owner in owners if owners[owner][0] in tasks}
    assert sorted(best[slot] for slot in got) == sorted(best.values())[-2 * len(owners) :]
    assert chosen(plan.modulation) == {(block, task) for block, owner in got for task in owners[owner]}
    everyone = report.plan(strategy="pairs", groups={"all": report.tasks})
    assert not everyone.modulation and not everyone.expansion  # nobody is left to conflict with


def test_a_task_that_meets_nobody_gets_nothing():
    report = drawn(4, num_tasks=3, missing=0.0)
    alone = report.tasks[2]
    units = report.units._replace(**{name: getattr(report.units, name).clone() for name in ("range", "null", "valid")})
    for counts in (units.range, units.null, units.valid):
        counts[:, :, 1:] = 0  # pairs (0, 2) and (1, 2)
    matrices = {f"{name}_counts": getattr(report, f"{name}_counts").clone() for name in ("range", "null", "valid")}
    for counts in matrices.values():
        counts[:, 2, :] = counts[:, :, 2] = 0
    lone = type(report)(
        report.tasks,
        report.blocks,
        report.ranks,
        **matrices,
        eigenvalues=report.eigenvalues,
        num_samples=8,
        units=units,
        num_batches=16,
    )
    plan = lone.plan(modulation=1, expansion=1, strategy="pairs")
    assert plan.modulation and all(
        alone not in tasks for tasks in [*plan.modulation.values(), *plan.expansion.values()]
    )


def test_resamples_choose_anew_and_the_report_says_how_often_alike():
    sure = made_up(
        [[0.7, 0.2, 0.2], [0.6, 0.2, 0.2], [0.2, 0.2, 0.3]], [[0.5] * 3] * 3, num_units=32, valid=4000, noise=0.01
    )
    plan = sure.plan(modulation=0.34, expansion=0, strategy="pairs")
    assert [*plan.modulation] == [*sure.blocks[:2]] and plan.modulation[sure.blocks[0]] == sure.tasks[:2]
    shares = sure.stability(modulation=0.34, expansion=0, strategy="pairs")["modulation"]
    assert shares[0] == 1 and shares[2] < 0.05
    even = made_up([[0.5] * 6] * 4, [[0.5] * 6] * 4, num_tasks=4)
    assert (
        agreement(even, strategy="pairs") < 0.2 < 0.95 < agreement(sure, modulation=0.67, expansion=0, strategy="pairs")
    )


@pytest.mark.parametrize("seed", range(4))
def test_under_a_budget_it_is_the_best_of_all_plans(seed):
    report = drawn(seed, num_blocks=2, num_tasks=3, num_units=2)
    limits = {"max_parameters": 60 + 20 * seed, "max_compute": 2.0}
    plan = report.plan(modulation=1, expansion=0.5, num_tokens=1, strategy="pairs", **limits)
    values = {0: cells(report, "range"), 1: cells(report, "null")}
    slots = [(kind, cell) for kind in values for cell in values[kind]]

    def made(picked):
        sides = [{}, {}]
        for kind, (block, task) in picked:
            sides[kind][block] = (*sides[kind].get(block, ()), task)
        return ExpansionPlan(report.tasks, 1, *sides, report.num_features)

    best = 0.0
    for number in range(1, len(slots) + 1):
        for picked in itertools.combinations(slots, number):
            if sum(kind == 1 for kind, _ in picked) > 3:
                continue
            other = made(picked)
            if other.added_parameters() <= limits["max_parameters"] and other.compute() <= limits["max_compute"]:
                best = max(best, sum(values[kind][cell] for kind, cell in picked))
    got = [(0, cell) for cell in chosen(plan.modulation)] + [(1, cell) for cell in chosen(plan.expansion)]
    assert plan.added_parameters() <= limits["max_parameters"] and plan.compute() <= limits["max_compute"]
    assert math.isclose(sum(values[kind][cell] for kind, cell in got), best, abs_tol=1e-9)


def test_tasks_that_do_not_reach_all_blocks_get_no_more_than_by_blocks():
    report = made_up([[0.3] * 6, [0.6] * 6, [0.5] * 6, [0.4] * 6], [[0.5] * 6] * 4, num_tasks=4, noise=0)
    units = report.units._replace(**{name: getattr(report.units, name).clone() for name in ("range", "null", "valid")})
    matrices = {f"{name}_counts": getattr(report, f"{name}_counts").clone() for name in ("range", "null", "valid")}
    reached = torch.ones(4, 4, dtype=torch.bool)
    reached[1:, 2:] = False  # of the last three blocks the tasks 2 and 3 reach none: one pair meets there
    for counts in (units.range, units.null, units.valid):
        counts[:, 1:, 1:] = 0
    for counts in matrices.values():
        counts[1:, 2:, :] = counts[1:, :, 2:] = 0
    some = replace(report, units=units, reached=reached, **matrices)
    by_blocks, plan = some.plan(expansion=0), some.plan(expansion=0, strategy="pairs")
    assert len(chosen(by_blocks.modulation)) == len(chosen(plan.modulation)) == 4
    assert chosen(plan.modulation) == {(block, task) for block in some.blocks[1:3] for task in some.tasks[:2]}
    assert len(chosen(some.plan(expansion=0, strategy="pairs", pair_threshold=0.55).modulation)) == 2


def test_rates_near_zero_are_chosen_in_all_resamples():
    report = made_up([[0.002] * 3] * 3, [[0.001] * 3] * 3, valid=200, noise=0.002)
    for limits in ({}, {"max_parameters": 1e9}):
        plan = report.plan(modulation=1, expansion=1, strategy="pairs", **limits)
        assert len(chosen(plan.modulation)) == len(chosen(plan.expansion)) == 9
        assert agreement(report, modulation=1, expansion=1, strategy="pairs", **limits) == 1


def test_too_many_plans_under_a_budget_of_compute_are_refused_at_once():
    with pytest.raises(ValueError, match=r"strategy='pairs'.*too many plans"):
        drawn(0, num_tasks=40).plan(strategy="pairs", max_compute=8.0)


def test_the_table_says_what_the_shares_of_parts_are_of():
    report = drawn(0)
    paired = replace(report, plan_options={"strategy": "pairs"}, alternatives={1000.0: other_split(report)})
    text = str(paired)
    assert "of those that give one to any" in text and "of those that give one to any" not in str(report)
    assert "see plan(" not in text and "plan(strategy='pairs') modulates" in text
    other = paired.at(1000.0).plan(strategy="pairs")
    letters = "".join("·MEB"[(b in other.modulation) + 2 * (b in other.expansion)] for b in report.blocks)
    assert any(line.split()[0] == "1000" and line.split()[-1] == letters for line in text.splitlines() if line.split())
