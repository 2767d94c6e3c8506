"""The report on fair joint training: it finds what was planted, and says what it does not know."""

import json
import math

import pytest

from benchmarks.paper.__main__ import main
from benchmarks.paper.fair.answer import answer
from benchmarks.paper.fair.comparison import effects
from benchmarks.paper.fair.figures import draw
from benchmarks.paper.fair.folders import read_studies, read_study
from benchmarks.paper.fair.numbers import as_text, numbers
from benchmarks.paper.fair.page import page
from tests.paper.fair_folders import condition, rates, whole
from tests.paper.result_folders import TASKS, rows, section

T = 4.302653  # of Student's t, 97.5 % at 2 degrees of freedom
T_POWER = 1.060660  # 80 %
HALF = T * 0.3 / math.sqrt(3)


def written(to, *outs):
    """The files of the command: {name: bytes}."""
    main(["fair-report", *map(str, outs), "--to", str(to)])
    return {path.name: path.read_bytes() for path in to.iterdir()}


def report(out):
    """The page, and the numbers of its only study; without the figures, which take most of the time."""
    studies = read_studies([out])
    return page(studies, []), json.loads(as_text(numbers(studies)))["studies"]["rooms, small"]


def refused(to, *outs):
    with pytest.raises(SystemExit) as error:
        main(["fair-report", *map(str, outs), "--to", str(to)])
    assert not to.exists()
    return str(error.value)


# ---- what was planted


def test_planted_negative_transfer_is_found_in_its_task_and_in_no_other(tmp_path):
    joint = read_study(whole(tmp_path)).results["tuned"].transfer["joint"]
    loses, none = joint.tasks["semseg"], joint.tasks["depth"]
    assert (loses.sign, none.sign) == (-1, 0) and joint.with_sign(-1) == ["semseg"]
    assert loses.estimate.mean == pytest.approx(-3) and none.estimate.mean == pytest.approx(0, abs=1e-9)
    for effect in (loses, none, joint.total):
        assert effect.estimate.sd == pytest.approx(0.3)
        assert effect.estimate.half_width == pytest.approx(HALF, rel=1e-6)
        assert effect.smallest == pytest.approx((T + T_POWER) * 0.3 / math.sqrt(3), rel=1e-6)
    assert joint.total.estimate.mean == pytest.approx(-1.5) and joint.total.sign == -1
    assert loses.p == pytest.approx(2 * loses.estimate.p) and none.p == none.estimate.p == pytest.approx(1)


def test_what_tuning_removes_is_paired_by_seed(tmp_path):
    changes = {change.key: change for change in read_study(whole(tmp_path)).changes}
    assert changes.keys() == {"tuning", "steps", "decay", "invpt-weights", "uw"}
    tuning = changes["tuning"].effects
    assert {task: effect.estimate.mean for task, effect in tuning.tasks.items()} == pytest.approx(
        {"semseg": 5.0, "depth": 4.0}
    )
    assert tuning.total.estimate.mean == pytest.approx(4.5)
    assert tuning.total.estimate.sd < 1e-9  # the noise of a seed is in both
    assert changes["steps"].effects.total.estimate.mean == pytest.approx(1.0)
    assert changes["invpt-weights"].effects.total.estimate.mean == pytest.approx(1.25)
    assert changes["decay"].effects.total.is_none and changes["uw"].effects.total.is_none
    sides = changes["tuning"].sides
    assert sides["single"].total.is_none  # the single-task runs were planted the same
    gain = [100 * ((97 + noise) / (92 + noise) - 1) for noise in (-0.3, 0.0, 0.3)]
    assert list(sides["joint"].tasks["semseg"].by_seed.values()) == pytest.approx(gain)


def test_default_joint_against_tuned_single_and_longer_joint(tmp_path):
    mixed = read_study(whole(tmp_path)).mixed
    assert mixed["untuned joint"][1].total.estimate.mean == pytest.approx(-6.0)
    assert mixed["longer joint"][1].tasks["depth"].estimate.mean == pytest.approx(1.0)


