"""A process that trains one run after the other: what to run comes in as lines of JSON, what happens goes out so.

In: ``{"config": {...}, "place": {...}}``. Out, of each run: ``{"event": "step", "what": "training", "step": 40}`` now
and then, and at its end ``{"event": "done", "status": "done", "reason": null}`` (or "diverged" and why),
``{"event": "failed", "error": "..."}`` or ``{"event": "stopped"}``, after which the process ends.
"""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any, TextIO

EVERY = 0.2
"""Seconds between two lines about the steps of a run."""


class Teller:
    """Tells how far a run is, not at every step."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._last, self._what = stream, 0.0, ""
        self.is_alone = False
        """Whether whoever listened is gone; there is nobody to run for then."""

    def event(self, **content: Any) -> None:
        try:
            self._stream.write(json.dumps(content) + "\n")
            self._stream.flush()
        except BrokenPipeError:
            self.is_alone = True

    def step(self, what: str, step: int) -> None:
        now = time.monotonic()
        if what != self._what or now - self._last > EVERY:
            self._what, self._last = what, now
            self.event(event="step", what=what, step=step)


def what_happened(error: BaseException) -> str:
    """In one line, for whoever reads the table of runs; the traceback is in the log."""
    if isinstance(error, OSError) and error.errno is not None:
        where = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror}{where}; what was written before is not lost, and the same command goes on from it"
    return f"{type(error).__name__}: {error}"


def main() -> None:
    # what libraries print must not come between the lines: their output goes where errors go, into the log
    events = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    teller, stopping = Teller(events), []
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: stopping.append(True))

    from ...clients import import_torchvision
    from ..experiments import ARMS
    from .config import Config
    from .one import RunOfArm, Stopped, Workplace

    import_torchvision()  # before a saved model is unpickled, whose library may import it

    def is_over() -> bool:
        return bool(stopping) or teller.is_alone

    for line in sys.stdin:
        order = json.loads(line)
        config, place = Config.from_dict(order["config"]), order["place"]
        print(f"=== {config.name}", flush=True)
        try:
            workplace = Workplace(**place | {"out": Path(place["out"])}, tell=teller.step, stop=is_over)
            content = RunOfArm(config, ARMS[config.arm], workplace).run()
            teller.event(event="done", status=content["status"], reason=content["reason"])
        except Stopped:
            teller.event(event="stopped")
        except Exception as error:
            traceback.print_exc()
            teller.event(event="failed", error=what_happened(error))
        if is_over():
            break


if __name__ == "__main__":
    main()
