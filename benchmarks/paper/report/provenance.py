"""What the runs were made with: settings, versions, time; and where runs of one folder differ in them."""

import json
from typing import Any

import numpy as np

from ..results import Run
from .folder import Folder, number
from .text import DASH, duration, listed, setting, table

MOST_VALUES = 6
"""Of a fact that differs between runs; the rest are counted."""


def _values(runs: list[Run], group: str, key: str) -> list[Any]:
    """The different values of a key in ``runs``, in the order of the runs; of runs that have it."""
    texts = dict.fromkeys(json.dumps(run[group][key], sort_keys=True) for run in runs if key in run[group])
    return [json.loads(text) for text in texts]


def _keys(runs: list[Run], group: str) -> list[str]:
    return list(dict.fromkeys(key for run in runs for key in run[group]))


def differing_facts(runs: list[Run]) -> list[str]:
    """One sentence for every fact, as the commit or a version, that is not the same for all runs."""
    sentences = []
    for key in _keys(runs, "facts"):
        count: dict[str, int] = {}
        for run in runs:
            value = setting(run["facts"][key]) if key in run["facts"] else "unknown"
            count[value] = count.get(value, 0) + 1
        if len(count) > 1:
            shown = [f"{value} ({n} run{'s' * (n > 1)})" for value, n in list(count.items())[:MOST_VALUES]]
            rest = len(count) - len(shown)
            sentences.append(
                f"The runs differ in {key}: {listed(shown)}{f' and {rest} others' if rest else ''}. This may "
                "be what makes a difference between arms."
            )
    return sentences


def facts_table(runs: list[Run]) -> str:
    rows = [[key, listed([setting(v) for v in _values(runs, "facts", key)])] for key in _keys(runs, "facts")]
    return table(["", "of the runs"], rows, left=2)


def settings_table(folder: Folder) -> str:
    """The settings that all runs share: the experiment's, and those of the runs that never differ."""
    shared = dict(folder.settings)
    own = _own(folder)
    for key in _keys(folder.runs(), "settings"):
        values = _values(folder.runs(), "settings", key)
        if key not in own and len(values) == 1:
            shared[key] = values[0]
    rows = [[key, setting(value)] for key, value in shared.items() if key not in own]
    return table(["setting", "value"], rows, left=2)


def arms_settings_table(folder: Folder) -> str | None:
    """The settings in which runs differ, by arm; None if they differ in none."""
    own = _own(folder)
    if not own:
        return None
    rows = []
    for arm in folder.arms.values():
        cells = [listed([setting(v) for v in _values(arm.all(), "settings", key)]) or DASH for key in own]
        rows.append([arm.title, arm.name, *cells])
    return table(["arm", "name", *own], rows, left=2)


def _own(folder: Folder) -> list[str]:
    """Settings that are not the same for all runs, or not what the experiment says."""
    runs = folder.runs()
    found = []
    for key in _keys(runs, "settings"):
        values = _values(runs, "settings", key)
        is_everywhere = all(key in run["settings"] for run in runs)
        if len(values) > 1 or not is_everywhere or (key in folder.settings and folder.settings[key] != values[0]):
            found.append(key)
    return found


def times(runs: list[Run]) -> dict[str, float]:
    """Seconds of all runs together: ``wall`` (training, structure, evaluation and whatever else was timed), ``cpu``."""
    wall = [number(value) for run in runs for value in run["seconds"].values()]
    return {
        "runs": len(runs),
        "wall": float(np.sum(wall)),
        "cpu": float(np.sum([number(run.get("cpu_seconds")) for run in runs])),
    }


def times_sentence(runs: list[Run]) -> str:
    total = times(runs)
    return (
        f"{total['runs']} runs took {duration(total['wall'])} of wall time, each counted by itself though some may "
        f"have run at once or share their joint part, and {duration(total['cpu'])} of CPU time."
    )
