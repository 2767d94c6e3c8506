"""The experiments in small: they run through, go on with the seeds that are there, and count what they say."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from benchmarks.evidence import settle
from benchmarks.evidence.__main__ import main
from benchmarks.evidence.gains import interval, spearman

SIZES = ["--size", "16", "--patch", "8", "--depth", "2", "--width", "16", "--steps", "2", "--device", "cpu"]


def run(command: str, folder: Path, *options: str) -> dict[str, Any]:
    out = folder / f"{command}.json"
    main([command, *SIZES, "--cache", str(folder / "cache"), "--out", str(out), *options])
    return json.loads(out.read_text())


def test_settle_compares_both_passes_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--scenes", "32", "--batch", "2", "--models", "1")
    first = run("settle", tmp_path, *options, "--seeds", "1")["rows"]
    content = run("settle", tmp_path, *options, "--seeds", "2")
    assert content["rows"][0] == first[0] and [row["seed"] for row in content["rows"]] == [0, 1]
    assert {"torch", "device", "commit", "transformers"} <= content["rows"][1]["run"].keys()
    for row in content["rows"]:
        assert row["batches"] == 8 and row["full"]["seconds"] > 0
        assert row["settled"].keys() == row["full"]["plans"].keys() == settle.CONFIGURATIONS.keys()
        for settled in row["settled"].values():
            assert 0 < settled["first pass"] <= 1 and settled["second pass"] == 1  # nothing can settle before 8 batches
    printed = capsys.readouterr().out
    for name, found in content["summary"].items():
        assert found["stable"] + found["unstable"] == found["pairs"] == 2
        assert any(line.startswith(name) for line in printed.splitlines())


def test_settle_counts_seeds_by_what_they_are() -> None:
    def row(seed: int, stable: bool, settled: bool, block: str, full: str) -> dict[str, Any]:
        plan, of_full = ({"modulation": [name], "expansion": []} for name in (block, full))
        one = {"seconds": 1.0, "settled": settled, "first pass": 0.5, "second pass": 0.25, "plan": plan}
        full_row = {
            "seconds": 2.0,
            "agreement": {"half, half": 0.99 if stable else 0.5},
            "plans": {"half, half": of_full},
        }
        return {"seed": seed, "full": full_row, "settled": {"half, half": one}}

    rows = [
        row(0, True, True, "a", "a"),
        row(1, True, True, "a", "b"),
        row(2, False, False, "b", "b"),
        row(3, False, True, "a", "b"),
    ]
    found = settle.summary_of(rows, "half, half")
    assert (found["stable"], found["stable, same plan"], found["stable, second pass read"]) == (2, 1, 0.25)
    assert (found["unstable"], found["unstable, not settled"]) == (2, 1)
    assert (found["settled"], found["settled, same plan"], found["stable, time"]) == (3, 1, 0.5)
    assert found["settled, the independent full plan"] == 1  # that of 1 is the full plan of 0
    assert found["full plan is the independent full plan"] == 2


def test_gains_compares_every_block_and_goes_on(tmp_path: Path) -> None:
    options = ("--scenes", "32", "--batch", "4", "--map-steps", "2", "--map-batch", "8")
    first = run("gains", tmp_path, *options, "--seeds", "1")["rows"]
    content = run("gains", tmp_path, *options, "--seeds", "2")
    assert content["rows"][0] == first[0] and len(content["rows"]) == 2
    for row in content["rows"]:
        for falls in row["falls"].values():
            assert len(falls["own"]) == len(falls["shared"]) == len(row["gain"]) == len(row["null rate"]) == 2
            assert falls["own"] != falls["shared"] and all(map(math.isfinite, falls["own"] + falls["shared"]))
    found = content["summary"]["adam, lr 0.001"]["own - shared"]
    assert found["gain"]["models"] == [
        spearman(row["gain"], [a - b for a, b in zip(*row["falls"]["adam, lr 0.001"].values(), strict=True)])
        for row in content["rows"]
    ]


def test_other_settings_do_not_replace_results(tmp_path: Path) -> None:
    options = ("--scenes", "32", "--batch", "16", "--models", "1", "--seeds", "1")
    run("settle", tmp_path, *options)
    with pytest.raises(SystemExit, match="results of another batch"):
        run("settle", tmp_path, *options, "--batch", "8")
    assert run("settle", tmp_path, *options, "--batch", "8", "--fresh")["settings"]["batch"] == 8
    with pytest.raises(SystemExit, match="--steps must be positive"):
        run("settle", tmp_path, *options, "--steps", "0")


def test_rank_correlation_and_its_interval() -> None:
    assert spearman([3.0, 1.0, 3.0, 7.0], [1.5, 0.0, 1.5, 3.0]) == pytest.approx(1)  # equal values share a rank
    assert spearman([1, 2, 3, 4], [1, 10, 100, 1000]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 3], [5, 5, 5]) == 0
    assert spearman([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(0.8)
    low, high = interval([0.1, 0.2, 0.3, 0.4])
    assert 0.1 <= low < 0.25 < high <= 0.4
