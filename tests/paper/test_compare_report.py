"""The page on placements and adapters: it finds what was planted, and says what it does not know."""

import json
import math
import re

import numpy as np
import pytest
from scipy import stats

from benchmarks.paper.compare.answer import answer
from benchmarks.paper.compare.chance import beaten, rank_by_chance, ratio_of_means, spread_within
from benchmarks.paper.compare.folders import METHOD, RANDOM
from benchmarks.paper.compare.numbers import numbers
from benchmarks.paper.compare.page import page
from benchmarks.paper.compare.prediction import OVERALL, reached_by_chance
from benchmarks.paper.compare.questions import QUESTIONS, printed_pairs, printed_shares
from tests.paper.compare_folders import BLOCKS, TITLE, compared, edit, found, noisy, one_block, planted
from tests.paper.result_folders import TASKS, rows, section

T5 = 2.7764451  # of Student's t, 97.5 % at 4 degrees of freedom
SD = math.sqrt(0.625)  # of NOISE


def claim(findings, key):
    return next(one for one in findings.claims if one.key == key)


# ---- claims


def test_planted_differences_have_their_verdicts_and_intervals(tmp_path):
    findings = found(planted(tmp_path).path)
    one = claim(findings, "joint").evidence[0]
    assert one.estimate.mean == pytest.approx(3.0) and one.word == "holds" and one.sides == pytest.approx((0, 3))
    assert one.estimate.half_width == pytest.approx(T5 * SD / math.sqrt(5))
    random = claim(findings, "random").evidence[0]  # the mean over both plans at every seed, whose noise is the same
    assert random.estimate.mean == pytest.approx(2.0) and random.estimate.sd == pytest.approx(0, abs=1e-9)
    words = {c.key: c.evidence[0].word for c in findings.claims if c.evidence}
    assert words == {
        "joint": "holds",
        "longer": "no difference",
        "longer-joint": "holds",
        "random-joint": "holds",
        "random": "holds",
        "reverse": "does not hold",
        "lora": "not settled",
        "bitfit": "holds",
    }
    assert claim(findings, "swap").untested == [TITLE]


def test_what_is_not_settled_says_how_many_seeds_would(tmp_path):
    findings = found(planted(tmp_path).path)
    lora = claim(findings, "lora").evidence[0]
    n = 2  # differences are 3 times NOISE around 0, so that half a point, the margin, is to be found
    while stats.t.ppf([0.975, 0.8], n - 1).sum() * 3 * SD / math.sqrt(n) > 0.5:
        n += 1
    assert lora.seeds == n and 150 < n < 200
    table = section(page(findings, []), "Claims")
    assert f"not settled: {int(lora.seeds)} seeds in all" in table


def test_one_seed_settles_nothing_and_has_no_interval(tmp_path):
    folder = compared(tmp_path, {"tm+te": 3.0, "random": 1.0}, seeds=range(1))
    findings = found(folder.path)
    one = claim(findings, "random").evidence[0]
    assert one.word == "not settled" and math.isnan(one.seeds) and one.estimate.mean == pytest.approx(2)
    text = page(findings, [])
    assert "not settled: one seed has no interval" in text and "is not settled against random blocks" in text
    assert not re.search(r"\bnan\b", text)
    assert numbers(findings)["claims"]["random"]["settings"][TITLE]["low"] is None


def test_seeds_are_paired_and_missing_ones_left_out(tmp_path):
    folder = compared(tmp_path, {"tm+te": noisy(3.0), "random": [9.0, None, 1.0, None, 2.0]})
    (folder.path / "runs" / "tm+te.seed-0.json").unlink()
    one = claim(found(folder.path), "random").evidence[0]
    assert one.by_seed == pytest.approx({2: 3.0 - 1.0, 4: 4.0 - 2.0})
    assert one.sides == pytest.approx((1.5, 3.5))


def test_gains_are_over_joint_training_though_there_are_single_task_runs(tmp_path):
    folder = compared(tmp_path, {"single": 0.0, "tm+te": noisy(3.0)})
    for path in (folder.path / "runs").glob("single*"):
        path.unlink()
    folder.single()
    setting = found(folder.path).settings[TITLE]
    assert setting.comparison.reference == "single"
    assert list(setting.arms[METHOD].delta_m.values()) == pytest.approx(noisy(3.0))


def test_paper_numbers_are_those_of_the_printed_tables():
    keys = {question.key: question for question in QUESTIONS}
    assert printed_shares() == pytest.approx({"NYUD-v2": 0.504, "PASCAL-Context": 0.689}, abs=1e-3)
    assert printed_pairs(keys["swap"]) == [("NYUD-v2, ViT-T", -2.608, 0.044)]
    assert printed_pairs(keys["longer"]) == []
    assert [where for where, *_ in printed_pairs(keys["imtl"])] == [
        f"Taskonomy, ViT-{size}" for size in ("B", "L", "S", "T")
    ]