def test_lower_is_better_and_the_bases_are_those_of_the_seed(tmp_path):
    folder = condition(tmp_path, "steps-300", {"joint": 0.0})
    for seed in range(3):
        folder.run("single", seed, task="depth", metrics={"depth": 0.4 + 0.1 * seed})
        folder.run("joint", seed, metrics={"semseg": 44.0, "depth": 0.5})
    joint = read_study(tmp_path).results["tuned"].transfer["joint"]
    assert list(joint.tasks["depth"].by_seed.values()) == pytest.approx([-25.0, 0.0, 100 / 6])
    assert joint.tasks["semseg"].sign == 1 and joint.tasks["semseg"].estimate.mean == pytest.approx(10)


def test_one_seed_has_no_interval_and_decides_nothing():
    found = effects({0: -5.0}, {"semseg": {0: -5.0}})
    assert found.total.sign is None and math.isnan(found.total.smallest) and found.with_sign(None) == ["semseg"]


# ---- sentences follow the numbers


def said(tmp_path, gains, name="out"):
    condition(tmp_path / name, "steps-300", {"joint": gains})
    return " ".join(answer(read_study(tmp_path / name)))


def test_the_main_sentence_turns_with_the_numbers(tmp_path):
    loses = said(tmp_path, {"semseg": -3.0, "depth": 0.0}, "a")
    assert "loses on semseg (also after Holm's correction" in loses and "not decided: depth" in loses
    gains = said(tmp_path, {"semseg": 3.0, "depth": 3.0}, "b")
    assert "loses on no task as far as these seeds can tell; it gains on semseg and depth" in gains
    assert "positive transfer" in gains and "negative transfer." not in gains
    # p of depth is 0.03, and 0.06 with Holm's correction
    faint = said(tmp_path, {"semseg": 0.0, "depth": -1.0}, "c")
    assert "loses on depth (not after Holm's correction" in faint


def test_what_is_left_over_all_conditions(tmp_path):
    text = " ".join(answer(read_study(whole(tmp_path / "a"))))
    assert "Under all of the 6" not in text
    assert "semseg (joint, tuned, 300 steps; uw, tuned, 300 steps; joint, the same rates, 600 steps;" in text
    assert "depth (joint, default rate)" in text
    condition(tmp_path / "b", "steps-300", {"joint": -3.0, "uw": {"semseg": -3.0, "depth": 0.0}})
    text = " ".join(answer(read_study(tmp_path / "b")))
    assert "Under all of the 2 conditions and weightings, joint training loses on semseg." in text
    assert "Under some of the 2 only: depth (joint" in text


def test_cost_of_both_sides(tmp_path):
    folder = condition(tmp_path, "steps-300", {"joint": -1.0})
    for seed in range(3):
        folder.run("joint", seed, -1.0, seconds={"training": 80.0}, cpu_seconds=100.0)
    _, study = report(tmp_path)
    ratio = study["conditions"]["tuned"]["single_over_joint"]
    assert ratio["training"]["mean"] == 2.5 and ratio["cpu"]["mean"] == 4.0  # two tasks of 100 and 200 seconds
    assert "take 2.50 ± 0.00 times the training time of one joint run, 4.00 ± 0.00" in " ".join(
        answer(read_study(tmp_path))
    )


# ---- the page


def test_page_and_numbers(tmp_path):
    text, study = report(whole(tmp_path / "out"))
    table = rows(section(text, "rooms, small: from one condition to another"))
    assert table["tuned minus default rate"]["Δm"] == "**+4.50 ± 0.00 higher**"
    assert table["uw minus equal weights"]["Δm"] == "0.00 ± 0.00 the same"
    tuning = rows(section(text, "rooms, small: tuning, tuned, 300 steps"))
    assert tuning["joint"] == {
        "arm": "joint",
        "0.001": "-1.25",
        "0.003": "**+0.50**",
        "0.009": "–",
        "": "at the edge",
    }
    assert tuning["single.depth"][""] == ""
    effect = study["conditions"]["untuned"]["transfer"]["joint"]["tasks"]["semseg"]
    assert effect["mean"] == -8.0 and effect["half_width"] == pytest.approx(HALF, rel=1e-5) and effect["sign"] == -1
    assert study["notes"] == []


def test_the_same_runs_make_the_same_bytes(tmp_path):
    outs = [whole(tmp_path / "a"), condition(tmp_path / "b", "steps-300", {"joint": -1.0}).path.parent]
    one, two = (written(tmp_path / to, *outs) for to in ("one", "two"))
    assert one == two and one.keys() == {"report.md", "fair.json", "transfer.png", "tasks.png"}
    assert all(len(one[name]) < 200_000 for name in one)
    assert "## rooms, small (a)" in one["report.md"].decode() and "## rooms, small (b)" in one["report.md"].decode()


