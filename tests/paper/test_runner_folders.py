"""A folder of runs: what is saved knows its settings, and arms that are compared have the same."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tqdm.auto import tqdm

from benchmarks.paper.arms import Arm, Combination, Plain
from benchmarks.paper.data import Options, open_data
from benchmarks.paper.experiments import ARMS
from benchmarks.paper.results import run_path
from benchmarks.paper.runner import command
from benchmarks.paper.runner.command import check_fit, check_folder, common_settings, config_of_run
from benchmarks.paper.runner.config import Config
from benchmarks.paper.runner.one import RunOfArm, Stopped, Workplace
from benchmarks.paper.runner.schedule import Schedule, _Worker


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    options = Options(tasks=("semseg", "depth"), size=(32, 32), train=16, val=4, cache=cache)
    return Config("joint", 0, options=options, steps=4, batch=4, read=8)


def run(config, out, **place):
    return RunOfArm(config, ARMS[config.arm], Workplace(out, **place)).run()


def stopped_at(config, out, step):
    told = []
    with pytest.raises(Stopped):
        run(config, out, tell=lambda what, at: told.append(at), stop=lambda: told[-1] >= step)


# ---- what is saved


@pytest.mark.parametrize(("step", "name"), [(3, "joint.seed-0.pt"), (1, "trunk.lr-0.001.seed-0.step-1.part.pt")])
def test_a_saved_training_of_other_settings_is_refused(config, tmp_path, step, name):
    stopped_at(config, tmp_path, step)
    with pytest.raises(ValueError, match=rf"{name} is of a training with another batch \(4 there, 8 now\)"):
        run(replace(config, batch=8), tmp_path)
    assert run(config, tmp_path)["status"] == "done"
    trunk = r"trunk\.lr-0\.001\.seed-0\.step-1\.pt is of a training with another batch"
    with pytest.raises(ValueError, match=trunk):
        run(replace(config, arm="te", batch=8), tmp_path)


def test_a_saved_training_does_not_go_on_at_another_rate(config, tmp_path):
    stopped_at(config, tmp_path, 3)
    with pytest.raises(ValueError, match=r"another lr \(0.001 there, 0.002 now\)"):
        run(replace(config, lr=2e-3), tmp_path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", None])
def test_a_damaged_file_of_a_training_is_named(config, tmp_path, content):
    stopped_at(config, tmp_path, 3)
    path = tmp_path / "work" / "joint.seed-0.pt"
    path.write_bytes(path.read_bytes()[:-1000] if content is None else content)
    with pytest.raises(ValueError, match=r"joint\.seed-0\.pt is damaged or of another release .* Remove it"):
        run(config, tmp_path)
    path.unlink()
    assert run(config, tmp_path)["status"] == "done"


def test_settings_of_a_run_name_the_kind_of_its_device(config):
    """Under torchrun every process has another number, and what rank 0 wrote has to be found done again."""
    assert replace(config, device="cuda:3").settings == replace(config, device="cuda").settings


def test_a_run_that_another_process_ended_meanwhile_is_not_run_again(config, tmp_path):
    """A worker may outlive its parent, and end its run while that of the next parent waits for it."""
    content, told = run(config, tmp_path), []
    assert run(config, tmp_path, tell=lambda what, at: told.append(what)) == content and told == []


# ---- a model that has diverged


@pytest.mark.parametrize("arm", ["joint", "recon", "tm+te"])
def test_a_shared_training_whose_model_makes_nan_is_a_run_that_diverged(config, tmp_path, arm):
    content = run(replace(config, arm=arm, lr=1e6, trunk_lr=1e6), tmp_path)
    assert content["status"] == "diverged" and "after 1 steps" in content["reason"]
    assert set(content["metrics"].values()) == {None} and content["parameters"]["backbone"] > 0


class InfiniteAtLast(Combination):
    """Finite losses, and a gradient that is not at the last step: nothing but the evaluation comes after it."""

    def backward(self, model, losses):
        super().backward(model, losses)
        self.steps = getattr(self, "steps", 0) + 1
        if self.steps == 4:
            next(model.parameters()).grad.fill_(float("inf"))


@pytest.mark.parametrize("conflicts", [True, False])
def test_a_last_step_that_makes_weights_nan_is_a_run_that_diverged(config, tmp_path, conflicts):
    arm = Arm("", combination=InfiniteAtLast)
    content = RunOfArm(replace(config, conflicts=conflicts), arm, Workplace(tmp_path)).run()
    assert content["status"] == "diverged" and content["reason"].endswith("are not finite after 4 steps")


def test_an_analysis_is_timed_in_the_run_that_makes_it(config, tmp_path):
    first = run(replace(config, arm="tm+te"), tmp_path)["seconds"]
    second = run(replace(config, arm="te"), tmp_path)["seconds"]
    assert first.keys() == second.keys() == {"training", "analysis", "structure", "evaluation"}
    again = run(replace(config, arm="tm", conflicts=False), tmp_path / "own")["seconds"]
    assert "analysis" not in again


# ---- folders


def options_of(out, **changes):
    return argparse.Namespace(**{"out": out, "tune": False} | changes)


def folder(out: Path, base: Config, tuned, *runs):
    """Files of runs that ended."""
    (out / "runs").mkdir(parents=True)
    (out / "experiment.json").write_text(
        json.dumps({"format": 1, "settings": common_settings(base), "lr": base.lr, "arms": {}, "seeds": [0]})
    )
    for arm, task in runs:
        one = config_of_run(base, arm, task, 0, tuned)
        content = {"format": 1, "arm": arm, "task": task, "seed": 0, "settings": one.settings | {"lr": one.lr}}
        run_path(out, one.name).write_text(json.dumps(content))


TUNED = {name: {"lr": lr} for name, lr in (("joint", 3e-3), ("tm", 1e-3), ("single.depth", 9e-3))}
RUNS = (("joint", None), ("tm", None), ("single", "depth"))


def test_a_folder_of_the_same_settings_is_gone_on_with(config, tmp_path):
    folder(tmp_path / "tuned", config, TUNED, *RUNS)
    check_folder(options_of(tmp_path / "tuned"), config, RUNS, TUNED)
    check_folder(options_of(tmp_path / "tuned", tune=True), config, [*RUNS, ("te", None)], TUNED)
    folder(tmp_path / "plain", config, {}, *RUNS)
    check_folder(options_of(tmp_path / "plain"), config, [("te", None)], {})
    check_folder(options_of(tmp_path / "new", tune=True), config, RUNS, {})


@pytest.mark.parametrize(
    ("arm", "changes", "tuned", "options", "says"),
    [
        ("te", {"lr": 2e-3, "trunk_lr": 2e-3}, TUNED, {}, r"another lr \(0.001 there, 0.002 now\)"),
        ("te", {"steps": 5}, TUNED, {}, r"another steps \(4 there, 5 now\)"),
        ("te", {}, {}, {}, r"joint\.seed-0\.json was run with another trunk_lr \(0.003 there, 0.001 now\), lr"),
        ("tm", {}, TUNED | {"joint": {"lr": 1e-3}}, {}, r"another trunk_lr \(0.003 there, 0.001 now\)"),
        ("te", {}, {"joint": TUNED["joint"]}, {"tune": True}, "runs of single.depth at a rate that was not tuned"),
        ("te", {}, {"joint": TUNED["joint"]}, {}, "are tuned, but not that of te: add --tune"),
    ],
)
def test_runs_that_would_be_compared_unfairly_are_refused(config, tmp_path, arm, changes, tuned, options, says):
    """Also where the command names none of the arms that are there: they are compared with its own."""
    folder(tmp_path, config, TUNED, *RUNS)
    with pytest.raises(ValueError, match=says):
        check_folder(options_of(tmp_path, **options), replace(config, **changes), [(arm, None)], tuned)


def test_a_run_of_another_format_is_named(config, tmp_path):
    folder(tmp_path, config, {}, ("joint", None))
    run_path(tmp_path, "joint.seed-0").write_text("[1]")
    with pytest.raises(ValueError, match=r"joint\.seed-0\.json has format 'list', this release reads 1"):
        check_folder(options_of(tmp_path), config, RUNS, {})


# ---- before any run


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"batch": 17}, "--batch 17 is more than the 16 training items"),
        ({"batch": 15, "held_out": 0.1}, "--batch 15 is more than the 14 training items, the held-out ones left out"),
        ({"backbone": "/no/such/folder"}, "--backbone /no/such/folder cannot be loaded"),
        ({"device": "cuda"}, "--device cuda: torch sees no such device"),
    ],
)
def test_settings_are_tried_once_before_any_run(config, monkeypatch, changes, says):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    data = open_data("rooms", config.options)
    check_fit(config, data)
    with pytest.raises(ValueError, match=says):
        check_fit(replace(config, **changes), data)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--lr", "0"], "--lr must be positive, got 0.0"),
        (["--lr", "nan"], "--lr must be positive, got nan"),
        (["--weight-decay", "-1"], "--weight-decay must be at least 0, got -1.0"),
        (["--modulation", "1.5"], r"--modulation must be in \[0, 1\], got 1.5"),
        (["--num-tokens", "0"], "--num-tokens must be at least 1, got 0"),
        (["--seeds", "1001"], "--seeds must be at most 1000, where those of tuning begin"),
        (["--out", "/proc/none/such"], r"No such file or directory \(/proc/none"),
    ],
)
def test_options_out_of_their_range_are_one_line(tmp_path, arguments, says):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    with pytest.raises(SystemExit, match=says) as raised:
        command.run(parser.parse_args(["pilot", "--out", str(tmp_path), *arguments]))
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.glob("*.json")) and not (tmp_path / "runs").exists()


def test_only_a_pretrained_backbone_starts_at_a_low_rate(tmp_path):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    for options, lr in (
        ([], 1e-3),
        (["--backbone", "vit-tiny"], 1e-3),
        (["--backbone", "some/folder"], 5e-5),
        (["--backbone", "some/folder", "--lr", "0.02"], 0.02),
    ):
        config = command.config_of(parser.parse_args(["pilot", "--out", str(tmp_path), *options]))
        assert config.lr == config.trunk_lr == lr


# ---- the time that is left


def test_steps_that_were_there_say_nothing_of_the_time_that_is_left(config, tmp_path, monkeypatch):
    now = [1e9]
    monkeypatch.setattr("time.time", lambda: now[0])
    schedule = Schedule([replace(config, steps=400)], tmp_path)
    schedule._bar = tqdm(total=400, smoothing=0.05, file=(tmp_path / "bar").open("w"), mininterval=0, maxinterval=0)
    schedule._bar._time = lambda: now[0]
    schedule._bar.start_t = schedule._bar.last_print_t = now[0]
    schedule.done = 0
    worker = _Worker(0, None, None, schedule.waiting[0])
    now[0] += 10  # in which a worker starts
    schedule._handle(worker, {"event": "step", "what": "going on", "step": 300}, [worker])
    for step in range(301, 311):
        now[0] += 0.02
        schedule._handle(worker, {"event": "step", "what": "training", "step": step}, [worker])
    assert schedule._bar.n == 310 and schedule._bar.initial == 300
    assert schedule._bar.format_dict["rate"] == pytest.approx(50, rel=1e-3)  # not 300 at once, nor 10 in ten seconds


class Greedy(Plain):
    """Needs much memory for a moment, before the training."""

    def apply(self, setting):
        torch.ones(100_000_000)
        return super().apply(setting)


class GreedyStep(Combination):
    """Needs much memory in a step."""

    def backward(self, model, losses):
        torch.ones(100_000_000)
        super().backward(model, losses)


def test_peak_memory_is_that_of_the_arms_own_training(config, tmp_path):
    """An analysis or the joint part, which the first arm of a seed makes for all, would make it look expensive."""
    arms = {"plain": Arm(""), "before": Arm("", Greedy), "in": Arm("", combination=GreedyStep)}
    arms["again"] = arms["plain"]  # after a run that needed much
    peaks = {name: RunOfArm(config, arm, Workplace(tmp_path / name)).run()["peak_memory"] for name, arm in arms.items()}
    assert max(peaks["before"], peaks["again"]) - peaks["plain"] < 200e6 < 300e6 < peaks["in"] - peaks["plain"]
