"""A run's JSON: where it lies and what it holds.

``OUT/experiment.json`` says what the folder is about::

    {"format": 1, "experiment": "pilot", "arms": {name: title}, "seeds": [0, 1, ...], "settings": {option: value},
     "data": "rooms", "tasks": {name: {"metric": "mIoU", "unit": "%", "lower_is_better": false}}}

and ``OUT/runs/ARM.seed-0.json``, or ``OUT/runs/ARM.TASK.seed-0.json`` where each task is trained alone, is one run::

    {"format": 1, "arm": "tm+te", "task": null, "seed": 0,
     "status": "done" | "diverged", "reason": null | "the loss of 'depth' is nan at step 40",
     "settings": {...},                          what this run was trained with: its lr, steps, batch ...
     "facts": {"device", "torch", "commit", "transformers", "dtme", ...},
     "metrics": {task: number or null},          at the last step, on the validation split; null where not defined
     "losses": {task: [mean of every tenth part of the training]},
     "seconds": {"training": s, "analysis": s,   the joint part included, whichever run trained it; of analyses, those
                 "structure": s, "evaluation": s},   that this run made: arms of a seed share the one at the start
     "cpu_seconds": s,                           of all of them together
     "peak_memory": bytes,                       of the process, while it trained the part that is the arm's own
     "parameters": {"backbone": n, "heads": n, "added": n, "combination": n},
     "weights": first digits of the SHA-256 of the trained weights,
     "structure": {...}, "combination": {...},   facts of the arm, the plan among them
     "conflicts": {"start" | "end": {"blocks": [...], "range": [rate per block], "null": [...], "ranks": [...],
                                      "range_counts": n, "null_counts": n, "valid_counts": n}} or {}}
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dtme.files import write_beside

FORMAT = 1
Run = dict[str, Any]


def run_name(arm: str, task: str | None, seed: int, variant: str = "") -> str:
    return ".".join(part for part in (arm, task, variant, f"seed-{seed}") if part)


def run_path(out: Path, name: str) -> Path:
    return out / "runs" / f"{name}.json"


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises:
        ValueError: it is none; the message names it.
    """
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON: {error}. Remove it to make it again") from error


def write_json(path: Path, content: Any) -> None:
    """Whole or not at all."""
    text = json.dumps(content, indent=1) + "\n"
    write_beside(path, lambda beside: beside.write_text(text))


def read_experiment(out: Path) -> dict[str, Any]:
    path = out / "experiment.json"
    if not path.is_file():
        raise ValueError(f"{out} holds no experiment.json: run `python -m benchmarks.paper run EXPERIMENT --out {out}`")
    return _checked(path, read_json(path))


def read_run(path: Path) -> Run:
    return _checked(path, read_json(path))


def read_runs(out: Path) -> Iterator[Run]:
    """All runs of a folder that ended, in the order of their names."""
    for path in sorted((out / "runs").glob("*.json")):
        yield read_run(path)


def _checked(path: Path, content: Any) -> dict[str, Any]:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        version = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path} has format {version!r}, this release reads {FORMAT}")
    return content
