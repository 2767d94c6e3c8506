"""``compare``: it runs its arms and reports them, takes presets and stops when its time is over."""

import argparse
import threading

import pytest

from benchmarks.paper.__main__ import main
from benchmarks.paper.compare.command import PRESETS, add_arguments, with_presets


def small(out, *more):
    sizes = ["--size", "32", "--train", "16", "--val", "8", "--batch", "4", "--steps", "4", "--read", "8"]
    where = ["--out", str(out), "--cache", str(out.parent / "cache")]
    return main(["compare", *sizes, *where, "--backbone", "narrow", "--no-conflicts", *more])


def test_it_runs_its_arms_and_reports_them(tmp_path, capsys):
    arms = ("joint", "longer", "tm+te", "random", "random-2")
    assert small(tmp_path / "out", "--seeds", "2", "--jobs", "1", "--arms", *arms) == 0
    page = (tmp_path / "out" / "report" / "report.md").read_text()
    assert str(tmp_path / "out" / "report" / "report.md") in capsys.readouterr().out
    assert "choosing by conflict beats random blocks" in page and "mean of 2 plans" in page
    assert len(list((tmp_path / "out" / "runs").glob("*.json"))) == 2 * len(arms)


def test_what_is_done_when_its_time_is_over_is_reported_and_gone_on_with(tmp_path, capsys):
    out = tmp_path / "out"
    assert small(out, "--seeds", "1", "--jobs", "1", "--arms", "joint") == 0
    several = ["--arms", "joint", "tm+te", "--seeds", "9", "--jobs", "1", "--minutes", "0.02"]
    assert small(out, *several) == 0
    assert "0.02 minutes are over; the same command goes on" in capsys.readouterr().out
    done = len(list((out / "runs").glob("*.json")))
    assert 1 <= done < 18 and (out / "report" / "report.md").exists()
    assert small(out, "--arms", "joint", "tm+te", "--seeds", "1", "--jobs", "1") == 0
    assert (out / "runs" / "tm+te.seed-0.json").exists()


def test_nothing_done_in_its_time_is_said(tmp_path):
    with pytest.raises(SystemExit, match="no run is done yet: give it more --minutes, or fewer --steps"):
        small(tmp_path / "out", "--arms", "joint", "--seeds", "1", "--jobs", "1", "--minutes", "1e-4")
    with pytest.raises(SystemExit, match="--minutes must be positive, got 0"):
        small(tmp_path / "out", "--minutes", "0")
    assert threading.active_count() < 20


@pytest.mark.parametrize("preset", PRESETS)
def test_options_override_those_of_a_preset(preset):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    plain = parser.parse_args(with_presets(["--preset", preset, "--out", "x"]))
    assert plain.preset == preset and plain.device == "cuda" and plain.minutes == 10 and plain.size == [224]
    own = parser.parse_args(with_presets(["--seeds", "7", "--out", "x", "--preset", preset, "--device", "cpu"]))
    assert own.seeds == 7 and own.device == "cpu" and own.steps == plain.steps
    assert with_presets(["--out", "x"]) == ["--out", "x"]
