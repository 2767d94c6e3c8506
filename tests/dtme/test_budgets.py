"""Plans under a budget of parameters and of compute are the best of all plans within it."""

import itertools
import random
from functools import partial

import pytest
import torch

from dtme import ExpansionPlan
from dtme.stability import agreement, batches_to_settle
from tests.dtme.reports import made_up, numbers


def best_by_hand(report, options, max_parameters, max_compute):
    """The highest sum of rates of all plans within the budget, from every choice of blocks."""
    limits = {"max_parameters": max_parameters, "max_compute": max_compute}
    options = {key: value for key, value in options.items() if key not in limits}
    all_in = report.plan(**{**options, "modulation": 1, "expansion": 1})
    num_blocks = len(report.shared_blocks)
    most = [max(1, round(s * num_blocks)) if s else 0 for s in (options["modulation"], options["expansion"])]
    ranks = {"conflict": ("range_rates", "null_rates"), "reverse": ("range_rates", "null_rates")}
    ranks |= {"swap": ("null_rates", "range_rates"), "gain": ("gains", "null_rates")}
    values = [
        dict(zip(report.blocks, getattr(report, name).tolist(), strict=True)) for name in ranks[options["strategy"]]
    ]
    if options["strategy"] == "reverse":
        values = [{block: 1 - rate for block, rate in rates.items()} for rates in values]
    if options["strategy"] == "gain":  # two measures, each in parts of its mean over the blocks
        shared = report.shared_blocks
        means = [sum(max(rates[block], 0) for block in shared) / len(shared) for rates in values]
        values = [{b: v / mean for b, v in rates.items()} for rates, mean in zip(values, means, strict=True)]
    best = 0.0
    choices = [
        [blocks for n in range(quota + 1) for blocks in itertools.combinations(members, n)]
        for quota, members in zip(most, (all_in.modulation, all_in.expansion), strict=True)
    ]
    for modulated, expanded in itertools.product(*choices):
        plan = ExpansionPlan(
            report.tasks,
            all_in.num_tokens,
            {block: all_in.modulation[block] for block in modulated},
            {block: all_in.expansion[block] for block in expanded},
            all_in.num_features,
            all_in.groups,
        )
        if max_parameters is not None and plan.added_parameters() > max_parameters:
            continue
        if max_compute is not None and plan.compute() > max_compute:
            continue
        best = max(best, sum(values[0][b] for b in modulated) + sum(values[1][b] for b in expanded))
    return best, values


