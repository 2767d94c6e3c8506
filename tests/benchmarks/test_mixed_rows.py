"""The measurement of rows with their own tasks, on a model small enough for a test."""

import json

import pytest

from benchmarks import mixed_rows


def test_writes_ratios_of_rivals_that_agree(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mixed_rows, "SHAPE", mixed_rows.SHAPE._replace(channels=12, blocks=2, tokens=5))
    out = tmp_path / "rows.json"
    monkeypatch.setattr("sys.argv", ["rows", "--tasks", "5", "--images", "8", "--rounds", "5", "--out", str(out)])
    mixed_rows.main()
    found = json.loads(out.read_text())
    assert 1 < found["tasks in the batch"] <= 5 and "8 rows of" in capsys.readouterr().out
    assert all(found[kind]["pass_per_task / one_pass"] > 0 for kind in ("step", "inference"))


def test_rivals_that_differ_are_not_raced(monkeypatch):
    shape = mixed_rows.SHAPE._replace(channels=12, blocks=2, tokens=5, images=8, tasks=5)
    monkeypatch.setattr(mixed_rows.Subject, "pass_per_task", lambda self: {"task0": self.model(self.x)["task0"] * 2})
    with pytest.raises(RuntimeError, match=r"one_pass: .*gradients"):
        mixed_rows.measure(shape, 5)