def test_first_paragraph_follows_the_numbers(tmp_path):
    gains = {"tm+te": noisy(3.0), "random": noisy(1.0), "lora": noisy(1.0), "shared": noisy(5.0)}
    good = compared(tmp_path / "good", gains).path
    bad = compared(tmp_path / "bad", {"tm+te": noisy(1.0), "random": noisy(2.0)}).path
    text = answer(found(good, bad))
    assert f"beats chance in 1 of 2 settings ({TITLE} (good): +2.00 [+2.00, +2.00] points, 5 seeds)" in text
    assert "does worse than chance in 1 of 2 settings (rooms, small, 2 tasks (bad): -1.00" in text
    assert "(good): beats lora, loses to shared; rooms, small, 2 tasks (bad): not tested." in text
    assert "is not tested against longer joint training in 2 of 2 settings" in text


# ---- from one setting to another


def test_more_tasks_and_pretrained_weights(tmp_path):
    many = {**TASKS, "normals": TASKS["depth"]}
    few = compared(tmp_path / "a", {"tm+te": noisy(1.0)}, options={"tasks": list(TASKS)})
    more = compared(tmp_path / "b", {"tm+te": noisy(3.0)}, tasks=many, options={"tasks": list(many)})
    other = compared(tmp_path / "c", {"tm+te": noisy(9.0)}, tasks=many, options={"tasks": list(many)}, steps=7)
    for name, folder in (("/x/vit", few), ("untrained:/x/vit", other)):
        settings = json.loads((folder.path / "experiment.json").read_text())["settings"]
        edit(folder, settings=settings | {"backbone": name})
    findings = found(few.path, more.path, other.path)
    assert claim(findings, "tasks").evidence == [] == claim(findings, "pretrained").evidence
    settings = json.loads((few.path / "experiment.json").read_text())["settings"]
    edit(few, settings=settings | {"backbone": "small"})
    drawn = compared(tmp_path / "d", {"tm+te": noisy(1.0)}, options={"tasks": list(TASKS)})
    learnt = compared(tmp_path / "e", {"tm+te": noisy(2.0)}, options={"tasks": list(TASKS)})
    for name, folder in (("untrained:/x/vit", drawn), ("/x/vit", learnt)):
        settings = json.loads((folder.path / "experiment.json").read_text())["settings"]
        edit(folder, settings=settings | {"backbone": name})
    findings = found(few.path, more.path, drawn.path, learnt.path)
    tasks, pretrained = (claim(findings, key).evidence for key in ("tasks", "pretrained"))
    assert [one.estimate.mean for one in tasks] == pytest.approx([2.0])
    assert tasks[0].setting == "rooms, small, 2 tasks → rooms, small, 3 tasks"
    assert [one.estimate.mean for one in pretrained] == pytest.approx([1.0]) and pretrained[0].word == "holds"
    assert "/x" not in page(findings, [])


# ---- chance


def test_random_plans_are_pooled_by_seed_and_the_method_ranked_among_them(tmp_path):
    gains = {"tm+te": noisy(3.0), "random": [0, 1, 2, 3, 4], "random-2": [4, 4, 4, 4, None], "random-3": [9] * 5}
    findings = found(compared(tmp_path, gains).path)
    setting, one = findings.settings[TITLE], findings.chances[TITLE]
    assert list(setting.arms[RANDOM].delta_m.values()) == pytest.approx([13 / 3, 14 / 3, 5, 16 / 3, 6.5])
    assert {arm.name for arm in setting.shown} == {"joint", "tm+te", RANDOM}
    # by conflict: 2, 2.5, 3, 3.5, 4, so that a tie stands in the last place
    assert list(one.ranks.values()) == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1 / 3, 0.25], abs=0.01)
    assert one.plans == {0: 3, 1: 3, 2: 3, 3: 3, 4: 2}
    squares = [np.var(group) * len(group) for group in ([0, 4, 9], [1, 4, 9], [2, 4, 9], [3, 4, 9], [4, 9])]
    assert one.spread.value == pytest.approx(math.sqrt(sum(squares) / 9)) and one.spread.low < one.spread.value
    assert any("random plans, there are only 2 at seed 4" in note for note in findings.notes)


