"""The runner: batches that only the step decides, runs that go on after a kill, folders that stay whole."""

import json
import os
import resource
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks.paper.arms import Arm, Combination
from benchmarks.paper.data import Options, open_data
from benchmarks.paper.experiments import ARMS, EXPERIMENTS
from benchmarks.paper.results import read_runs, run_path
from benchmarks.paper.runner.batches import InOrder, Part, items_to_read, keys_of_step, training_batches
from benchmarks.paper.runner.config import Config
from benchmarks.paper.runner.one import RunOfArm, Stopped, Workplace
from benchmarks.paper.runner.schedule import RunError, Schedule, claimed, in_turn, is_done
from benchmarks.paper.runner.training import Training
from benchmarks.paper.smoke import CHECKPOINTS, figures, killed_and_resumed


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    options = Options(tasks=("semseg", "depth", "normals"), size=(32, 32), train=24, val=8, cache=cache)
    return Config("tm+te", 0, options=options, steps=8, batch=4, read=8)


def run(config, out, **place):
    return RunOfArm(config, ARMS[config.arm], Workplace(out, **place)).run()


# ---- batches


def test_every_epoch_visits_every_item_once_in_an_order_of_its_own():
    epochs = [[key for step in range(e * 5, e * 5 + 5) for key in keys_of_step(3, step, 20, 4)] for e in (0, 1)]
    for epoch in epochs:
        assert sorted(index for index, _ in epoch) == list(range(20))
    assert [index for index, _ in epochs[0]] != [index for index, _ in epochs[1]]
    draws = [draw for epoch in epochs for _, draw in epoch]
    assert len(set(draws)) == len(draws)
    assert keys_of_step(3, 7, 20, 4) == keys_of_step(3, 7, 20, 4) != keys_of_step(4, 7, 20, 4)


def test_items_that_make_no_whole_batch_are_left_out_of_an_epoch():
    keys = [keys_of_step(0, step, 11, 4) for step in range(2)]
    assert [len(key) for key in keys] == [4, 4] and len({index for key in keys for index, _ in key}) == 8


def test_batches_are_those_of_any_number_of_workers_and_processes(config):
    data = open_data("rooms", config.options)
    whole = list(training_batches(data.train, config, 2, 5))
    worked = list(training_batches(data.train, config, 2, 5, workers=2))
    parts = [list(training_batches(data.train, config, 2, 5, rank=rank, world=2)) for rank in (0, 1)]
    for (x, labels), (other, other_labels), *shares in zip(whole, worked, *parts, strict=True):
        assert torch.equal(x, other) and all(torch.equal(labels[task], other_labels[task]) for task in labels)
        assert torch.equal(x[0::2], shares[0][0]) and torch.equal(x[1::2], shares[1][0])


def test_part_and_order(config):
    data = open_data("rooms", config.options)
    part = Part(data.train, range(20, 24))
    x = torch.cat([batch for batch, _ in InOrder(part, range(4), 3, "cpu")])
    assert all(torch.equal(x[i], data.train[20 + i, None][0]) for i in range(4))
    assert len(set(items_to_read(config, 24))) == 8


# ---- a run


def test_a_run_stopped_after_any_step_goes_on_to_the_same_bits(config, tmp_path):
    want = figures(run(config, tmp_path / "whole"))
    for step in (1, 2, 5):  # in the joint part, at its end, after the expansion
        out, told = tmp_path / f"step-{step}", []
        with pytest.raises(Stopped):
            run(
                config,
                out,
                tell=lambda what, at, told=told: told.append(at),
                stop=lambda told=told, step=step: told[-1] >= step,
            )
        assert not list((out / "runs").glob("*")) and max(told) == step
        assert figures(run(config, out)) == want
        assert not list((out / "work").glob("tm+te*.pt"))


def test_arms_of_a_seed_share_the_joint_part_and_what_was_read_there(config, tmp_path):
    expanded = run(config, tmp_path)
    files = sorted((tmp_path / "work").glob("trunk*"))
    before = {path: path.stat().st_mtime_ns for path in files if path.suffix != ".lock"}
    joint = run(replace(config, arm="joint"), tmp_path)
    assert {path: path.stat().st_mtime_ns for path in before} == before and len(before) == 2
    assert joint["conflicts"]["start"] == expanded["conflicts"]["start"]
    first = {
        name: [losses[0] for losses in content["losses"].values()] for name, content in (("a", joint), ("b", expanded))
    }
    assert first["a"] == first["b"] and joint["weights"] != expanded["weights"]


def test_joint_training_is_that_of_one_piece(config, tmp_path):
    """Leaving the shared part changes nothing: the moments of the gradients go along."""
    pieces = run(replace(config, arm="joint"), tmp_path / "pieces")
    whole = RunOfArm(replace(config, arm="joint"), Arm("", start=0.0), Workplace(tmp_path / "whole")).run()
    assert pieces["weights"] == whole["weights"] and pieces["metrics"] == whole["metrics"]


