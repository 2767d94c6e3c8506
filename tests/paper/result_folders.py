"""Folders as the runner leaves them, with effects that are known."""

import json

import numpy as np

TASKS = {
    "semseg": {"metric": "mIoU", "unit": "%", "lower_is_better": False},
    "depth": {"metric": "RMSE", "unit": "m", "lower_is_better": True},
}
BASES = {"semseg": 40.0, "depth": 0.5}
"""Metric of the single-task runs without noise."""


class ResultFolder:
    """Writes ``experiment.json`` and runs one by one.

    The metric of a run is its task's base, made better by ``gain`` %; so the arm's Δm is the mean of its gains.
    """

    def __init__(self, path, arms, seeds=range(5), tasks=TASKS, data="rooms", bases=None, **settings):
        self.path, self.seeds, self.tasks = path, list(seeds), tasks
        self.bases = bases or {task: BASES.get(task, 40.0) for task in tasks}
        self.arms = arms if isinstance(arms, dict) else {arm: arm for arm in arms}
        (path / "runs").mkdir(parents=True)
        experiment = {
            "format": 1,
            "experiment": "pilot",
            "arms": self.arms,
            "seeds": self.seeds,
            "settings": {"steps": 100, "batch": 6, **settings},
            "data": data,
            "tasks": tasks,
        }
        (path / "experiment.json").write_text(json.dumps(experiment))

    def gained(self, task, gain):
        sign = -1 if self.tasks[task]["lower_is_better"] else 1
        return self.bases[task] * (1 + sign * gain / 100)

    def run(self, arm, seed, gains=0.0, task=None, **changes):
        """Write a run; ``gains`` in %, one for all tasks or by task; ``changes`` replace what is in the JSON."""
        tasks = [task] if task else list(self.tasks)
        gains = gains if isinstance(gains, dict) else dict.fromkeys(tasks, gains)
        content = {
            "format": 1,
            "arm": arm,
            "task": task,
            "seed": seed,
            "status": "done",
            "reason": None,
            "settings": {"lr": 2e-5, "steps": 100},
            "facts": {"device": "cpu", "torch": "2.13.0", "commit": "abc1234", "dtme": "0.1"},
            "metrics": {name: self.gained(name, gains[name]) for name in tasks if name in self.tasks},
            "losses": {name: [1 / (1 + i) for i in range(10)] for name in tasks},
            "seconds": {"training": 100.0, "structure": 5.0, "evaluation": 10.0},
            "cpu_seconds": 200.0,
            "peak_memory": 3 * 2**30,
            "parameters": {"backbone": 9000, "heads": 500 * len(tasks), "added": 0, "combination": 0},
            "structure": {},
            "combination": {},
            "conflicts": {},
        } | changes
        name = ".".join([arm, *([task] if task else []), f"seed-{seed}"])
        (self.path / "runs" / f"{name}.json").write_text(json.dumps(content))
        return self

    def single(self, seeds=None, **changes):
        """The single-task runs, which have exactly the bases."""
        for seed in self.seeds if seeds is None else seeds:
            for task in self.tasks:
                self.run("single", seed, task=task, **changes)
        return self


def conflicts(start=(100, 200), end=(90, 150), blocks=4, valid=1000, valid_at_end=None):
    """Counts of (range, null) at both moments."""
    names = [f"layer.{i}" for i in range(blocks)]
    moments = (("start", start, valid), ("end", end, valid_at_end or valid))
    return {
        moment: {
            "blocks": names,
            "range": [counts[0] / of * (1 + 0.05 * i) for i in range(blocks)],
            "null": [counts[1] / of * (1 - 0.05 * i) for i in range(blocks)],
            "ranks": [3] * blocks,
            "range_counts": counts[0],
            "null_counts": counts[1],
            "valid_counts": of,
        }
        for moment, counts, of in moments
    }


def noisy_folder(path, arms, seeds=range(5), spread=0.6, singles=True, data="rooms", tasks=TASKS, seed=0):
    """A whole folder: ``arms`` maps a name to its mean gain in %; what a seed does to all arms is larger than that."""
    rng = np.random.default_rng(seed)
    names = {**({"single": "single task"} if singles else {}), **{arm: arm for arm in arms}}
    folder = ResultFolder(path, names, seeds, tasks, data)
    if singles:
        folder.single()
    for number in folder.seeds:
        shared = rng.normal(0, 2 * spread, len(tasks))
        for arm, gain in arms.items():
            gains = gain + shared + rng.normal(0, spread, len(tasks))
            folder.run(
                arm,
                number,
                dict(zip(tasks, gains.tolist(), strict=True)),
                losses={t: (rng.random(10) * 0.1 + 1 / (1 + np.arange(10)) - gain / 50).tolist() for t in tasks},
                conflicts=conflicts(end=(90 - int(gain), 150), blocks=12),
                parameters={"backbone": 9000, "heads": 1000, "added": int(10 * abs(gain)), "combination": 0},
            )
    return folder


SEED_EFFECT = (0.0, 3.0, -2.0, 5.0, 1.0)
"""What a seed does to every arm, in %."""


def section(text, title):
    """A section of a page."""
    return text.partition(f"## {title}\n")[2].partition("\n## ")[0]


def rows(text, which=0):
    """A Markdown table of a section: {first cell: {column: cell}}."""
    tables, last = [], False
    for line in text.splitlines():
        is_row = line.startswith("|")
        if is_row and not last:
            tables.append([])
        if is_row:
            tables[-1].append([cell.strip() for cell in line[2:-2].split(" | ")])
        last = is_row
    head, _, *lines = tables[which]
    assert all(len(line) == len(head) for line in lines)
    return {line[0]: dict(zip(head, line, strict=True)) for line in lines}


def known(path, gains, seeds=range(5), **options):
    """Runs whose Δm is exactly the arm's gain plus the seed's effect."""
    folder = ResultFolder(path, ["single", *gains], seeds, **options).single()
    for arm, gain in gains.items():
        for seed in folder.seeds:
            folder.run(arm, seed, gain + SEED_EFFECT[seed])
    return folder
