"""Figures as JSON lines: each is on the disk as soon as it is known, so a run that is cut off keeps what it had.

Every line has a ``kind``. A line of kind ``race`` is one rival's time, ``{"group", "rival", "stats", "extra"}``, or has
an ``error`` instead of them; ``final`` is false while its race goes on, and a later line takes its place.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Line = dict[str, Any]


def file() -> Path | None:
    """Where lines are wanted: the environment variable ``DTME_LINES`` names it to every process of a run."""
    return Path(os.environ["DTME_LINES"]) if os.environ.get("DTME_LINES") else None


def write(kind: str, **values: Any) -> None:
    """Append a line, at once and in one piece, so that many processes can write one file; if none is named, nothing."""
    if path := file():
        with path.open("a") as output:
            output.write(json.dumps({"kind": kind, **values}) + "\n")


def read(path: Path, kind: str | None = None) -> Iterator[Line]:
    """Of one kind or of all; a last line that was cut off is left out."""
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if kind is None or line["kind"] == kind:
            yield line


def races(path: Path) -> dict[tuple[str, str], Line]:
    """{(group, rival): its last line}, in the order in which they began."""
    return {(line["group"], line["rival"]): line for line in read(path, "race")}


def held(path: Path, device: str) -> set[tuple[str, str]]:
    """The (group, rival) whose times, or whose failure, on this device need no repetition."""
    lines = races(path).items()
    return {key for key, line in lines if line["final"] and line["facts"]["device"] == device}


def gather(path: Path) -> Line:
    """What ``pytest-benchmark`` would have written: the races that have a time."""
    records = []
    for (group, rival), line in races(path).items():
        if "stats" in line:
            facts = line["facts"] | line["extra"]
            records.append({"group": group, "params": {"rival": rival}, "stats": line["stats"], "extra_info": facts})
    machine = next(read(path, "versions"), {})
    return {"machine_info": {k: v for k, v in machine.items() if k != "kind"}, "benchmarks": records}