def test_rank_counts_ties_half_and_chance_is_around_one_half():
    assert beaten(2.0, [1.0, 2.0, 3.0, 0.0]) == pytest.approx(0.625)
    assert rank_by_chance([8]) == (0.0, 1.0)
    low, high = rank_by_chance([8] * 5)
    deviation = math.sqrt((8 + 2) / (12 * 8) / 5)  # of the mean of five uniform ranks 0, 1/8, ..., 1
    assert low == pytest.approx(0.5 - 1.96 * deviation, abs=0.03) and low + high == pytest.approx(1, abs=0.03)
    assert all(math.isnan(end) for end in rank_by_chance([]))
    assert math.isnan(spread_within([[1.0], [2.0]]).value)


def test_share_of_the_gain_by_fieller(tmp_path):
    top, bottom = np.array([1.0, 1.6, 0.8, 1.2, 0.9]), np.array([3.0, 2.5, 3.5, 3.2, 2.8])
    share = ratio_of_means(top, bottom)
    assert share.value == pytest.approx(top.mean() / bottom.mean())
    for end in (share.low, share.high):  # just where the difference stops being other than 0
        difference = top - end * bottom
        assert abs(difference.mean()) / (difference.std(ddof=1) / math.sqrt(5)) == pytest.approx(T5)
    assert math.isnan(ratio_of_means(top, bottom - 3).value)  # the gain's own interval holds 0
    assert math.isnan(ratio_of_means([1.0], [2.0]).value)
    gains = {"tm+te": bottom.tolist(), "random": top.tolist()}
    chance = found(compared(tmp_path, gains).path).chances[TITLE]
    assert chance.share == pytest.approx(share) and chance.has_gain


def test_there_is_no_share_of_no_gain(tmp_path):
    gains = {"tm+te": noisy(0.1), "random": noisy(0.5)}
    findings = found(compared(tmp_path, gains).path)
    assert not findings.chances[TITLE].has_gain and math.isnan(findings.chances[TITLE].share.value)
    table = rows(section(page(findings, []), "What chance alone reaches"))
    assert table[TITLE]["share of the gain %"] == "no gain to take a share of"


# ---- arms and costs


def test_arms_have_their_costs_and_holm_is_over_the_shown_arms(tmp_path):
    findings = found(planted(tmp_path).path)
    setting = findings.settings[TITLE]
    per = findings.costs[TITLE]
    assert per[METHOD].compute.mean == pytest.approx(3.0 / 2.5) and per[METHOD].cpu.mean == pytest.approx(3.0 / 1.5)
    assert per["lora"].compute.n == 0  # its runs do not say
    adjusted = {name: test.p for name, test in setting.against_joint.items()}
    p = {name: test.difference.p for name, test in setting.against_joint.items()}
    assert adjusted.keys() == {"tm+te", "longer", "reverse", "lora", "bitfit", RANDOM}
    assert adjusted["reverse"] == pytest.approx(6 * p["reverse"])
    assert RANDOM not in setting.against_random and "joint" not in setting.against_random
    table = rows(section(page(findings, []), f"Arms: {TITLE}"))
    assert table["tm+te"]["Δm over joint %"] == f"+3.00 ± {T5 * SD / math.sqrt(5):.2f}"
    assert table["tm+te"]["compute"] == "3.50" and table["tm+te"]["CPU × joint"] == "2.50"
    assert "per added compute, tm+te (+1.20" in page(findings, [])


def test_unequal_tuning_is_said_loudly(tmp_path):
    tried = {"0.001": 0.0, "0.003": 1.0, "0.009": None}
    tuned = {arm: {"lr": 1e-3, "tried": tried} for arm in ("joint", "tm+te", "lora")}
    gains = {"tm+te": noisy(1.0), "lora": noisy(0.5)}
    alike = found(compared(tmp_path / "a", gains, tuned=tuned).path)
    assert not alike.tunings[TITLE].warning and "chosen among 3 rates" in page(alike, [])
    tuned["lora"] = {"lr": 1e-3, "tried": {**tried, "0.027": -9.0}, "is_at_edge": False}
    beyond = found(compared(tmp_path / "d", gains, tuned=tuned).path)
    assert not beyond.tunings[TITLE].warning
    assert "at an end for lora, where one beyond it was tried as well, and not chosen" in page(beyond, [])
    tuned["lora"] = {"lr": 0.027, "tried": {**tried, "0.027": 2.0}, "is_at_edge": True}
    other = found(compared(tmp_path / "b", gains, tuned=tuned).path)
    assert "ARMS WERE NOT TUNED ALIKE: lora at 4; joint, tm+te at 3 learning rates" in page(other, [])
    assert other.notes[0].startswith(f"{TITLE}: ARMS WERE NOT TUNED ALIKE")
    assert found(compared(tmp_path / "c", gains).path).tunings[TITLE].warning == ""