def test_a_task_alone_has_its_head_and_its_losses_only(config, tmp_path):
    content = run(replace(config, arm="single", task="depth"), tmp_path)
    assert list(content["metrics"]) == ["depth"] == list(content["losses"])
    assert run_path(tmp_path, "single.depth.seed-0").exists()
    joint = run(replace(config, arm="joint"), tmp_path)
    assert content["parameters"]["heads"] < joint["parameters"]["heads"]


class Bad(Combination):
    """Whose loss is no number at one step."""

    def backward(self, model, losses):
        self.steps = getattr(self, "steps", 0) + 1
        super().backward(model, losses)
        if self.steps == 4:
            raise FloatingPointError("the loss of 'depth' is nan")


def test_a_run_that_diverges_says_where_and_keeps_its_json(config, tmp_path):
    content = RunOfArm(replace(config, arm="joint"), Arm("", combination=Bad), Workplace(tmp_path)).run()
    assert content["status"] == "diverged" and content["reason"] == "the loss of 'depth' is nan at step 3"
    assert set(content["metrics"].values()) == {None}
    assert [found["status"] for found in read_runs(tmp_path)] == ["diverged"]


def test_held_out_items_are_the_last_of_the_training_split(config, tmp_path):
    arm = RunOfArm(replace(config, arm="joint", held_out=0.25), ARMS["joint"], Workplace(tmp_path))
    data = open_data("rooms", config.options)
    assert (len(arm.data.train), len(arm.data.val)) == (18, 6)
    assert torch.equal(arm.data.val[0, None][0], data.train[18, None][0])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"batch": 25}, "--batch 25 is more than the 24 training items"),
        (
            {"backbone": "vit-tiny", "options": Options(size=(40, 40), train=8, val=8)},
            "patches of 16 pixels do not tile 40 × 40, try 48 48",
        ),
    ],
)
def test_settings_that_do_not_fit_the_data(config, tmp_path, changes, says):
    if "options" in changes:
        changes = changes | {"options": replace(changes["options"], cache=config.options.cache)}
    with pytest.raises(ValueError, match=says):
        run(replace(config, **changes), tmp_path)


def test_settings_come_back_from_json(config):
    assert Config.from_dict(json.loads(json.dumps(config.as_dict()))) == config


# ---- many runs


def test_order_of_runs_keeps_two_seeds_at_once():
    configs = [Config(arm, seed) for seed in range(4) for arm in ("joint", "tm+te")]
    assert [(c.arm, c.seed) for c in in_turn(configs, 2)][:4] == [
        ("joint", 0),
        ("joint", 1),
        ("tm+te", 0),
        ("tm+te", 1),
    ]


def test_a_folder_belongs_to_one_process(tmp_path):
    with claimed(tmp_path), pytest.raises(RunError, match="another process runs into"), claimed(tmp_path):
        pass
    with claimed(tmp_path):
        pass


def test_what_is_done_is_not_run_again_and_other_settings_are_refused(config, tmp_path):
    joint = replace(config, arm="joint", steps=2)
    run(joint, tmp_path)
    assert is_done(joint, tmp_path) and not is_done(replace(joint, seed=1), tmp_path)
    assert Schedule([joint], tmp_path).waiting == []
    with pytest.raises(ValueError, match=r"another steps \(2 there, 3 now\)"):
        is_done(replace(joint, steps=3), tmp_path)


def test_every_experiment_names_arms():
    for experiment in EXPERIMENTS.values():
        assert set(experiment.arms) <= ARMS.keys()


# ---- the command


def test_killed_runs_go_on_to_the_same_figures(tmp_path, config):
    whole, killed = killed_and_resumed(tmp_path, config.options.cache, CHECKPOINTS[1:])
    assert figures(killed) == figures(whole)


def test_a_full_disk_is_named_and_loses_nothing(config, tmp_path):
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000));"
        "from benchmarks.paper.runner.worker import main; main()"
    )
    order = {
        "config": replace(config, arm="joint", steps=4).as_dict(),
        "place": {"out": str(tmp_path), "save_every": 0.0},
    }
    run(replace(config, arm="joint", steps=2, seed=7), tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(order) + "\n",
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["event"] == "failed" and "File too large" in last["error"] and "goes on from it" in last["error"]
    assert [found["seed"] for found in read_runs(tmp_path)] == [7]


def test_a_training_is_saved_whole_or_not_at_all(config, tmp_path):
    training = Training(torch.nn.Linear(400, 400), Combination(config.options.tasks), 4, 0)
    training.save(tmp_path / "a.pt", {})
    before, limits = (tmp_path / "a.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(OSError, match="File too large"):
            training.save(tmp_path / "a.pt", {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / "a.pt").read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["a.pt"]
