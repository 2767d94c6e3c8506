"""The report of folders whose effects are known: its tables, its numbers, its notes, and what it refuses."""

import json
import math

import pytest

from benchmarks.paper.report.comparison import compare
from benchmarks.paper.report.folder import read_folder
from benchmarks.paper.report.numbers import as_text
from benchmarks.paper.report.numbers import numbers as numbers_of
from benchmarks.paper.report.page import page
from benchmarks.paper.report.text import decimals, duration, memory, plain, table, without_place
from tests.paper.result_folders import SEED_EFFECT, TASKS, ResultFolder, conflicts, known, rows, section


def report(folder, **options):
    """The page without pictures, which take most of the time, and the numbers."""
    comparison = compare(read_folder(folder.path), **options)
    return page(comparison, []), json.loads(as_text(numbers_of(comparison)))


# --- effects ----------------------------------------------------------------------------------------------------------


def test_known_effects_are_found(tmp_path):
    folder = known(tmp_path, {"joint": -4.0, "tm": -1.0})
    text, numbers = report(folder)
    arms = rows(section(text, "Arms"))
    # seed effects 0, 3, -2, 5, 1: mean 1.4, sd 2.7019; half-width 2.7764 * sd / sqrt(5)
    assert arms["joint"]["Δm % ↑"] == "-2.60 ± 3.35"
    assert arms["tm"]["Δm % ↑"] == "**+0.40 ± 3.35**"
    # paired, what the seeds do to both arms is gone
    assert arms["tm"]["Δm − joint, points (seeds)"] == "**+3.00 ± 0.00 (5)**"
    assert arms["joint"]["Δm − joint, points (seeds)"] == "baseline"
    assert arms["single"]["Δm % ↑"].strip("*") == "0.00"
    assert arms["joint"]["semseg mIoU % ↑"] == "38.96 ± 1.34"  # 40 · (1 - 2.6 %)
    assert arms["joint"]["depth RMSE m ↓"] == "0.5130 ± 0.0168"
    tm = numbers["arms"]["tm"]
    assert tm["difference"]["mean"] == pytest.approx(3) and tm["difference"]["n"] == 5
    assert tm["terms"]["depth"]["by_seed"] == pytest.approx({str(i): -1 + e for i, e in enumerate(SEED_EFFECT)})
    assert numbers["reference"] == "single" and numbers["baseline"] == "joint"


def test_pairs_are_the_seeds_that_both_have(tmp_path):
    folder = known(tmp_path, {"joint": -4.0, "tm": -1.0, "te": -2.0})
    (tmp_path / "runs" / "tm.seed-3.json").unlink()
    (tmp_path / "runs" / "joint.seed-1.json").unlink()
    text, numbers = report(folder)
    arms = rows(section(text, "Arms"))
    assert arms["tm"]["Δm − joint, points (seeds)"] == "**+3.00 ± 0.00 (3)**"
    assert arms["te"]["Δm − joint, points (seeds)"] == "**+2.00 ± 0.00 (4)**"
    assert arms["tm"]["seeds"] == arms["joint"]["seeds"] == "4 of 5" and arms["te"]["seeds"] == "5"
    assert numbers["arms"]["tm"]["difference"]["by_seed"].keys() == {"0", "2", "4"}
    lost = section(text, "Runs that are not in the numbers")
    assert "- joint: seed 1\n" in lost + "\n" and "- tm: seed 3" in lost and "- te" not in lost
    assert "2 are missing" in text
    assert [m["arm"] for m in numbers["missing"]] == ["joint", "tm"]


