"""The report on many tasks: its plans, and one small run of it."""

import json
import sys

import pytest

from benchmarks import many_tasks


def test_plans_are_over_as_many_groups_as_asked_for():
    shape = many_tasks.SHAPE._replace(tasks=100)
    tasks = [f"task{i}" for i in range(100)]
    plan, ungrouped = (many_tasks.plan_for(tasks, shape, number) for number in (8, None))
    assert len(plan.groups) == 8 and {len(some) for some in plan.groups.values()} == {12, 13}
    assert plan.compute() == (6 * 1 + 6 * 8) / 12 and ungrouped.compute() == (6 * 1 + 6 * 100) / 12
    assert ungrouped.added_parameters() == 100 / 8 * plan.added_parameters()
    assert len(many_tasks.plan_for(tasks[:3], shape, 8).groups) == 3


def test_a_row_is_written_for_each_way(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(many_tasks, "SHAPE", many_tasks.SHAPE._replace(images=2, channels=12, blocks=2))
    out = tmp_path / "many.json"
    monkeypatch.setattr(sys, "argv", ["", "--tasks", "5", "--groups", "2", "--tokens", "4", "--out", str(out)])
    many_tasks.main()
    ungrouped, grouped = json.loads(out.read_text())["rows"]
    assert (ungrouped["groups"], grouped["groups"]) == (None, 2) and (ungrouped["streams"], grouped["streams"]) == (
        5,
        2,
    )
    assert grouped["step"]["median"] > 0 and grouped["analysis"]["median"] > 0 and "peak MB" in capsys.readouterr().out


def test_what_is_wrong_is_no_row(monkeypatch):
    monkeypatch.setattr(many_tasks.dtme, "verify", lambda *args: 0.5)
    with pytest.raises(RuntimeError, match="2 tasks: AssertionError: tasks at once and alone differ by"):
        many_tasks.measure(many_tasks.SHAPE._replace(tasks=2, tokens=4, channels=12, blocks=2), 2)