def test_where_files_lie_is_not_in_it(tmp_path):
    condition(tmp_path / "out", "steps-300", {"joint": 0.0}, backbone="/some/where/dinov2", options={"root": "/home/x"})
    files = written(tmp_path / "to", tmp_path / "out")
    for name in ("report.md", "fair.json"):
        text = files[name].decode()
        assert "dinov2" in text and "/some" not in text and "/home" not in text and str(tmp_path) not in text


# ---- what is missing


def test_missing_conditions_are_said_and_the_rest_is_reported(tmp_path):
    condition(tmp_path / "out", "untuned", {"joint": -4.0})
    (tmp_path / "out" / "steps-300").mkdir()  # started, and nothing ended
    (tmp_path / "out" / "steps-300" / "experiment.json").write_text('{"format": 1}')
    text, study = report(tmp_path / "out")
    assert "> - Nothing was run under steps-300, steps-600, decay: what needs it is left out." in text
    assert "Whether there is negative transfer with both tuned is not known" in text
    assert list(study["conditions"]) == ["untuned"] and study["changes"] == {} == study["mixed"]
    assert study["conditions"]["untuned"]["transfer"]["joint"]["delta_m"]["mean"] == -4.0


def test_missing_and_diverged_runs_are_said_and_their_seeds_left_out(tmp_path):
    out = whole(tmp_path / "out")
    (out / "untuned" / "runs" / "single.depth.seed-2.json").unlink()
    path = out / "steps-300" / "runs" / "uw.seed-0.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"status": "diverged", "reason": "the loss is nan"}))
    text, study = report(out)
    assert "> - In untuned, 1 run is missing" in text and "> - In steps-300, 1 run diverged" in text
    assert "the loss is nan" in section(text, "rooms, small: runs that are not in the numbers")
    assert study["changes"]["tuning"]["delta_m"]["n"] == 2 == study["changes"]["uw"]["delta_m"]["n"]
    assert study["changes"]["steps"]["delta_m"]["n"] == 3


def test_no_single_task_runs_at_all(tmp_path):
    folder = condition(tmp_path / "out", "steps-300", {"joint": -1.0})
    for path in (folder.path / "runs").glob("single*"):
        path.unlink()
    text, study = report(tmp_path / "out")
    assert "is not known: no seed has both sides' runs" in text
    assert study["conditions"]["tuned"]["transfer"]["joint"]["delta_m"]["mean"] is None
    assert draw(read_studies([tmp_path / "out"]), tmp_path / "to") == []


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("steps-600", {"batch": 7}, "differs from .*steps-300 in more than its condition: batch"),
        ("untuned", {"steps": 299}, "is of none of the conditions"),
        ("untuned", {"weight_decay": 1e-4}, "in more than its condition: weight_decay"),
        ("untuned", {"tuned": rates(["joint"])}, "untuned was not run under its condition: the rate of joint is tuned"),
        ("steps-600", {"tuned": rates([])}, "steps-600 was not run .*: the rate of joint is not tuned"),
        ("decay", {"weight_decay": 1e-2}, "decay was not run under its condition: weight_decay"),
        (
            "decay",
            {"tuned": rates(["joint"], lr=1e-2)},
            r"another rate of joint \(0.01\) than .* steps-300 has \(0.003",
        ),
        ("else", {}, "else is of none of the conditions"),
    ],
)
def test_folders_that_do_not_belong_together(tmp_path, name, changes, says):
    condition(tmp_path / "out", "steps-300", {"joint": 0.0})
    condition(tmp_path / "out", name, {"joint": 0.0}, **changes)
    with pytest.raises(SystemExit, match=says):
        main(["fair-report", str(tmp_path / "out"), "--to", str(tmp_path / "to")])
    assert not (tmp_path / "to").exists()


def test_nothing_to_report(tmp_path):
    assert "holds no runs of any condition" in refused(tmp_path / "to", tmp_path)
    condition(tmp_path / "out", "steps-300", {"joint": 0.0}, tasks=TASKS)
    assert "is named twice" in refused(tmp_path / "to", tmp_path / "out", tmp_path / "out" / ".." / "out")