def test_bold_is_significant_only(tmp_path):
    folder = ResultFolder(tmp_path, ["single", "joint", "large", "noisy", "worse"]).single()
    for seed, noise in enumerate((0.0, 0.3, -0.4, 0.2, -0.1)):
        folder.run("joint", seed, -4.0)
        folder.run("large", seed, {"semseg": 1.0 + noise, "depth": 2.0 - noise})
        folder.run("noisy", seed, -2.0 + 20 * noise)
        folder.run("worse", seed, -9.0 + noise)
    text, numbers = report(folder)
    arms = rows(section(text, "Arms"))
    columns = ["semseg mIoU % ↑", "depth RMSE m ↓", "Δm % ↑", "Δm − joint, points (seeds)"]
    assert all("**" in arms["large"][column] for column in columns)
    assert not any("**" in arms[arm][column] for arm in ("joint", "noisy", "worse") for column in columns)
    # worse is significant, in the other direction
    assert numbers["arms"]["worse"]["difference"]["p_holm"] < 0.001
    assert not numbers["arms"]["worse"]["difference"]["is_better"]
    tests = [numbers["arms"][arm]["difference"] for arm in ("single", "large", "noisy", "worse")]
    assert tests[2]["p"] == tests[2]["p_holm"] > 0.05  # the largest of its family is not changed
    assert tests[1]["p_holm"] > tests[1]["p"]
    differences = rows(section(text, "Tasks"), 1)
    assert (
        differences["large"]["depth RMSE m ↓"].startswith("**-0.03") and differences["worse"]["Holm's p"] == "< 0.001"
    )


def test_holm_takes_the_bold_from_what_many_arms_find_by_chance(tmp_path):
    def make(path, others):
        folder = ResultFolder(path, ["joint", "tm", *others])
        for seed, noise in enumerate((-0.9, -0.5, 0.0, 0.6, 0.8)):
            folder.run("joint", seed)
            folder.run("tm", seed, 1.0 + noise)
            for i, arm in enumerate(others):
                folder.run(arm, seed, (-1) ** i * noise)
        return compare(read_folder(path)).differences["tm"]

    alone, among = make(tmp_path / "few", []), make(tmp_path / "many", [f"other{i}" for i in range(20)])
    assert alone.difference == among.difference and alone.p < 0.05 < among.p
    assert alone.is_better and not among.is_better
    assert among.p == pytest.approx(21 * alone.p)


def test_seeds_that_settle_an_effect(tmp_path):
    folder = ResultFolder(tmp_path, ["joint", "tm"], bases={"semseg": 40.0, "depth": 0.5})
    for seed, gain in enumerate((1.0, 2.0, 3.0, 4.0, 5.0)):
        folder.run("joint", seed)
        folder.run("tm", seed, gain)
    text, numbers = report(folder)
    row = rows(section(text, "How many seeds"))["tm"]
    assert row["standard deviation"] == "1.58" and row["seeds"] == "5"
    assert row["3 points"].startswith("5 (") and row["3 points"].endswith(
        ": settled"
    )  # ((2.776 + 0.941) · 1.58 / 3)² < 4
    assert row["1 points"].startswith("22 (") and row["1 points"].endswith("17 more")
    needed = numbers["arms"]["tm"]["seeds_needed"]
    assert [r["effect"] for r in needed] == [0.5, 1, 3] and [r["is_settled"] for r in needed] == [False, False, True]


# --- what Δm is relative to -------------------------------------------------------------------------------------------


def test_without_single_task_runs_joint_is_the_reference(tmp_path):
    folder = ResultFolder(tmp_path, ["joint", "tm"], range(2))
    for seed in range(2):
        folder.run("joint", seed, -4.0).run("tm", seed, -4.0 + 0.96 * (seed + 1))
    text, numbers = report(folder)
    assert numbers["reference"] == "joint" and "gain over **joint**" in text
    assert rows(section(text, "Arms"))["joint"]["Δm % ↑"] == "0.00"
    assert numbers["arms"]["tm"]["terms"]["semseg"]["by_seed"] == pytest.approx({"0": 1.0, "1": 2.0})  # of 96 % of 40


