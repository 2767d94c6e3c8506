"""``fair``: all conditions are run once, each with the settings and rates that it stands for."""

import json
import shutil

import pytest

from benchmarks.paper.__main__ import main
from benchmarks.paper.experiments import ARMS
from benchmarks.paper.fair.conditions import conditions
from benchmarks.paper.results import read_experiment, read_runs
from benchmarks.paper.runner.one import RunOfArm, Workplace
from benchmarks.paper.runner.schedule import Schedule

TASKS = ("semseg", "depth")
TINY = ["--size", "32", "--tasks", *TASKS, "--train", "20", "--val", "4", "--batch", "4", "--read", "4"]
TINY += ["--no-conflicts", "--save-every", "3600"]


@pytest.fixture
def trained(monkeypatch):
    """Names of the runs that were trained, here rather than in processes, which are the schedule's own matter."""
    names = []

    def run(self):
        for config in self.waiting:
            names.append(config.name)
            place = Workplace(self.out, **{k: v for k, v in self.place.items() if k != "out"})
            RunOfArm(config, ARMS[config.arm], place).run()

    monkeypatch.setattr(Schedule, "run", run)
    # collects garbage of all tests before each run, which takes longer than the runs
    monkeypatch.setattr("benchmarks.paper.runner.one.reset_peak_memory", lambda device: None)
    return names


def options(tmp_path, *more):
    return [*TINY, "--cache", str(tmp_path / "cache"), "--steps", "2", *more]


def files(out):
    return {path: path.stat().st_mtime_ns for path in out.glob("**/runs/*.json")}


def fair(tmp_path, *more):
    return main(["fair", *options(tmp_path, *more), "--out", str(tmp_path / "out")])


def test_all_conditions_once_and_with_their_own_settings(tmp_path, trained):
    out = tmp_path / "out"
    first = ["--arms", "single", "joint", "invpt-weights", "uw", "--tune", "--out", str(out / "steps-2")]
    assert main(["run", "optimisers", *options(tmp_path), *first]) == 0  # as whoever began by hand
    by_hand = files(out)
    trained.clear()
    assert fair(tmp_path) == 0
    assert files(out).items() >= by_hand.items() and "uw.seed-0" not in trained
    both = {"joint.seed-0", *(f"single.{task}.seed-0" for task in TASKS)}
    tuned = read_experiment(out / "steps-2")["tuned"]
    for key, condition in conditions(2).items():
        folder = out / condition.folder
        runs = {path.stem: json.loads(path.read_text()) for path in folder.glob("runs/*.json")}
        assert runs.keys() == (both | {"invpt-weights.seed-0", "uw.seed-0"} if key == "tuned" else both)
        experiment = read_experiment(folder)
        for run in runs.values():
            name = run["arm"] if run["task"] is None else f"{run['arm']}.{run['task']}"
            assert run["settings"]["steps"] == (4 if key == "double" else 2)
            assert run["settings"]["weight_decay"] == (1e-3 if key == "decay" else 1e-6)
            rates = {"untuned": 1e-3, "double": experiment["tuned"].get(name, {}).get("lr")}
            assert run["settings"]["lr"] == rates.get(key, tuned[name]["lr"])
        assert bool(list(folder.glob("tuning/runs/*"))) == condition.is_tuned
    handed_on = {name: facts for name, facts in tuned.items() if name not in ("invpt-weights", "uw")}
    assert read_experiment(out / "decay")["tuned"] == handed_on
    there, ran = files(out), len(trained)
    assert fair(tmp_path) == 0
    assert files(out) == there and len(trained) == ran  # nothing was run a second time
    assert main(["fair-report", str(out), "--to", str(tmp_path / "report")]) == 0
    path = out / "decay" / "tuning" / "tuned.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"joint": {"lr": 7.0}}))
    with pytest.raises(SystemExit, match=r"joint\.seed-0\.json was run with another trunk_lr"):
        fair(tmp_path)
    shutil.rmtree(out / "decay" / "runs")
    with pytest.raises(SystemExit, match=r"the rate 7 for joint, where .*steps-2.* remove .*decay"):
        fair(tmp_path)
    assert len(trained) == ran


def test_what_does_not_fit_one_condition_is_refused_before_any_is_run(tmp_path, trained):
    decayed = ["--arms", "joint", "--weight-decay", "0.002", "--out", str(tmp_path / "out" / "decay")]
    assert main(["run", "pilot", *options(tmp_path), *decayed]) == 0
    trained.clear()
    with pytest.raises(SystemExit, match=r"decay holds runs with another weight_decay \(0.002 there, 0.001 now\)"):
        fair(tmp_path)
    assert trained == [] and len(list(read_runs(tmp_path / "out" / "decay"))) == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["decay"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--weight-decay", "0.001"], "--weight-decay 0.001 is that of one of the conditions"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--batch", "19"], "--batch 19 is more than the 18 training items, the held-out ones left out"),
    ],
)
def test_options_are_refused_before_anything_is_written(tmp_path, trained, arguments, says):
    with pytest.raises(SystemExit, match=says):
        fair(tmp_path, *arguments)
    assert trained == [] and not (tmp_path / "out").exists()


def test_torchrun_is_refused(tmp_path, trained, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="start it without torchrun"):
        fair(tmp_path)
    assert trained == []
