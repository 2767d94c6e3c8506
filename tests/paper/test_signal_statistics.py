"""The statistics of the signal: against brute force, and against effects that were planted."""

import math
from itertools import combinations, product

import numpy as np
import pytest
import torch

from benchmarks.paper.signal.measurement import Measurement
from benchmarks.paper.signal.reproducibility import images_for_overlap
from benchmarks.paper.signal.statistics import (
    Interval,
    agreement,
    cell_components,
    chosen,
    components,
    over_pairs,
    over_seeds,
    profile,
    quota,
    random_overlap,
    reliability,
    with_noise,
)
from benchmarks.paper.signal.tallies import (
    AT_MOST,
    BELOW,
    BLOCKS,
    CELLS,
    LETTER,
    PAIRS,
    Tally,
    intervals,
    moment_of,
    resampled,
)
from dtme import ConflictReport
from tests.paper.signal_folders import measurement


def tally(rng, rates, units, tokens=50, between=0.1):
    """(U, X) rates around ``rates`` (X,) that images move, counted over tokens, in two spaces."""
    of_images = np.clip(rates + rng.normal(0, between, (units, len(rates))), 0, 1)
    hits = rng.binomial(tokens, np.stack([of_images, of_images], -1))[:, :, None]
    return Tally(hits, np.full((units, len(rates)), tokens))


@pytest.mark.parametrize(("items", "size"), [(6, 3), (5, 2), (4, 4)])
def test_overlap_of_random_plans_is_that_of_all_pairs_of_plans(items, size):
    sets = [set(one) for one in combinations(range(items), size)]
    overlaps = np.array([len(a & b) / size for a, b in product(sets, sets)])
    found = random_overlap(items, size)
    assert found.expected == pytest.approx(overlaps.mean())
    assert found.equal == pytest.approx((overlaps == 1).mean())
    assert (overlaps < found.low - 1e-9).mean() <= 0.025 and (overlaps > found.high + 1e-9).mean() <= 0.025
    assert (overlaps <= found.low + 1e-9).mean() >= 0.025  # no lower end would do


@pytest.mark.parametrize("counts", [[5, 9, 9, 1, 5, 5, 2], [3, 3, 3, 3], [1, 2, 3, 4, 5, 6]])
def test_the_chosen_are_the_blocks_of_the_products_plan(counts):
    def matrix(values):
        both = torch.tensor(values)[:, None, None] * (1 - torch.eye(2, dtype=torch.int64))
        return both

    blocks = tuple(f"b{d}" for d in range(len(counts)))
    report = ConflictReport(
        tasks=("a", "b"),
        blocks=blocks,
        ranks=torch.ones(len(counts), dtype=torch.int64),
        range_counts=matrix(counts),
        null_counts=matrix(counts[::-1]),
        valid_counts=matrix([10] * len(counts)),
        eigenvalues=torch.ones(len(counts), 4, dtype=torch.float64),
        num_samples=8,
    )
    plan = report.plan(modulation=0.5, expansion=0.5)
    for values, modules in ((counts, plan.modulation), (counts[::-1], plan.expansion)):
        mask = chosen(np.array(values) / 10)
        assert [block for block, hit in zip(blocks, mask, strict=True) if hit] == list(modules)


def test_what_has_no_rate_is_chosen_last():
    assert chosen(np.array([math.nan, 0.1, 0.2, math.nan])).tolist() == [False, True, True, False]


def test_agreement_of_two_samples_by_hand():
    one = agreement(np.array([[4.0, 3.0, 2.0, 1.0], [1.0, 4.0, 2.0, 3.0]]))
    assert (one.overlap[0, 1], one.equal[0, 1]) == (0.5, 0)
    assert one.correlation[0, 1] == pytest.approx(1 - 6 * (9 + 1 + 0 + 4) / (4 * 15))  # 1 - 6 Σd² / (n (n² - 1))


def test_the_mean_over_pairs_and_its_jackknife_are_what_leaving_samples_out_gives():
    rng = np.random.default_rng(0)
    rates = [rng.random((m, 6)) for m in (4, 5)]

    def mean(rows):
        values = agreement(rows).correlation
        return np.mean([values[i, j] for i, j in combinations(range(len(rows)), 2)])

    variance = 0.0
    for rows in rates:
        left = [mean(np.delete(rows, i, axis=0)) for i in range(len(rows))]
        variance += (len(rows) - 1) / len(rows) * np.sum((np.array(left) - np.mean(left)) ** 2) / 4
    found = over_pairs([agreement(rows).correlation for rows in rates])
    assert found.value == pytest.approx(np.mean([mean(rows) for rows in rates]))
    assert (found.high - found.low) / 2 == pytest.approx(2.364624 * math.sqrt(variance), rel=1e-5)  # t(0.975, 7)


def test_intervals_of_two_seeds_are_not_claimed():
    assert math.isnan(over_seeds([0.2, 0.4]).low) and over_seeds([0.2, 0.4]).value == pytest.approx(0.3)
    assert over_seeds([0.9, 1.0, 0.5], 0, 1).high == 1
    assert over_seeds([0.2, math.nan, 0.4]).value == pytest.approx(0.3)