def test_single_task_runs_that_are_incomplete_at_every_seed_are_not_used(tmp_path):
    folder = ResultFolder(tmp_path, ["single", "joint"], range(2))
    for seed in range(2):
        folder.run("single", seed, task="depth").run("joint", seed, -4.0)
    text, numbers = report(folder)
    assert numbers["reference"] == "joint"
    assert "No seed has the single-task runs of all tasks yet" in text.partition("## Arms")[0]
    assert "- single, semseg: seeds 0, 1" in text and rows(section(text, "Arms"))["single"]["seeds"] == "0 of 2"


def test_a_seed_without_all_single_task_runs_has_no_delta(tmp_path):
    folder = known(tmp_path, {"joint": -4.0, "tm": -1.0})
    (tmp_path / "runs" / "single.depth.seed-2.json").unlink()
    text, numbers = report(folder)
    arms = rows(section(text, "Arms"))
    assert numbers["arms"]["tm"]["delta_m"]["by_seed"].keys() == {"0", "1", "3", "4"}
    assert arms["tm"]["Δm % ↑"].strip("*").endswith("(4)") and arms["tm"]["seeds"] == "5"
    assert "No arm has a Δm at seed 2: single, which Δm is relative to" in text
    assert "- single, depth: seed 2" in text


def test_another_baseline(tmp_path):
    folder = known(tmp_path, {"joint": -4.0, "tm": -1.0})
    text, numbers = report(folder, baseline="tm")
    assert rows(section(text, "Arms"))["joint"]["Δm − tm, points (seeds)"] == "-3.00 ± 0.00 (5)"
    assert numbers["baseline"] == "tm" and numbers["reference"] == "single"


@pytest.mark.parametrize(("value", "why"), [(None, "is not defined"), (math.nan, "is not defined"), (0, "is 0, which")])
def test_a_reference_that_nothing_can_be_relative_to(tmp_path, value, why):
    folder = known(tmp_path, {"joint": -4.0, "tm": -1.0})
    folder.run("single", 1, task="depth", metrics={"depth": value})
    text, numbers = report(folder)
    assert f"No arm has a Δm at seed 1: the metric of depth of single {why}" in text
    assert numbers["arms"]["tm"]["terms"]["depth"]["n"] == 4 and numbers["arms"]["tm"]["terms"]["semseg"]["n"] == 5
    assert numbers["arms"]["tm"]["difference"]["n"] == 4


def test_a_metric_that_is_null(tmp_path):
    folder = known(tmp_path, {"joint": -4.0, "tm": -1.0})
    for seed in range(5):
        folder.run("tm", seed, -1.0, metrics={"semseg": 39.0, "depth": None})
    text, numbers = report(folder)
    row = rows(section(text, "Arms"))["tm"]
    assert row["depth RMSE m ↓"] == row["Δm % ↑"] == row["Δm − joint, points (seeds)"] == "–"
    assert row["semseg mIoU % ↑"].strip("*") == "39.00 ± 0.00"
    assert "tm has no Δm at seeds 0, 1, 2, 3, 4: the metric of depth of tm is not defined." in text
    assert numbers["arms"]["tm"]["difference"]["mean"] is None


# --- runs that are lost -----------------------------------------------------------------------------------------------


def test_diverged_runs_are_a_dash_and_why(tmp_path):
    folder = known(tmp_path, {"joint": -4.0, "tm": -1.0, "gone": 0.0})
    why = {"status": "diverged", "reason": "the loss of 'depth' is nan at step 40", "metrics": {}}
    folder.run("tm", 3, **why)
    for seed in range(5):
        folder.run("gone", seed, **why)
    text, numbers = report(folder)
    arms = rows(section(text, "Arms"))
    assert arms["gone"].pop("arm") == "gone" and arms["gone"].pop("seeds") == "0 of 5, 5 diverged"
    assert set(arms["gone"].values()) == {"–"}
    assert arms["tm"]["seeds"] == "4 of 5, 1 diverged"
    # as good as it gets, but not at every seed
    assert arms["tm"]["Δm − joint, points (seeds)"] == "+3.00 ± 0.00 (4)"
    lost = section(text, "Runs that are not in the numbers")
    assert "- tm, seed 3: the loss of 'depth' is nan at step 40" in lost and "- gone, seed 4:" in lost
    assert numbers["diverged"][0] == {"arm": "tm", "task": None, "seed": 3, "reason": why["reason"]}
    assert numbers["missing"] == []


