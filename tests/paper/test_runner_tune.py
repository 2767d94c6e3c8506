"""How learning rates are tuned, from the runs that the tuning makes."""

import json
from dataclasses import replace

import pytest

from benchmarks.paper.data.rooms import TASKS
from benchmarks.paper.results import run_path
from benchmarks.paper.runner.config import Config
from benchmarks.paper.runner.tune import FIRST_SEED, Tuner, score

NAMES = {name: TASKS[name] for name in ("semseg", "depth")}
BASE = Config("", 0, lr=1e-3, trunk_lr=1e-3)


class Runs:
    """Writes what the runs of a tuning leave: ``found(arm, task, lr, trunk_lr) -> metrics``."""

    def __init__(self, out, found, seeds=1):
        self.tuner, self.found = Tuner(BASE, NAMES, out, seeds, 1, {}), found
        self.out, self.asked = out, []

    def tune(self, monkeypatch, runs):
        monkeypatch.setattr(self.tuner, "_run", self._write)
        return self.tuner.tune(runs)

    def _write(self, configs, title):
        for config in configs:
            self.asked.append(config)
            path = run_path(self.out / "tuning", config.name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"metrics": self.found(config)}))


def near(best):
    """Metrics that are best at a rate."""

    def found(config):
        off = abs(config.lr / best - 1) / 10
        metrics = {"semseg": 50.0 * (1 - min(off, 0.9)), "depth": 1.0 + off}
        return metrics if config.task is None else {config.task: metrics[config.task]}

    return found


@pytest.mark.parametrize("best", [1e-3, 3e-3, 9e-3, 1e-3 / 9])
def test_the_best_rate_is_found_and_the_others_are_tried_around_it(tmp_path, monkeypatch, best):
    runs = Runs(tmp_path, near(best), seeds=2)
    known = runs.tune(monkeypatch, [("joint", None), ("tm", None), ("single", "depth")])
    assert all(facts["lr"] == pytest.approx(best) for facts in known.values())
    assert runs.tuner.known() == known and set(known) == {"joint", "tm", "single.depth"}
    joint = known["joint"]["lr"]
    for config in runs.asked:
        assert config.seed >= FIRST_SEED and config.held_out > 0
        assert config.trunk_lr == (joint if config.arm == "tm" else config.lr)


def test_rates_at_which_joint_training_diverges_lose_against_one_at_which_it_does_not(tmp_path, monkeypatch):
    """The rate in the middle among them, which the others would be relative to."""

    def found(config):
        return near(1e-3 / 9)(config) if config.lr < 5e-4 else dict.fromkeys(NAMES)

    known = Runs(tmp_path, found).tune(monkeypatch, [("joint", None), ("tm", None)])
    assert known["joint"]["lr"] == pytest.approx(1e-3 / 9) == known["tm"]["lr"]
    assert known["joint"]["tried"]["0.001"] is None and known["joint"]["tried"]["0.000333333"] is not None


def test_an_arm_that_diverges_at_all_rates_keeps_that_of_joint_training_and_is_told(tmp_path, monkeypatch, capsys):
    def found(config):
        return dict.fromkeys(NAMES) if config.arm == "tm" else near(3e-3)(config)

    known = Runs(tmp_path, found).tune(monkeypatch, [("tm", None)])
    assert known["tm"]["lr"] == known["joint"]["lr"] == pytest.approx(3e-3)
    assert set(known["tm"]["tried"].values()) == {None}
    assert "tm: no rate of those tried has a score, 0.003 stays" in capsys.readouterr().out


@pytest.mark.parametrize("content", ['{"joint": {"lr": -1.0}}', '{"joint": 0.1}', "[0.1]", '{"joint": {"lr": null}}'])
def test_rates_that_are_none_are_named(tmp_path, content):
    tuner = Tuner(BASE, NAMES, tmp_path, 1, 1, {})
    tuner.path.parent.mkdir()
    tuner.path.write_text(content)
    with pytest.raises(ValueError, match=r"tuned\.json: .* must have a positive lr, got .* Remove the file"):
        tuner.known()


def test_lower_is_better_in_scores():
    assert score({"depth": 0.9}, {"depth": 1.0}, {"depth": TASKS["depth"]}) == pytest.approx(10.0)
    assert score({"semseg": 45.0}, {"semseg": 50.0}, {"semseg": TASKS["semseg"]}) == pytest.approx(-10.0)


def test_rates_of_tuning_are_held_apart_by_their_names():
    names = {replace(BASE, arm="tm", seed=FIRST_SEED, variant=f"lr-{rate:g}").name for rate in (1e-3 / 3, 1e-3, 3e-3)}
    assert len(names) == 3
