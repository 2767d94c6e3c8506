"""What the report on the signal claims of few models, and of reports that look at a part of the batches."""

import math
import os
import signal

import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks.paper.__main__ import main
from benchmarks.paper.results import read_json
from benchmarks.paper.runner.config import Config
from benchmarks.paper.runner.schedule import RunError
from benchmarks.paper.signal.command import run_probes
from benchmarks.paper.signal.findings import findings
from benchmarks.paper.signal.folder import read_folder
from benchmarks.paper.signal.heads import HeadLosses, heads_file
from benchmarks.paper.signal.page import section
from benchmarks.paper.signal.probe import Probe
from benchmarks.paper.signal.statistics import Rates, in_common, jackknife, over_pairs, over_seeds
from benchmarks.paper.signal.tables import CLEAR, WEAK, best_warning, verdict
from benchmarks.paper.signal.tallies import moment_of
from benchmarks.paper.signal.warning import LABELS, warned
from tests.paper.signal_folders import TASKS, measurement, write_folder

JUDGES = np.array([[9, 6, 8, 7, 10, 6], [2, 1, 4, 1, 5, 2], [5, 3, 6, 2, 6, 4], [8, 2, 8, 6, 9, 7]], dtype=float)
"""Shrout and Fleiss's example: four judges of six targets."""


def test_models_that_agree_by_chance_have_no_interval():
    assert math.isnan(over_seeds([0.5, 0.5, 0.5]).low)
    # every model overlaps with the others by 5 / 9 in the mean, though their pairs do by 1 / 3 to 1
    matrix = np.ones((4, 4))
    places = (0, 1), (2, 3), (0, 2), (1, 3), (0, 3), (1, 2)
    for (i, j), value in zip(places, (1, 1, 1 / 3, 1 / 3, 1 / 3, 1 / 3), strict=True):
        matrix[i, j] = matrix[j, i] = value
    found = over_pairs([matrix])
    assert found.value == pytest.approx(5 / 9) and math.isnan(found.low)
    assert math.isnan(over_pairs([np.ones((6, 6))]).low)
    assert math.isnan(jackknife(0.3, [0.2, 0.3, 0.4, 0.3]).low) and jackknife(0.3, [0.2, 0.3, 0.4, 0.3, 0.3]).low < 0.3


def test_what_models_have_in_common_is_the_intraclass_correlation_of_the_textbook():
    found = in_common(Rates(JUDGES, np.zeros((4, 6, 4, 6)), 100))
    assert found == pytest.approx((0.7148, 0.3425, 0.9459), abs=5e-4)
    apart = in_common(Rates(np.array([[1.0, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2.5, 1]]), np.zeros((2, 6, 2, 6)), 100))
    assert apart.value < -0.9 and apart.high == pytest.approx(in_common_of_nothing(2, 6))
    assert math.isnan(in_common(Rates(JUDGES[:1], np.zeros((1, 6, 1, 6)), 100)).value)


def in_common_of_nothing(models, items):
    """Upper end where the mean squares are equal."""
    f = stats.f.ppf(0.975, (items - 1) * (models - 1), items - 1)
    return (f - 1) / (f + models - 1)


def test_noise_that_models_share_is_not_in_common():
    """Nothing but noise, the same for all models, as of models that read the same images."""
    rng, values = np.random.default_rng(0), []
    noise = np.broadcast_to(np.eye(6)[None, :, None, :] * 1.0, (3, 6, 3, 6)) + 0.5 * np.eye(18).reshape(3, 6, 3, 6)
    for _ in range(300):
        rates = rng.normal(0, 1, 6) + rng.normal(0, math.sqrt(0.5), (3, 6))
        values.append(in_common(Rates(rates, noise, 100)))
    assert np.mean([low <= 0 <= high for _, low, high in values]) > 0.93


def test_the_whole_interval_has_to_be_high_for_a_clear_order():
    assert verdict([0.85, 0.05, 1.0]) == WEAK and verdict([0.85, 0.81, 0.9]) == CLEAR


