"""The demo in small: it runs through, leaves everything it promises, and repeats with its seed."""

import json

import pytest

import dtme
from benchmarks.paper.__main__ import main
from benchmarks.paper.demo import DEMO_TASKS


def run(folder, *options):
    main(["demo", "--steps", "3", "--scenes", "24", "--batch", "8", "--out", str(folder), "--device", "cpu", *options])
    return json.loads((folder / "report.json").read_text())


def test_demo_runs_through_and_repeats_with_its_seed(tmp_path, capsys):
    report = run(tmp_path / "a", "--seed", "5")
    printed = capsys.readouterr().out
    names = {"conflicts.png", "conflict_map.png", "losses.png", "predictions.png", "report.json", "plan.json", "model"}
    assert {path.name for path in (tmp_path / "a").iterdir()} == names
    for task in DEMO_TASKS:  # a row with three metrics, their difference and its share of Δm
        (row,) = [line for line in printed.splitlines() if line.startswith(f"{task} ")]
        assert len(row.split()) >= 8
    assert "the same bits" in printed and "range rate" in printed and "added 12,288" in printed
    plan = dtme.ExpansionPlan.load(tmp_path / "a" / "plan.json")
    assert plan.tasks == DEMO_TASKS and len(plan.modulation) == len(plan.expansion) == 3
    assert run(tmp_path / "b", "--seed", "5") == report != run(tmp_path / "c", "--seed", "6")


def test_demo_refuses_to_do_nothing(tmp_path):
    with pytest.raises(SystemExit, match="must be positive"):
        run(tmp_path, "--steps", "0")