def test_different_rates_that_nobody_tuned_are_said(tmp_path):
    folder = compared(tmp_path, {"tm+te": noisy(1.0)})
    folder.run("tm+te", 0, 1.0, settings={"lr": 5e-5, "steps": 100})
    assert "ARMS HAVE DIFFERENT LEARNING RATES" in found(folder.path).notes[0]


# ---- prediction


def test_gains_that_follow_the_rates_are_predicted(tmp_path):
    def gain(kind, block, seed):
        return (block if kind == "tm" else -block) + 0.3 * math.sin(7 * seed + block)

    findings = found(one_block(tmp_path, gain, range(6)).path)
    tm, te = (findings.predictions[TITLE][kind] for kind in ("tm", "te"))
    assert tm.correlations["range"][OVERALL].of_means.value == pytest.approx(1)
    assert tm.correlations["gains"][OVERALL].of_means.value == pytest.approx(-1)
    assert tm.correlations["gradient_norms"][OVERALL].of_means.value == 0  # all the same
    assert te.correlations["depth"]["semseg"].of_means.value == pytest.approx(-1)
    assert te.correlations["null"][OVERALL].word(BLOCKS) in ("holds", "not settled")
    assert tm.gains[OVERALL].shape == (6, BLOCKS)
    assert tm.gains[OVERALL][2, 3] == pytest.approx(gain("tm", 3, 2))
    assert tm.common.value > 0.9 and tm.most.value > 0.95
    text = section(page(findings, []), f"Prediction: {TITLE}")
    assert rows(text)["5"]["range rate"] == "60.0 [60.0, 60.0]"


def test_one_seeds_correlations_are_those_of_its_blocks(tmp_path):
    order = {0: (5, 3, 4, 1, 2, 0), 1: (0, 1, 2, 3, 5, 4), 2: (0, 2, 1, 3, 4, 5)}
    folder = one_block(tmp_path, lambda kind, block, seed: float(order[seed][block]), range(3), kinds=("tm",))
    one = found(folder.path).predictions[TITLE]["tm"].correlations["range"][OVERALL]
    expected = [1 - 6 * sum((r - b) ** 2 for b, r in enumerate(ranks)) / (6 * 35) for ranks in order.values()]
    assert list(one.by_seed.values()) == pytest.approx(expected)
    assert one.mean.value == pytest.approx(np.mean(expected)) and math.isnan(one.of_means.low)
    assert one.best == one.mean and one.word(BLOCKS) == "not settled"


def test_the_jackknife_over_seeds_is_that_of_the_means(tmp_path):
    rng = np.random.default_rng(1)
    gains = rng.normal(size=(5, BLOCKS)) + np.arange(BLOCKS)
    folder = one_block(tmp_path, lambda kind, block, seed: gains[seed, block], kinds=("te",))
    one = found(folder.path).predictions[TITLE]["te"].correlations["depth"][OVERALL].of_means

    def rho(values):
        ranks = np.argsort(np.argsort(values.mean(0)))
        return 1 - 6 * ((ranks - np.arange(BLOCKS)) ** 2).sum() / (BLOCKS * (BLOCKS**2 - 1))

    left = [rho(np.delete(gains, i, 0)) for i in range(5)]
    half = T5 * math.sqrt(4 / 5 * ((np.array(left) - np.mean(left)) ** 2).sum())
    assert one.value == pytest.approx(rho(gains))
    assert (one.low, one.high) == pytest.approx((max(-1, rho(gains) - half), min(1, rho(gains) + half)))


def test_noise_is_no_reproducible_gain_and_missing_blocks_leave_out_their_seed(tmp_path):
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(5, BLOCKS))
    folder = one_block(tmp_path, lambda kind, block, seed: noise[seed, block], kinds=("tm",))
    (folder.path / "runs" / "tm-at-3.seed-1.json").unlink()
    findings = found(folder.path)
    one = findings.predictions[TITLE]["tm"]
    assert one.seeds == (0, 2, 3, 4) and one.left_out == (1,)
    values = noise[[0, 2, 3, 4]]
    between = 4 * values.mean(0).var(ddof=1)
    rest = values - values.mean(0) - values.mean(1, keepdims=True) + values.mean()
    within = (rest**2).sum() / 15
    assert one.common.value == pytest.approx((between - within) / (between + 3 * within))
    assert one.common.low < 0.2
    assert "Seeds 1 lack a block" in page(findings, [])


def test_what_random_orders_reach():
    assert reached_by_chance(6) == pytest.approx(0.886, abs=1e-3)  # the tables' two-sided 5 %
    assert reached_by_chance(12) == pytest.approx(0.587, abs=0.01)
    assert reached_by_chance(4) == math.inf
