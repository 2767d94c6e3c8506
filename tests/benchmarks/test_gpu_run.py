"""``python -m benchmarks.gpu``, without a GPU: budget, deadlines, lines, resuming, targets, and a recorded stage."""

import json
import os
import shutil
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch

from benchmarks.gpu import cache, record, runner, stages
from benchmarks.gpu.__main__ import measure
from benchmarks.gpu.ncu import kernels
from benchmarks.gpu.stages import Stage
from benchmarks.gpu.summary import summary
from benchmarks.gpu.targets import TARGETS, judge
from benchmarks.kernels import lines
from benchmarks.kernels.__main__ import groups, show
from benchmarks.kernels.race import Rival, race
from benchmarks.kernels.sweep import SWEEPS, Sweep

CPU = torch.device("cpu")
FACTS = {"device": "a chip"}


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setenv("DTME_LINES", str(tmp_path / "lines.jsonl"))
    return tmp_path / "lines.jsonl"


def write_race(group, rival, milliseconds, final=True, **extra):
    stats = {"median": milliseconds / 1e3, "p20": milliseconds / 1e3, "p80": milliseconds / 1e3, "rounds": 21}
    extra = {"GB/s": 1.0, "TFLOP/s": 1.0, "peak MB": None, "repeats": True} | extra
    lines.write("race", group=group, rival=rival, final=final, facts=FACTS, stats=stats, extra=extra)


def script(name, code, seconds=0.0, most=60.0):
    write = "import os, sys, time\nfrom benchmarks.kernels import lines\n"
    return Stage(name, (sys.executable, "-c", write + code), seconds, most)


def run(path, *chosen, budget=60.0):
    good = runner.run(chosen, budget + runner.LEFT_FOR_THE_SUMMARY, path.with_name("log.txt"), os.environ)
    return good, {line["name"]: line["status"] for line in lines.read(path, "stage")}


def test_a_rival_that_fails_does_not_end_a_race():
    told = []
    runs = iter(range(100))

    def fails_later():
        if next(runs) > 6:
            raise RuntimeError("too late\nand more")

    def wrong():
        raise AssertionError("2 % of the signs are wrong")

    rivals = {
        "ours": Rival(lambda: torch.ones(3)),
        "wrong": Rival(lambda: None, wrong),
        "crashes": Rival(lambda: 1 / 0),
        "crashes later": Rival(fails_later),
        "random": Rival(lambda: torch.rand(3)),
    }
    results = race(rivals, CPU, rounds=5, report=lambda *told_of: told.append(told_of))
    assert list(results) == list(rivals)
    assert [len(result.seconds) for result in results.values()] == [5, 0, 0, 0, 5]
    assert results["wrong"].error == "AssertionError: 2 % of the signs are wrong"
    assert results["crashes"].error == "ZeroDivisionError: division by zero"
    assert results["crashes later"].error == "RuntimeError: too late"
    assert (results["ours"].repeats, results["random"].repeats) == (True, False)
    assert {(name, final) for name, _, final in told if final} == {(name, True) for name in rivals}
    assert {name for name, result, final in told if not final and result.seconds} == {"ours", "crashes later", "random"}


def test_a_stage_over_its_deadline_is_cut_and_its_lines_survive(path):
    endless = "lines.write('ceiling', name='copy', per_second=1.0)\nos.system('sleep 60')"
    start = time.monotonic()
    good, status = run(
        path,
        script("endless", endless, most=3.0),
        script("fails", "sys.exit(3)"),
        script("large", "pass", seconds=1000.0),
        script("done", "pass"),
    )
    assert time.monotonic() - start < 55  # not the minute that it wants
    assert not good
    assert [line["name"] for line in lines.read(path, "ceiling")] == ["copy"]
    assert status["endless"] == "cut off after 3 s"
    assert status["fails"] == "failed with status 3"
    assert status["large"].startswith("skipped: wants about 1000 s of ")
    assert status["done"] == "done"


def test_a_lost_device_asks_for_another_process(path):
    marker = path.with_name("lost")
    code = f"path = {str(marker)!r}\nif not os.path.exists(path):\n    open(path, 'w')\n    sys.exit(70)"
    assert run(path, script("loses", code)) == (True, {"loses": "done"})
    assert run(path, script("never", "sys.exit(70)"))[1]["never"] == "failed with status 70"


def test_resuming_leaves_out_what_is_done(path, monkeypatch):
    monkeypatch.setattr(cache, "ARCHIVE", path.with_name("no archive"))
    first, second = script("first", "lines.write('ran', name='first')"), script("second", "sys.exit(1)")
    assert not measure([first, second], 60, path.parent, resume=False)
    again = script("second", "lines.write('ran', name='second')")
    assert measure([first, again], 60, path.parent, resume=True)
    assert [line["name"] for line in lines.read(path, "ran")] == ["first", "second"]
    assert measure([first], 60, path.parent, resume=False)
    assert [line["name"] for line in lines.read(path, "ran")] == ["first"]