def random_case(seed):
    draw = random.Random(seed)
    num_blocks, num_tasks = draw.randint(2, 5), draw.randint(2, 4)
    rates = [[[draw.uniform(0.2, 0.7) for _ in range(num_tasks * (num_tasks - 1) // 2)] for _ in range(num_blocks)]] * 2
    widths = [draw.choice([8, 16]) for _ in range(num_blocks)] if draw.random() < 0.6 else 8
    gains = torch.tensor([draw.uniform(-0.1, 0.5) for _ in range(num_blocks)], dtype=torch.float64)
    report = made_up(*rates, num_tasks=num_tasks, num_units=2, widths=widths, noise=0.1, seed=seed, gains=gains)
    options = {
        "modulation": draw.choice([0, 0.5, 1]),
        "expansion": draw.choice([0.5, 1]),
        "strategy": draw.choice(["conflict", "conflict", "reverse", "swap", "gain"]),
        "num_tokens": draw.choice([1, 3]),
        "pair_threshold": draw.choice([None, 0.4, 0.5]),
        "groups": {"both": report.tasks[:2]} if draw.random() < 0.3 and num_tasks > 2 else None,
        "max_parameters": draw.choice([None, draw.randint(0, 900)]),
        "max_compute": draw.choice([None, draw.uniform(1, num_tasks)]),
    }
    return report, options


@pytest.mark.parametrize("part", range(6))
def test_the_plan_is_the_best_of_all_within_the_budget(part):
    tried = 0
    for seed in range(part * 30, part * 30 + 30):
        report, options = random_case(seed)
        limits = {name: options[name] for name in ("max_parameters", "max_compute")}
        best, values = best_by_hand(report, options, **limits)
        if all(limit is None for limit in limits.values()):
            continue
        try:
            plan = report.plan(**options)
        except ValueError as error:
            assert "below every plan" in str(error) and best == 0, (seed, error)
            continue
        tried += 1
        assert limits["max_parameters"] is None or plan.added_parameters() <= limits["max_parameters"]
        assert limits["max_compute"] is None or plan.compute() <= limits["max_compute"]
        total = sum(values[0][b] for b in plan.modulation) + sum(values[1][b] for b in plan.expansion)
        assert total == pytest.approx(best, abs=1e-9), (seed, options)
    assert tried > 5


def report_of_equals(num_tasks=3):
    report = made_up([0.4] * 6, [0.4] * 6, num_tasks=num_tasks, num_units=2)
    for name in ("range_counts", "null_counts"):
        getattr(report, name).copy_(report.valid_counts // 2)
    return report


def test_of_equal_blocks_a_budget_of_compute_takes_the_later():
    report = report_of_equals()
    assert numbers(report.plan().modulation) == [0, 1, 2] == numbers(report.plan(max_parameters=10**9).modulation)
    assert numbers(report.plan(max_compute=10).modulation) == [3, 4, 5]
    late = report.plan(max_compute=(5 + 3) / 6)
    assert numbers(late.modulation) == numbers(late.expansion) == [5] and late.compute() == 8 / 6


def test_a_budget_that_fits_everything_changes_nothing():
    for seed in range(20):
        report, options = random_case(seed)
        free = {k: v for k, v in options.items() if not k.startswith("max_")} | {"strategy": "conflict"}
        free["pair_threshold"] = None
        plan = report.plan(**free)
        assert plan == report.plan(**free, max_parameters=plan.added_parameters())
        assert plan == report.plan(**free, max_compute=plan.compute())
        assert plan == report.plan(**free, max_compute=99, max_parameters=1e9)


def test_random_plans_keep_within_budgets_too():
    report = report_of_equals()
    plans = [report.plan(strategy="random", seed=seed, max_parameters=160) for seed in range(12)]
    assert all(0 < plan.added_parameters() <= 160 for plan in plans) and len({str(plan) for plan in plans}) > 6


def test_a_budget_below_every_plan_says_what_is_needed():
    report = report_of_equals()
    for options, needed in (
        ({"max_parameters": 47}, {"max_parameters": 48}),
        ({"max_parameters": 0, "modulation": 0}, {"max_parameters": 144}),
        ({"max_compute": 1.3}, {"max_compute": 8 / 6}),
        ({"max_compute": 0.5, "expansion": 0}, {"max_compute": 8 / 6}),
        ({"max_compute": 1.0, "groups": {"all": report.tasks}, "pair_threshold": 0.9}, None),
    ):
        if needed is None:
            assert not report.plan(**options).blocks  # nothing is asked for, and nothing is in the way
            continue
        with pytest.raises(ValueError, match="below every plan") as error:
            report.plan(**options)
        assert repr(next(iter(needed.values()))) in str(error.value)
        assert report.plan(**{**options, **needed}).blocks
    with pytest.raises(ValueError, match=r"max_parameters=40 .*max_compute=1.2 .*within both"):
        report.plan(max_parameters=40, max_compute=1.2)
    with pytest.raises(ValueError, match=r"below every plan: the plain model needs 1\.0"):
        report.plan(modulation=0, expansion=0, max_compute=0.9)


@pytest.mark.parametrize("num_units", [4, 16])
def test_what_follows_from_a_plan_refuses_the_budget_that_the_plan_does(num_units):
    report = made_up([0.3, 0.4, 0.5], [0.5, 0.4, 0.3], num_units=num_units)
    for budget in ({"max_parameters": 3}, {"max_compute": 1.0}):
        for ask in (report.plan, report.stability, partial(agreement, report), partial(batches_to_settle, report)):
            with pytest.raises(ValueError, match="below every plan"):
                ask(**budget)


def test_a_negative_gain_is_chosen_neither_within_a_budget_nor_without():
    gains = torch.tensor([0.2, -0.1, 0.3, -0.2], dtype=torch.float64)
    resamples = gains + 0.01 * torch.randn(50, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    report = made_up([0.4] * 4, [0.4] * 4, gains=gains, gain_resamples=resamples)
    for budget in ({}, {"max_parameters": 10**6}, {"max_compute": 3}):
        options = {"strategy": "gain", "modulation": 1.0, **budget}
        assert numbers(report.plan(**options).modulation) == [0, 2]
        assert report.stability(**options)["modulation"].tolist() == [1, 0, 1, 0]


def test_resampled_rates_below_zero_are_chosen_as_rates_of_zero_are():
    report = made_up([0.001, 0.001, 0.001], [0.5, 0.4, 0.3], valid=200, noise=0.002)
    free = report.stability(modulation=1.0)
    within = report.stability(modulation=1.0, max_parameters=10**6)
    assert free["modulation"].tolist() == within["modulation"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("name", ["max_parameters", "max_compute"])
@pytest.mark.parametrize("value", ["many", float("nan"), True, [3], -1, -0.5])
def test_bad_budgets(name, value):
    with pytest.raises(ValueError, match=f"{name} must be None or a number of at least 0"):
        report_of_equals().plan(**{name: value})


def test_plans_of_many_blocks_and_streams_are_found_in_time():
    """Wide and narrow blocks, modules for some of the tasks, both budgets."""
    draw = random.Random(0)
    rates = [[draw.uniform(0.2, 0.7) for _ in range(28)] for _ in range(24)]
    report = made_up(rates, rates, num_tasks=8, num_units=2, widths=[96] * 2 + [192] * 2 + [384] * 18 + [768] * 2)
    for options in (
        {"max_parameters": 100_000},
        {"max_parameters": 100_000, "max_compute": 3.0},
        {"max_parameters": 60_000, "pair_threshold": 0.6},
        {"groups": {"a": report.tasks[:4], "b": report.tasks[4:]}, "max_compute": 1.5, "pair_threshold": 0.65},
    ):
        plan = report.plan(**options)
        assert plan.blocks and plan.added_parameters() <= options.get("max_parameters", 10**9)
        assert plan.compute() <= options.get("max_compute", 8)