def test_one_arm_of_one_seed(tmp_path):
    text, numbers = report(ResultFolder(tmp_path, ["joint"], [7]).run("joint", 7, -4.0))
    row = rows(section(text, "Arms"))["joint"]
    assert row["semseg mIoU % ↑"] == "38.40 ± –" and row["Δm − joint, points (seeds)"] == "baseline"
    assert "How many seeds" not in text and numbers["arms"]["joint"]["metrics"]["depth"]["sd"] is None


def test_one_seed_of_two_arms_settles_nothing(tmp_path):
    folder = ResultFolder(tmp_path, ["joint", "tm"], [7]).run("joint", 7, -4.0).run("tm", 7, 5.0)
    text, _ = report(folder)
    assert "**" not in section(text, "Arms").partition("Intervals")[0]
    assert set(list(rows(section(text, "How many seeds"))["tm"].values())[2:]) == {"–"}
    assert rows(section(text, "Tasks"), 1)["tm"]["Holm's p"] == "–"


# --- costs, conflicts, settings ---------------------------------------------------------------------------------------


def test_costs(tmp_path):
    folder = ResultFolder(tmp_path, ["single", "joint", "tm"], range(2)).single(peak_memory=2**30)
    parameters = {"backbone": 9000, "heads": 1000, "added": 25, "combination": 3}
    for seed in range(2):
        folder.run("joint", seed, seconds={"training": 100 + seed, "structure": 0.0, "evaluation": 1.0})
        seconds = {"training": 150 + 1.5 * seed, "structure": 9.0, "evaluation": 1.0}
        folder.run("tm", seed, parameters=parameters, peak_memory=20 * 2**30, seconds=seconds)
    (tmp_path / "runs" / "tm.seed-1.json").unlink()
    text, numbers = report(folder)
    arms = rows(section(text, "Arms"))
    assert arms["tm"]["added parameters"] == "25 (0.250 %)" and arms["tm"]["peak memory"] == "20.0 GiB"
    assert arms["tm"]["× joint"] == "1.50"  # of seed 0, which both have
    # two models of 9,000 + 500 against one of 9,000 + 2 · 500
    assert arms["single"]["added parameters"] == "9,000 (90.000 %)" and arms["single"]["peak memory"] == "1,024 MiB"
    assert arms["single"]["training s"] == "200" and numbers["arms"]["single"]["cost"]["training"]["mean"] == 200
    assert "7 runs took 13 min of wall time" in text or numbers["time"]["runs"] == 7


def test_conflicts_at_the_start_and_the_end(tmp_path):
    folder = ResultFolder(tmp_path, ["joint", "tm", "te"], range(2))
    for seed in range(2):
        folder.run("joint", seed, conflicts={})
        folder.run("tm", seed, conflicts=conflicts((100, 200), (90 - 4 * seed, 300)))
        folder.run("te", seed, conflicts=conflicts((100, 0), (50, 0), valid=1000, valid_at_end=500))
    text, numbers = report(folder)
    part = section(text, "Conflicts")
    table = rows(part)
    assert "joint" not in table
    assert table["tm"]["range, start %"] == "10.0" and table["tm"]["range, end %"] == "8.8"
    assert table["tm"]["range, change of the number %"].startswith("-12.00 ± 25.4")  # -10 and -14
    assert table["tm"]["null, change of the number %"] == "+50.00 ± 0.00"
    assert table["te"]["null, change of the number %"] == "–"  # from none
    assert "differs between start and end for te:" in part  # of half as many pairs
    assert numbers["arms"]["te"]["conflicts"]["range"]["end"] == {"0": 0.1, "1": 0.1}