def test_the_last_line_of_a_rival_counts_and_a_torn_one_does_not(path, capsys):
    write_race("attention", "ours", 9.0, final=False)
    lines.write("race", group="attention", rival="flash", final=True, facts=FACTS, error="RuntimeError: none here")
    write_race("attention", "merged", 3.0, final=False)
    write_race("attention", "ours", 2.0)
    with path.open("a") as output:
        output.write('{"kind": "race", "group": "atte')
    assert lines.held(path, "a chip") == {("attention", "ours"), ("attention", "flash")}
    assert lines.held(path, "another chip") == set()
    assert {name: row["median"] for name, row in groups(path)["attention"].items()} == {"ours": 0.002, "merged": 0.003}
    show(path)
    assert "1.50" in capsys.readouterr().out
    as_json = path.with_suffix(".json")
    as_json.write_text(json.dumps(lines.gather(path)))
    assert groups(as_json) == groups(path)


def test_targets(path):
    times = {
        "covariance, ViT-B, 512 px": {"ours": 0.1, "addmm": 0.19},
        "conflicts, ViT-B, 512 px": {"ours": 0.1, "printed": 0.61, "GEMM": 0.05},
        "attention, ViT-B, 512 px, forward": {"ours": 1.0, "joined before, flash": 1.3, "joined before, cuDNN": 1.2},
        "modulate_layer_norm, ViT-B, 512 px, forward and backward": {"ours": 1.0, "copy": 0.8},
    }
    for group, rivals in times.items():
        for rival, milliseconds in rivals.items():
            write_race(group, rival, milliseconds)
    lines.write("ceiling", name="product", per_second=800e12)
    found = {target.text: (value, target.verdict(value)) for target, value in judge(path)}
    assert found["covariance, 12 blocks: faster than 12 addmm"] == (pytest.approx(1.9), "missed")
    floor = 12 * 21 * 2 * 6144 * 128**2 / 800e12
    assert found["covariance, 12 blocks: times its floor"] == (pytest.approx(0.0001 / floor), "met")
    assert found["conflicts, float32 basis: faster than the printed formula"][1] == "met"
    assert found["conflicts, float32 basis: faster than compiled"] == (None, "not measured")
    assert found["conflicts, float32 basis: times one GEMM of K M x p x p"] == (pytest.approx(2.0), "missed")
    assert found["attention, forward: faster than SDPA of joined keys"] == (pytest.approx(1.2), "met")
    assert found["modulation and norm, with backward: of copy bandwidth"] == (pytest.approx(0.8), "met")
    text = "\n".join(summary(path))
    assert text.count("not measured") == len(TARGETS) - 6
    assert "ours" in text


NCU = """a line of the program
"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value","Rule Name"
"0","attend","GPU Speed Of Light Throughput","Memory Throughput","%","41.5",""
"0","attend","GPU Speed Of Light Throughput","Elapsed Cycles","cycle","1,234",""
"0","attend","GPU Speed Of Light Throughput","","","","SOLBottleneck"
"1","key_gradients","Warp State Statistics","Warp Cycles Per Issued Instruction","cycle","7.25",""
"""


def test_what_ncu_prints():
    first, second = kernels(NCU.splitlines())
    assert first["kernel"] == "attend"
    assert first["metrics"] == {"Memory Throughput [%]": 41.5, "Elapsed Cycles [cycle]": 1234.0}
    assert second["metrics"] == {"Warp Cycles Per Issued Instruction [cycle]": 7.25}


def test_a_candidate_is_chosen_while_it_runs():
    from dtme_kernels.covariance import kernel

    target, tokens = "dtme_kernels.covariance.kernel.tile", torch.empty(1, 768, dtype=torch.bfloat16)
    sweep = Sweep("covariance", "", target, "covariance", ("tokens", "stages"), ((16, 5),))
    (name,) = sweep.names()
    tile = sweep.patched(name, lambda: kernel.tile("covariance", 768, tokens))()
    assert (name, tile.tokens, tile.options()["num_stages"]) == ("ours: covariance tokens=16 stages=5", 16, 5)
    assert kernel.tile("covariance", 768, tokens).tokens != 16


def test_what_a_sweep_replaces_is_there():
    pytest.importorskip("triton")
    assert all(callable(resolve_name(sweep.target)) for sweep in SWEEPS)


def test_every_candidate_has_a_name_of_its_own():
    names = [name for sweep in SWEEPS for name in sweep.names()]
    assert len(set(names)) == len(names)


@pytest.mark.skipif(find_spec("triton") is None or shutil.which("gcc") is None, reason="no Triton or no C compiler")
def test_a_recorded_stage_fills_the_cache_that_the_second_pass_uses(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "FOLDER", tmp_path / "cache")
    monkeypatch.setattr(cache, "ARCHIVE", tmp_path / "cache.tar")
    monkeypatch.setenv("DTME_LINES", "")
    options = ("--shapes", "^ViT-T, 224 px$", "--rivals", "^ours$", "-k", "not backward")
    tiny = Stage("tiny", stages.reports("modulation", options=options), 1.0, 60.0)
    assert record.record([tiny], tmp_path) == 0
    empty, carried = (record.compiled(tmp_path / f"recorded-{name}.jsonl", "tiny") for name in ("empty", "carried"))
    assert (empty.kernels, empty.hits) == (1, 0)
    assert (carried.kernels, carried.hits) == (1, 1)
    (line,) = lines.read(tmp_path / "recorded-carried.jsonl", "recorded")
    assert (line["group"], line["rival"]) == ("modulate_layer_norm, ViT-T, 224 px, forward", "ours")
    shutil.rmtree(cache.FOLDER)
    assert cache.unpack()
    assert list(Path(cache.FOLDER).rglob("*.cubin"))