@pytest.mark.parametrize(("gain", "names"), [(0.0, True), (0.5, False)])
def test_a_report_of_many_images_looks_at_the_first_batches_only(gain, names):
    others = 1 + 0.01 * torch.rand(32, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    losses = torch.stack([others * (1 - gain), others.flip(0)], 2)
    moment = moment_of(measurement(units=1024, batch=16), losses)
    for n, samples in ((64, 8), (256, 2), (1024, 1)):
        flags = warned(moment, n)["tokens"][LABELS]
        assert flags.tolist() == [names] * samples, n
    few = moment_of(measurement(units=256, batch=16), losses[:8])
    assert warned(few, 256)["tokens"][LABELS].tolist() == []  # fewer batches than such a report looks at


def test_no_warning_is_the_best_where_none_tells_anything():
    found = {"separation": {"labels": 0.0, "every": -0.1}}
    assert "no other tells untrained heads" in best_warning({"warning": {"64": found}})


def test_heads_of_other_tasks_are_named(tmp_path):
    folder = write_folder(tmp_path / "one", [measurement(0, 0.25, units=64, sample=32)])
    setting = read_folder(folder)
    path = heads_file(setting.files[0, 0.25])
    HeadLosses(("a", "b"), torch.ones(2, 2, 2)).save(path)
    with pytest.raises(SystemExit, match=r"heads\.json is of the tasks \('a', 'b'\), its measurement of .*Remove it"):
        main(["signal-report", str(folder), "--to", str(tmp_path / "report")])
    HeadLosses(TASKS, torch.ones(2, 4, 2)).save(path)
    like = setting.load(0, 0.25)
    assert setting.heads(0, 0.25, like).tasks == TASKS


def test_differences_are_claimed_of_these_models_and_of_others_apart(tmp_path):
    options = {"units": 256, "blocks": 2, "tasks": ("a", "b"), "ratios": (100.0,), "sample": 64, "permuted": 0.5}
    found = [measurement(s, 0.25, rate=rate, **options) for s, rate in enumerate((0.6, 0.42, 0.62))]
    text = section(findings(read_folder(write_folder(tmp_path / "one", found))))
    line = next(line for line in text.splitlines() if "Rate less that with labels of other images" in line)
    assert "surely other than 0 in these models; over models of other seeds [-" in line and "], not surely" in line


def test_the_command_measures_and_goes_on(tmp_path, capsys):
    """Through the command, whose processes are others."""
    out = tmp_path / "out"
    common = ["signal", "--out", str(out), "--cache", str(tmp_path / "cache"), "--size", "32", "--train", "12"]
    common += ["--val", "4", "--tasks", "semseg", "depth", "--steps", "4", "--batch", "4", "--read", "8"]
    common += ["--sample", "4", "--permuted", "4", "--seeds", "1", "--jobs", "1", "--device", "cpu"]
    with pytest.raises(SystemExit, match=r"whole percents, such as 0\.25, got 0\.004"):
        main([*common, "--shares", "0", "0.004"])
    with pytest.raises(SystemExit, match="--read 16 is more than the 12 training items"):
        main([*common, "--shares", "0", "--read", "16"])
    assert not (out / "experiment.json").exists()
    assert main([*common, "--shares", "0"]) == 0
    before = (out / "measured" / "seed-0.share-0.npz").read_bytes()
    assert main([*common, "--shares", "0"]) == 0  # nothing is left to do
    assert (out / "measured" / "seed-0.share-0.npz").read_bytes() == before
    content = read_json(out / "experiment.json")
    assert (content["seeds"], content["shares"]) == ([0], [0.0]) and content["seconds"]["seed-0"]["measuring"] > 0
    with pytest.raises(SystemExit, match=r"holds measurements with another steps"):
        main([*common, "--shares", "0", "--steps", "5"])


class Killed(Probe):
    """Of which the operating system ends the process."""

    def run(self, tell=None):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_is_one_line(tmp_path):
    with pytest.raises(RunError, match="was killed, as for want of memory: what was saved stays, start again"):
        run_probes([Killed(Config("joint", 0), tmp_path, (0.0,))], 1)
