"""Intervals, tests and numbers of seeds: against numbers worked by hand, and against simulated experiments."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dtme.comparison.statistics import (
    deviation_interval,
    estimate,
    holm,
    requirement,
    seeds_needed,
)


def test_five_numbers_by_hand():
    e = estimate([1, 2, 3, 4, 5])
    # sd = sqrt(10 / 4), standard error = sd / sqrt(5), t(0.975, 4) = 2.7764451
    assert (e.n, e.mean) == (5, 3)
    assert e.sd == pytest.approx(1.5811388)
    assert e.half_width == pytest.approx(2.7764451 * 0.7071068)
    assert (e.low, e.high) == pytest.approx((1.0367568, 4.9632432))
    assert e.p == pytest.approx(0.013236, abs=1e-6)  # two-sided, t = 4.2426 with 4 degrees of freedom


def test_below_two_numbers_there_is_no_spread():
    one, none = estimate([2.5]), estimate([])
    assert (one.n, one.mean) == (1, 2.5) and none.n == 0 and math.isnan(none.mean)
    for e in (one, none):
        assert math.isnan(e.sd) and math.isnan(e.half_width) and math.isnan(e.p)


@pytest.mark.parametrize(("value", "p"), [(0.1, 0.0), (0.0, 1.0)])
def test_equal_numbers_have_no_spread_whatever_their_mean_rounds_to(value, p):
    e = estimate([value] * 3)
    assert (e.sd, e.half_width, e.p) == (0, 0, p)


@pytest.mark.parametrize("values", [[1.0, math.nan], [math.inf], [[1.0, 2.0]]])
def test_what_is_not_a_row_of_numbers_is_refused(values):
    with pytest.raises(ValueError, match="finite numbers"):
        estimate(values)


@pytest.mark.parametrize("n", [2, 5, 10])
def test_intervals_cover_the_truth_as_often_as_they_say(n):
    experiments, rng = 2000, np.random.default_rng(n)
    results = [estimate(row) for row in rng.normal(1.5, 0.7, (experiments, n))]
    covered = np.mean([e.low <= 1.5 <= e.high for e in results])
    error = math.sqrt(0.95 * 0.05 / experiments)
    assert abs(covered - 0.95) < 3.5 * error


def test_no_effect_is_called_one_in_a_twentieth_of_the_experiments():
    rng = np.random.default_rng(3)
    share = np.mean([estimate(row).p < 0.05 for row in rng.normal(0, 2, (2000, 4))])
    assert abs(share - 0.05) < 3.5 * math.sqrt(0.05 * 0.95 / 2000)


# --- Holm -------------------------------------------------------------------------------------------------------------


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.6]) == [1, 1]
    with_unknown = holm([0.02, math.nan, 0.04])  # what is not known is not of the family
    assert with_unknown[0] == pytest.approx(0.04) and math.isnan(with_unknown[1]) and with_unknown[2] == 0.04
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_rejects_no_less_than_bonferroni_and_no_more_than_without(p_values):
    adjusted = holm(p_values)
    for p, a in zip(p_values, adjusted, strict=True):
        assert p <= a <= min(1, len(p_values) * p) + 1e-15
    order = np.argsort(p_values, kind="stable")
    assert (np.diff([adjusted[i] for i in order]) >= 0).all()


def test_holm_calls_any_of_ten_null_effects_one_in_a_twentieth_of_the_experiments():
    p = np.random.default_rng(4).random((4000, 10))
    share = np.mean([min(holm(row)) < 0.05 for row in p])
    assert abs(share - (1 - (1 - 0.005) ** 10)) < 3.5 * math.sqrt(0.05 * 0.95 / 4000)


# --- how many seeds ---------------------------------------------------------------------------------------------------


def test_interval_of_the_deviation_by_the_table_of_chi_square():
    # with 4 degrees of freedom, 0.4844 and 11.1433 leave 2.5 % on either side
    assert deviation_interval(1.0, 5) == pytest.approx((math.sqrt(4 / 11.1433), math.sqrt(4 / 0.4844)), rel=1e-4)
    assert all(map(math.isnan, deviation_interval(1.0, 1)))


def test_interval_of_the_deviation_covers_it_as_often_as_it_says():
    sds = np.random.default_rng(5).normal(0, 1, (4000, 5)).std(1, ddof=1)
    covered = np.mean([low <= 1 <= high for low, high in (deviation_interval(sd, 5) for sd in sds)])
    assert abs(covered - 0.95) < 3.5 * math.sqrt(0.95 * 0.05 / 4000)


@pytest.mark.parametrize(("effect", "n"), [(2.0, 5), (1.0, 10), (0.5, 34), (0.2, 199)])
def test_seeds_needed_by_the_tables_of_the_t_test(effect, n):
    assert seeds_needed(1.0, effect) == n
    assert seeds_needed(3.0, 3 * effect) == n


@pytest.mark.parametrize("effect", [0.15, 0.3, 0.7, 1.3, 2.5])
def test_seeds_needed_have_the_power_and_fewer_have_not(effect):
    def power(n):
        critical, shift = stats.t.ppf(0.975, n - 1), effect * math.sqrt(n)
        return stats.nct.sf(critical, n - 1, shift) + stats.nct.cdf(-critical, n - 1, shift)

    n = seeds_needed(1.0, effect)
    assert power(n) >= 0.79  # the quantiles of the central t are a close approximation, not the power itself
    assert power(n - 1) <= 0.81 or n == 2


def test_seeds_needed_at_the_ends():
    assert seeds_needed(0.0, 1.0) == 2
    assert math.isnan(seeds_needed(math.nan, 1.0))
    assert seeds_needed(1e9, 1e-3) == math.inf
    for effect in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="effect"):
            seeds_needed(1.0, effect)
    with pytest.raises(ValueError, match="sd"):
        seeds_needed(-1.0, 1.0)


def test_requirement_says_how_many_more():
    differences = estimate([1, 2, 3, 4, 5])
    r = requirement(differences, 1.5)
    assert r.seeds == seeds_needed(differences.sd, 1.5) == 11
    assert (r.pairs, r.more, r.is_settled) == (5, 6, False)
    low, high = deviation_interval(differences.sd, 5)
    assert (r.low, r.high) == (seeds_needed(low, 1.5), seeds_needed(high, 1.5)) and r.low < 11 < r.high
    large = requirement(differences, 6.0)
    assert large.is_settled and large.more == 0
    unknown = requirement(estimate([1.0]), 1.0)
    assert math.isnan(unknown.seeds) and math.isnan(unknown.more) and not unknown.is_settled
