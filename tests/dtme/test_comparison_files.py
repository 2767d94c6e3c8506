"""A comparison in a folder goes on where it was ended; one in a file is read again, or refused."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

import dtme
from dtme.comparison.result import Cost
from dtme.comparison.statistics import seeds_needed
from dtme.comparison.verdict import verdict
from tests.dtme.comparing import LOSSES, compared, loaders

ARMS = ("joint", "longer", "conflict")
CALLS = {"left": math.inf}


def interrupted_loss(prediction, target):
    """Ctrl-C after some calls."""
    CALLS["left"] -= 1
    if CALLS["left"] < 0:
        CALLS["left"] = math.inf
        raise KeyboardInterrupt
    return F.mse_loss(prediction, target)


def run(folder=None, arms=ARMS, seeds=2, **options):
    losses = {**LOSSES, "sum": interrupted_loss}
    return compared(arms=arms, seeds=seeds, budget=8, share=0.5, losses=losses, folder=folder, **options)


def bits(found):
    return found.metrics, found.plans, [[cost.steps for cost in costs] for costs in found.costs.values()]


@pytest.fixture(scope="module")
def whole():
    return run()


def test_one_that_is_ended_early_goes_on_to_the_same_bits(whole, tmp_path):
    counts = []
    for calls in (9, 23, 26):  # the rehearsal takes 7: in the joint part, in "longer", and in the second seed
        CALLS["left"] = calls
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
        counts.append(len(list(tmp_path.glob("runs/*.json"))))
    assert counts == [0, 1, 3]
    assert bits(run(tmp_path)) == bits(whole)
    assert len(list(tmp_path.glob("runs/*.json"))) == 6 and not list(tmp_path.glob("starts/*"))


def test_finished_runs_are_taken_and_others_added(whole, tmp_path):
    first = run(tmp_path, arms=("joint", "conflict"), seeds=1)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*.json")}
    state = torch.get_rng_state()
    more = run(tmp_path)
    assert torch.equal(torch.get_rng_state(), state) and not more.notes
    assert bits(more) == bits(whole) and first.metrics["conflict"]["sum"] == whole.metrics["conflict"]["sum"][:1]
    assert len(kept) == 2 and all(path.stat().st_mtime_ns == time for path, time in kept.items())
    CALLS["left"] = 0  # nothing is missing, so nothing is run
    assert bits(run(tmp_path)) == bits(whole) and CALLS["left"] == 0
    CALLS["left"] = math.inf


def test_another_setting_is_named_and_damage_is_found(tmp_path):
    mine = {"mine": dtme.ExpansionPlan(("sum", "sign"), 1, {"layers.0": ("sum", "sign")})}
    run(tmp_path, arms=("joint", mine), seeds=1)
    for options, said in (
        ({"lr": 2e-3}, r"another lr: \[0.001\], not \[0.002\]"),
        ({"num_tokens": 3}, "another num_tokens: 2, not 3"),
        ({"loaders": loaders(val=loaders()["train"])}, "another data"),
        ({"arms": ("joint", {"mine": dtme.ExpansionPlan(("sum", "sign"), 2)})}, "another arm 'mine'"),
    ):
        with pytest.raises(ValueError, match=said):
            run(tmp_path, **{"arms": ("joint",), "seeds": 1, **options})
    file = tmp_path / "runs" / "seed-0-mine.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "metrics": {"sum": 0.5, "sign": 0.5}}))
    with pytest.raises(ValueError, match=r"seed-0-mine.json is damaged, or was changed"):
        run(tmp_path, arms=("joint", mine), seeds=1)
    file.write_text(file.read_text()[:50])
    with pytest.raises(ValueError, match=r"seed-0-mine.json is not valid JSON"):
        run(tmp_path, arms=("joint", mine), seeds=1)


def made(gains, **options):
    """A comparison of metrics that are given as gains in % over joint training, which has 1."""
    seeds = tuple(range(len(next(iter(gains.values())))))
    gains = {"joint": [0.0] * len(seeds), **gains}
    return dtme.Comparison(
        tasks={"acc": "higher", "error": "lower"},
        arms=tuple(gains),
        seeds=seeds,
        metrics={
            arm: {"acc": tuple(1 + g / 100 for g in values), "error": tuple(1 - g / 100 for g in values)}
            for arm, values in gains.items()
        },
        costs={arm: tuple(Cost(100, 1.5, 600, 90.0) for _ in seeds) for arm in gains},
        plans={},
        budget=600,
        start=150,
        **options,
    )


def test_a_saved_comparison_is_the_same_again(whole, tmp_path):
    whole.save(tmp_path / "found.json")
    again = dtme.Comparison.load(tmp_path / "found.json")
    assert again == whole and str(again) == str(whole)
    nan = math.nan
    gone = made({"conflict": [nan, 1.0, 2.0]}, diverged={"conflict": {0: "the loss is inf"}}, notes=("note: a",))
    gone.save(tmp_path / "gone.json")
    assert str(dtme.Comparison.load(tmp_path / "gone.json")) == str(gone)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 9}, "version 9"),
        ({"format": "dtme.ConflictReport"}, "not a dtme.Comparison"),
        ({"budget": "many"}, "budget"),
        ({"seeds": [0]}, "must have 1 seeds, and has 3"),
        ({"arms": ["conflict"]}, "needs tasks, seeds and the arm 'joint'"),
        ({"tasks": {"acc": "up"}}, "one of"),
        ({"more": 1}, "unknown field 'more'"),
        ({"margin": 1.0}, "is damaged, or was changed"),
    ],
)
def test_a_damaged_file_is_refused(change, said, tmp_path):
    file = tmp_path / "found.json"
    made({"conflict": [1.0, 2.0, 3.0]}).save(file)
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=said) as caught:
        dtme.Comparison.load(file)
    assert "found.json" in str(caught.value)


# --- what it says -----------------------------------------------------------------------------------------------------


def test_delta_m_is_relative_to_joint_training_of_the_seed():
    found = made({"conflict": [1.0, 3.0]})
    assert found.delta_m("conflict") == pytest.approx((1, 3)) and found.gains("conflict")["error"] == pytest.approx(
        (1, 3)
    )
    difference = found.difference("conflict").difference
    assert difference.mean == pytest.approx(2) and difference.half_width == pytest.approx(12.7062, rel=1e-4)
    with pytest.raises(ValueError, match="arm must be one of"):
        found.difference("lora")


def test_the_random_plans_of_a_seed_count_by_their_mean():
    found = made({"conflict": [3.0, 3.1, 3.0], "random-1": [1.0, 1.0, 1.0], "random-2": [2.0, 2.2, 2.0]})
    (_, answer) = found.answers
    assert answer.others == ("random-1", "random-2") and answer.mean == pytest.approx((1.5 + 1.5 + 1.5) / 3)
    assert answer.verdict.word == "better" and "the mean of 2 random plans" in answer.question


ADVICE = {
    "better": ({"conflict": [3.0, 3.1, 3.2]}, "Expand by conflict: it is better than everything"),
    "worse": ({"conflict": [-3.0, -3.1, -3.2]}, "Keep joint training: expanding by conflict is worse than it"),
    "equal": ({"conflict": [0.0, 0.1, -0.1]}, "Keep joint training: expanding by conflict is no better"),
    "open": ({"conflict": [1.0, -0.5, 2.0]}, "Run .* more seeds, seeds=.*, which should settle the first question"),
    "hopeless": ({"conflict": [40.0, -40.0, 1.0]}, "Take it as undecided"),
    "longer": ({"conflict": [3.0, 3.1, 3.2], "longer": [3.0, 3.2, 3.1]}, "Train jointly for longer"),
    "adapter": ({"conflict": [3.0, 3.1, 3.2], "lora": [6.0, 6.1, 6.3]}, "Use lora"),
    "anywhere": (
        {"conflict": [3.0, 3.1, 3.2], "random": [3.0, 3.2, 3.1]},
        "Which blocks get the modules matters little",
    ),
    "one seed": ({"conflict": [3.0]}, "One seed cannot decide anything: run 4 more, seeds=5"),
    "no question": ({"lora": [3.0, 3.0]}, "add it to the arms"),
}


@pytest.mark.parametrize("case", ADVICE)
def test_what_to_do_next(case):
    gains, said = ADVICE[case]
    found = made(gains)
    last = str(found).splitlines()[-1]
    assert last.startswith("Next: ")
    import re

    assert re.search(said, last)
    if case == "open":
        more = max(answer.more for answer in found.answers)
        assert f"Run {more} more seeds, seeds={3 + more}" in last and not found.settled


def test_a_diverged_arm_is_never_better_nor_what_it_is_measured_by_worse():
    gains = {"conflict": [3.0, 3.1, 3.2, math.nan], "longer": [0.0, 0.1, 0.0, 0.1]}
    why = {"diverged": {"conflict": {3: "the loss of 'acc' is nan at step 7"}}}
    found = made(gains, **why)
    assert found.difference("conflict").word == "not settled" and found.difference("conflict").difference.n == 3
    assert found.difference("longer", "conflict").word == "not settled"
    assert "Runs of conflict diverged" in found.next_step and "seed 3: the loss of 'acc'" in str(found)


def test_what_a_divergence_leaves_open():
    reason = "the loss of 'acc' is nan at step 7"
    nan = math.nan
    alike = {"conflict": [0.0, 0.1, -0.1, 0.0]}
    assert made(alike).difference("conflict").word == "no difference"
    lost = made({"conflict": [0.0, 0.1, -0.1, nan]}, diverged={"conflict": {3: reason}})
    assert lost.difference("conflict").word == "not settled"
    joint = made({"conflict": [3.0, 3.1, 3.2, nan]}, diverged={"joint": {3: reason}})
    assert "Runs of joint diverged" in joint.next_step


def test_seeds_without_a_delta_m_are_not_left_out_by_their_result():
    found = made({"conflict": [3.0, 3.1, 3.2, 3.0]})
    assert found.difference("conflict").word == "better"
    metrics = {arm: {**values, "acc": (*values["acc"][:3], -1.0)} for arm, values in found.metrics.items()}
    found = dtme.Comparison(**{**vars(found), "metrics": metrics})
    assert found.difference("conflict").word == "not settled" and "More seeds do not settle" in found.next_step


def test_costs_are_those_of_the_runs_that_did_not_diverge():
    found = made({"conflict": [3.0, math.nan], "lora": [math.nan] * 2})
    costs = {**found.costs, "conflict": (Cost(100, 1.5, 600, 90.0), Cost(0, math.nan, 3, 0.0))}
    diverged = {"conflict": {1: "why"}, "lora": {0: "why", 1: "why"}}
    text = str(dtme.Comparison(**{**vars(found), "costs": costs, "diverged": diverged}))
    (row,) = [line for line in text.splitlines() if line.startswith("conflict ")]
    assert row.split()[-5:] == ["100", "1.50", "×", "90.0", "s"]
    (row,) = [line for line in text.splitlines() if line.startswith("lora ")]
    assert row.split()[-3:] == ["-", "-", "-"]


def test_seeds_that_do_not_count_from_zero_are_added_to():
    found = made({"conflict": [1.0, -0.5, 2.0]})
    found = dtme.Comparison(**{**vars(found), "seeds": (10, 11, 15)})
    assert "more seeds, other than 10, 11, 15, which" in found.next_step


@pytest.mark.parametrize(
    ("differences", "word"),
    [
        ([1.0, 1.1, 1.2], "better"),
        ([-1.0, -1.1, -1.2], "worse"),
        ([0.0, 0.1, -0.1], "no difference"),
        ([0.0, 0.0], "no difference"),
        ([2.0, 2.0, 2.0], "not settled"),
        ([0.1, 0.1], "no difference"),
        ([3.0, -1.0, 2.0], "not settled"),
        ([3.0], "not settled"),
        ([], "not settled"),
    ],
)
def test_verdicts(differences, word):
    assert verdict(differences).word == word


def test_the_seeds_of_a_verdict_settle_it_by_either_end():
    spread = [math.sqrt(1.5) * x for x in (-1, 0, 1)]  # of standard deviation 1.22
    for mean, effect in ((0.45, 0.45), (0.25, 0.25), (0.05, 0.45), (-0.4, 0.4), (2.0, 2.0)):
        found = verdict([mean + x for x in spread])
        assert found.seeds == seeds_needed(found.difference.sd, effect) and found.more == max(1, found.seeds - 3)
    with pytest.raises(ValueError, match="margin must be a positive number of points, got 0"):
        verdict([1.0], 0)


def test_one_seed_has_no_intervals():
    text = str(made({"conflict": [3.0], "longer": [1.0]}))
    rows = [line for line in text.splitlines() if line.startswith(("joint ", "conflict ", "longer "))]
    assert len(rows) == 3 and not any("±" in row for row in rows)
    assert text.count("cannot decide anything") == 4  # the legend, two questions, and what to do


def test_a_metric_that_nothing_is_relative_to_is_said():
    found = made({"conflict": [1.0, 2.0]})
    negative = {arm: {**values, "acc": (-1.0, -1.0)} for arm, values in found.metrics.items()}
    found = dtme.Comparison(**{**vars(found), "metrics": negative})
    assert all(map(math.isnan, found.delta_m("conflict"))) and "Δm is not known" in str(found)
    assert "Not known" in str(found.answers[0])


def test_pictures(tmp_path):
    many = {"longer": [0.5, 0.2, 0.9], "conflict": [1.0, 2.0, 1.6], "lora": [math.nan] * 3}
    why = {"lora": dict.fromkeys(range(3), "the loss is nan")}
    for number, found in enumerate((made(many, diverged=why), made({"conflict": [3.0]}), made({"longer": [1.0, 1.0]}))):
        found.plot(tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").stat().st_size > 5_000
    found.plot(tmp_path / "also.svg")
    assert "Δm over joint training" in (tmp_path / "also.svg").read_text() or (tmp_path / "also.svg").stat().st_size