def test_the_covariance_of_the_noise_is_that_of_resamples():
    rng = np.random.default_rng(1)
    models = [tally(rng, np.array([0.3, 0.5, 0.6]), 200) for _ in range(2)]
    models[1] = Tally(models[0].hits // 2, models[0].valid)  # of the same images: the noise goes along
    found = with_noise(models, 0)
    moved = np.concatenate([resampled([(1.0, one)])[1][:, :, 0, 0] for one in models], axis=1)
    expected = np.cov(moved.T)
    np.testing.assert_allclose(found.noise.reshape(6, 6), expected, atol=0.12 * expected.max())
    assert found.noise[0, 0, 1, 0] > 0.3 * found.noise[0, 0, 0, 0]


def test_two_factors_give_the_mean_squares_of_the_textbook():
    y = np.array([[1.0, 4.0, 2.0], [3.0, 5.0, 7.0]])
    rows, columns = y.mean(1), y.mean(0)
    residual = ((y - rows[:, None] - columns + y.mean()) ** 2).sum() / 2
    found = components(np.multiply.outer(y, y), ("row", "column"))
    assert found["row × column"] == pytest.approx(residual)
    assert found["row"] == pytest.approx((3 * rows.var(ddof=1) - residual) / 3)
    assert found["column"] == pytest.approx((2 * columns.var(ddof=1) - residual) / 2)


PLANTED = {"seed": 1.0, "block": 2.0, "pair": 4.0, "seed × block": 0.5, "seed × pair": 1.0, "block × pair": 0.0}
PLANTED["seed × block × pair"] = 0.7


def test_planted_components_are_recovered_without_bias():
    rng = np.random.default_rng(2)
    sizes, names, draws = {"seed": 3, "block": 5, "pair": 6}, ("seed", "block", "pair"), 300
    noise = 0.4 * np.eye(90).reshape(3, 5, 6, 3, 5, 6)
    estimates = []
    for _ in range(draws):
        y = rng.normal(0, math.sqrt(0.4), (3, 5, 6))
        for effect, variance in PLANTED.items():
            shape = [sizes[name] if name in effect.split(" × ") else 1 for name in names]
            y = y + rng.normal(0, math.sqrt(variance), shape)
        estimates.append(components(np.multiply.outer(y, y) - noise, names))
    for effect, variance in PLANTED.items():
        values = [one[effect] for one in estimates]
        error = np.std(values, ddof=1) / math.sqrt(draws)
        assert abs(np.mean(values) - variance) < 3.5 * error, effect
        assert error < 0.25, effect


def test_planted_components_of_measurements_are_recovered():
    """From counts to shares: blocks and pairs planted, the images' noise taken out."""
    rng = np.random.default_rng(3)
    block, pair = rng.normal(0, 0.03, 6), rng.normal(0, 0.06, 6)
    of_seed = [rng.normal(0, 0.04) for _ in range(3)]
    moments = [
        moment_of(measurement(s, block=list(block), pair=list(pair), rate=0.45 + of_seed[s], ratios=(100.0,)))
        for s in range(3)
    ]
    found = cell_components(with_noise([moment.tally(CELLS) for moment in moments], 0), 6)
    assert found.variances["block"] == pytest.approx(block.var(ddof=1), rel=0.25)
    assert found.variances["pair"] == pytest.approx(pair.var(ddof=1), rel=0.15)
    assert found.variances["seed"] == pytest.approx(np.var(of_seed, ddof=1), rel=0.25)
    for effect in ("seed × block", "seed × pair", "block × pair", "seed × block × pair"):
        assert abs(found.variances[effect]) < 5e-5
    # an image moves a cell by 0.1, and 64 tokens are counted
    assert found.noise == pytest.approx(0.01 + 0.25 / 64, rel=0.1)
    shares = found.shares(256)
    assert sum(shares.values()) == pytest.approx(1) and min(shares.values()) >= 0


def test_pure_noise_has_no_reliability_and_plans_that_overlap_as_random_ones():
    rng = np.random.default_rng(4)
    signals, overlaps = [], []
    for _ in range(60):
        one = tally(rng, np.full(6, 0.5), 128)
        signals.append(profile(with_noise([one], 0)).signal)
        overlaps.append(agreement(one.sample_rates(64)[:, :, 0, 0]).overlap[0, 1])
    assert abs(np.mean(signals)) < 3.5 * np.std(signals) / math.sqrt(60)
    assert abs(np.mean(overlaps) - 0.5) < 3.5 * np.std(overlaps) / math.sqrt(60)


def test_reliability_is_the_correlation_of_two_samples():
    """Over many models; and a sample's reliability says at which number of images it is reached."""
    rng = np.random.default_rng(5)
    found, correlations = [], []
    for _ in range(80):
        one = tally(rng, 0.5 + rng.normal(0, 0.02, 12), 128)
        found.append(profile(with_noise([one], 0)))
        first, second = one.sample_rates(64)[:, :, 0, 0]
        correlations.append(np.corrcoef(first, second)[0, 1])
    expected = np.mean([one.within for one in found])
    noise = np.mean([one.noise for one in found])
    assert expected == pytest.approx(0.02**2, rel=0.15)
    assert np.mean(correlations) == pytest.approx(expected / (expected + noise / 64), abs=0.06)


def test_intervals_of_the_signal_cover_it():
    rng = np.random.default_rng(6)
    rates = 0.5 + np.linspace(-0.02, 0.02, 6)
    true = rates.var(ddof=1) / (0.1**2 + np.mean(rates * (1 - rates) - 0.01) / 50)
    covered = [
        one.signal.low <= true <= one.signal.high
        for one in (reliability([tally(rng, rates, 200)], 0) for _ in range(120))
    ]
    assert 0.87 <= np.mean(covered) <= 0.99
    one = reliability([tally(rng, rates, 200)], 0)
    assert one.at(one.images_for(0.8).value).value == pytest.approx(0.8)
    assert one.images_for(0.8).low < one.images_for(0.8).value < one.images_for(0.8).high


def test_intervals_of_rates_and_of_differences_cover_them():
    rng = np.random.default_rng(7)
    hits = 0
    for _ in range(100):
        first, second = (tally(rng, np.array([rate]), 64) for rate in (0.4, 0.45))
        low, high = intervals([(1.0, first), (-1.0, second)])[0, 0, 0, 1:]
        hits += low <= -0.05 <= high
    assert 88 <= hits <= 100


def test_what_blocks_have_in_common_is_told_from_what_is_one_models_own():
    rng = np.random.default_rng(8)
    common, own = rng.normal(0, 0.05, 8), rng.normal(0, 0.05, (4, 8))
    shared = reliability([tally(rng, 0.5 + common, 128) for _ in range(4)], 0)
    apart = reliability([tally(rng, 0.5 + own[s], 128) for s in range(4)], 0)
    assert shared.at(256).low > 0.9 and apart.at(256).low > 0.9  # within a model both are real
    assert shared.across(256).low > 0.9
    assert apart.across(256).value < 0.4 and apart.across(256).low == 0


def test_rules_and_views_are_counted_as_they_say():
    found = measurement(units=64, blocks=3, tasks=("a", "b", "c"), ratios=(10.0, 100.0), batch=8, sample=32)
    counts = found.views["tokens"]
    moment = moment_of(found)
    assert moment.default == 1
    for kind, axes in ((BLOCKS, (0, 2)), (PAIRS, (0, 1))):
        valid = counts.valid.sum(axes)[:, None]
        letter = valid + counts.absent.sum(axes)[:, None]
        negative, zero = (x[:, :, :, 1].sum(axes) for x in (counts.negative, counts.zero))
        for rule, expected in (
            (AT_MOST, (negative + zero) / valid),
            (BELOW, negative / valid),
            (LETTER, (negative + zero + counts.absent.sum(axes)[:, None]) / letter),
        ):
            np.testing.assert_allclose(moment.default_tally(kind, rule=rule).rates[:, 0], expected)
    cells = (counts.negative + counts.zero)[:32, :, :, 1].sum(0) / counts.valid[:32].sum(0)[..., None]
    np.testing.assert_allclose(moment.default_tally(CELLS).sample_rates(32)[0, :, 0], cells.reshape(9, 2))


def test_images_for_a_plan_are_those_from_which_on_it_stays():
    def sizes(*overlaps):
        return {n: {"overlap": overlap} for n, overlap in zip((64, 256, 1024), overlaps, strict=True)}

    high, low = Interval(0.95, 0.92, 0.99), Interval(0.8, 0.7, 0.93)
    assert images_for_overlap(sizes(low, high, high), 64) == (256, 64, 256)
    assert images_for_overlap(sizes(high, low, high), 64) == (1024, 64, 1024)  # by accident at 64
    assert images_for_overlap(sizes(low, low, low), 64) == (math.inf, 64, math.inf)
    own = {**sizes(high, high, high), "own": {"overlap": low}}
    assert images_for_overlap(own, 256).value == 1024  # the product's own samples do not agree at 256


def test_half_of_the_items_are_chosen():
    assert [quota(n) for n in (1, 3, 6, 12)] == [1, 2, 3, 6]


def test_a_measurement_keeps_what_was_saved(tmp_path):
    found = measurement(units=32, blocks=2, tasks=("a", "b"), ratios=(100.0,), batch=8, sample=16)
    found.save(tmp_path / "one.npz")
    assert Measurement.load(tmp_path / "one.npz").digest == found.digest


def test_what_has_no_interval_shows_none():
    few = reliability([Tally(*(np.ones(shape, int) for shape in ((16, 3, 1, 2), (16, 3))))], 0)
    assert np.isnan([*few.at(64)[1:], *few.sharpness(64)[1:]]).all()