def test_settings_and_what_runs_differ_in(tmp_path):
    folder = ResultFolder(tmp_path, ["joint", "tm"], range(2), backbone="vit|small")
    for seed in range(2):
        folder.run("joint", seed, settings={"lr": 2e-5, "steps": 100, "tuned": [1e-5, 2e-5]})
        folder.run("tm", seed, settings={"lr": 5e-5, "steps": 100, "tuned": [1e-5, 2e-5]})
    text, _ = report(folder)
    part = section(text, "Settings and versions")
    shared, differing = rows(part.replace("vit\\|small", "vit/small")), rows(part, 1)
    assert shared["backbone"]["value"] == "vit/small" and shared["tuned"]["value"] == "[1e-05, 2e-05]"
    assert "lr" not in shared and differing["joint"]["lr"] == "2e-05" and differing["tm"]["lr"] == "5e-05"
    assert "differ in" not in text.partition("## Arms")[0]


def test_runs_of_different_commits_are_said_first(tmp_path):
    folder = ResultFolder(tmp_path, ["joint", "tm"], range(2))
    for seed in range(2):
        folder.run("joint", seed)
        folder.run("tm", seed, facts={"device": "cpu", "torch": "2.13.0", "commit": f"def{seed}", "dtme": "0.1"})
    text, numbers = report(folder)
    sentence = "The runs differ in commit: abc1234 (2 runs), def0 (1 run), def1 (1 run)."
    assert sentence in text.partition("## Arms")[0] and numbers["notes"][0].startswith(sentence)
    assert text.count("The runs differ in") == 1


def test_titles_that_are_the_same_or_hold_a_bar(tmp_path):
    folder = ResultFolder(tmp_path, {"joint": "a | b", "tm": "same", "te": "same"}, [0])
    for arm in folder.arms:
        folder.run(arm, 0)
    text, _ = report(folder)
    lines = section(text, "Arms").splitlines()
    assert any(line.startswith("| a \\| b ") for line in lines)
    assert any(line.startswith("| same (te) ") for line in lines)


# --- numbers as text --------------------------------------------------------------------------------------------------


def test_numbers_as_text():
    assert plain(-0.001, 2) == "0.00" and plain(0.5, 1, sign=True) == "+0.5" and plain(math.nan, 2) == "–"
    assert (decimals([39.4, -1.0]), decimals([0.0199]), decimals([1234.5]), decimals([math.nan])) == (2, 5, 0, 2)
    assert memory(3 * 2**20) == "3 MiB" and memory(12 * 2**30) == "12.0 GiB" and memory(math.nan) == "–"
    assert (duration(90), duration(600), duration(7200)) == ("90 s", "10 min", "2.0 h")
    assert table(["a", "b"], [["x|y", "1"]]).splitlines() == ["| a    |   b |", "| ---- | --: |", "| x\\|y |   1 |"]


def test_tasks_of_either_direction_count_alike(tmp_path):
    assert TASKS["depth"]["lower_is_better"] and not TASKS["semseg"]["lower_is_better"]
    _, numbers = report(known(tmp_path, {"joint": -4.0, "tm": -1.0}))
    tm = numbers["arms"]["tm"]
    assert tm["terms"]["depth"]["mean"] == pytest.approx(tm["terms"]["semseg"]["mean"])
    assert tm["task_differences"]["depth"]["mean"] == pytest.approx(-0.015)  # 3 % of 0.5, lower
    assert tm["task_differences"]["depth"]["is_better"] and tm["task_differences"]["semseg"]["is_better"]


def test_settings_name_folders_and_not_where_they_lie():
    settings = {
        "root": "/home/someone/data",
        "backbone": "untrained:/mnt/models/dinov2",
        "data": "rooms",
        "size": [32, 32],
    }
    named = {"root": "data", "backbone": "untrained:dinov2", "data": "rooms", "size": [32, 32]}
    assert without_place(settings) == named
