"""Folders for the comparison of placements, with gains that are known."""

import json

from benchmarks.paper.compare.findings import find
from benchmarks.paper.compare.folders import read_settings
from tests.paper.result_folders import SEED_EFFECT, TASKS, ResultFolder

BLOCKS = 6
COMPUTE = {"joint": None, "tm+te": 3.5, "random": 4.0}
RANGE = (0.50, 0.52, 0.54, 0.56, 0.58, 0.60)
NULL = (0.45, 0.44, 0.43, 0.42, 0.41, 0.40)
NOISE = (-1.0, -0.5, 0.0, 0.5, 1.0)
"""Of the seeds; mean 0."""
TITLE = "rooms, small, 2 tasks"


def found(*paths):
    return find(read_settings(list(paths)))


def noisy(mean, times=1.0):
    """A gain per seed."""
    return [mean + times * value for value in NOISE]


def compared(path, gains, seeds=range(5), tasks=TASKS, tuned=None, lr=1e-3, **settings):
    """A folder in which an arm's Δm over joint training is known.

    Args:
        gains: arm -> its gain over joint training in %: a number, one per seed, or a function of the seed.
    """
    folder = ResultFolder(path, ["joint", *gains], seeds, tasks, backbone="small", **settings)
    edit(folder, lr=lr, tuned=tuned or {})
    for seed in folder.seeds:
        level = SEED_EFFECT[seed % len(SEED_EFFECT)]
        bases = {task: folder.gained(task, level) for task in tasks}
        folder.run("joint", seed, metrics=bases)
        for arm, gain in gains.items():
            value = gain(seed) if callable(gain) else gain[seed] if isinstance(gain, list | tuple) else gain
            if value is not None:
                folder.run(arm, seed, metrics=above(folder, bases, value), **costs(arm))
    return folder


def above(folder, bases, gain):
    """Metrics that are ``gain`` % better than ``bases``, all or by task."""
    by_task = gain if isinstance(gain, dict) else dict.fromkeys(bases, gain)
    lower = {task: facts["lower_is_better"] for task, facts in folder.tasks.items()}
    return {task: base * (1 + (-1 if lower[task] else 1) * by_task[task] / 100) for task, base in bases.items()}


def costs(arm):
    """CPU seconds are 200 of joint training, and 500 of what is expanded."""
    compute = COMPUTE.get(arm)
    return {} if compute is None else {"structure": {"compute": compute}, "cpu_seconds": 500.0}


def edit(folder, **changes):
    """Change ``experiment.json``."""
    path = folder.path / "experiment.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def one_block(path, gain, seeds=range(5), kinds=("tm", "te"), **known):
    """A folder of modules in one block at a time.

    Args:
        gain: of (kind, block, seed), in %.
        known: rows of the report, one number per block or a function of the seed.
    """
    arms = {f"{kind}-at-{block}": None for kind in kinds for block in range(BLOCKS)}
    folder = compared(path, dict.fromkeys(arms), seeds)
    rows = {"range": RANGE, "null": NULL, "gains": RANGE[::-1], "gradient_norms": [1.0] * BLOCKS} | known
    for seed in folder.seeds:
        report = {key: list(row(seed) if callable(row) else row) for key, row in rows.items()}
        bases = {task: folder.gained(task, SEED_EFFECT[seed % len(SEED_EFFECT)]) for task in TASKS}
        for kind in kinds:
            for block in range(BLOCKS):
                metrics = above(folder, bases, gain(kind, block, seed))
                structure = {"compute": 2.0, "report": {"blocks": [f"layer.{b}" for b in range(BLOCKS)], **report}}
                folder.run(f"{kind}-at-{block}", seed, metrics=metrics, structure=structure)
    return folder


def planted(path, **options):
    """Conflict gains 3 points over joint training, random plans 1, and rivals more or less."""
    gains = {
        "tm+te": noisy(3.0),
        "longer": noisy(2.95, 1.1),
        "random": noisy(1.5),
        "random-2": noisy(0.5),
        "reverse": noisy(5.0),
        "lora": noisy(3.0, 4.0),
        "bitfit": noisy(1.0),
    }
    return compared(path, gains, **options)
