"""All conditions of an OUT as ``fair`` leaves them, with effects that are known."""

import json

from tests.paper.result_folders import TASKS, ResultFolder

STEPS = 300
RATE = 3e-3


def noise(seed):
    """In %, of every task alike: mean 0, standard deviation 0.3 over the seeds 0, 1 and 2."""
    return 0.3 * (seed - 1)


def condition(out, name, gains, tasks=TASKS, seeds=range(3), tuned=None, **settings):
    """One folder: ``gains`` maps an arm to its gain over the single-task runs in %, by task or one for all.

    A gain may be a function of the seed; the same noise of a seed comes on top for every task and arm.
    """
    arms = ["single", *gains]
    settings = {"steps": 600 if name == "steps-600" else STEPS, "backbone": "small", **settings}
    settings.setdefault("weight_decay", 1e-3 if name == "decay" else 1e-6)
    folder = ResultFolder(out / name, arms, seeds, tasks, **settings)
    path = folder.path / "experiment.json"
    experiment = json.loads(path.read_text()) | {"lr": 1e-3, "tuned": rates(arms, tasks) if tuned is None else tuned}
    if name == "untuned" and tuned is None:
        experiment["tuned"] = {}
    path.write_text(json.dumps(experiment))
    folder.single()
    for seed in folder.seeds:
        for arm, gain in gains.items():
            found = gain(seed) if callable(gain) else gain
            by_task = found if isinstance(found, dict) else dict.fromkeys(tasks, found)
            folder.run(arm, seed, {task: by_task[task] + noise(seed) for task in tasks})
    return folder


def rates(arms, tasks=TASKS, lr=RATE):
    """What the runner keeps of a tuning."""
    labels = [arm for arm in arms if arm != "single"] + [f"single.{task}" for task in tasks]
    tried = {f"{lr / 3:g}": -1.25, f"{lr:g}": 0.5, f"{lr * 3:g}": None}
    return {name: {"lr": lr, "tried": tried, "is_at_edge": name == "joint", "seeds": [1000]} for name in labels}


def whole(out, **options):
    """All conditions: semseg loses 8 % untuned and 3 % tuned, depth loses 4 % untuned and nothing tuned."""
    tuned = {"semseg": -3.0, "depth": 0.0}
    weighted = {"joint": tuned, "invpt-weights": {"semseg": -0.5, "depth": 0.0}, "uw": tuned}
    condition(out, "steps-300", weighted, **options)
    condition(out, "steps-600", {"joint": {"semseg": -2.0, "depth": 1.0}}, **options)
    condition(out, "untuned", {"joint": {"semseg": -8.0, "depth": -4.0}}, **options)
    condition(out, "decay", {"joint": tuned}, **options)
    return out
