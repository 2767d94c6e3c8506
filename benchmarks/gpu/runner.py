"""Run stages within a budget of seconds: a stage that fails or takes too long is ended, and the next one begins."""

import os
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from benchmarks.kernels import lines
from benchmarks.kernels.device import LOST_DEVICE

from .stages import Stage

LEFT_FOR_THE_SUMMARY = 5.0
MOST_RESTARTS = 3
NOTHING_TO_DO = 5  # pytest's status


def run(chosen: Iterable[Stage], budget: float, log: Path, environment: Mapping[str, str]) -> bool:
    """Whether no stage failed. One that cannot fit is passed over, and smaller ones after it may fit.

    Every stage leaves a line of kind ``stage``: done, failed, cut off, or skipped.
    """
    end = time.monotonic() + budget - LEFT_FOR_THE_SUMMARY
    good = True
    for stage in chosen:
        left = end - time.monotonic()
        if stage.seconds > left:
            status, seconds = f"skipped: wants about {stage.seconds:.0f} s of {max(0, left):.0f} s left", 0.0
        else:
            started = time.monotonic()
            status = _run_stage(stage, min(left, stage.most), log, environment)
            seconds = time.monotonic() - started
        good = good and not status.startswith("failed")
        lines.write("stage", name=stage.name, status=status, seconds=round(seconds, 1))
        print(f"{stage.name:18}{seconds:7.1f} s  {status}", flush=True)
    return good


def _run_stage(stage: Stage, most: float, log: Path, environment: Mapping[str, str]) -> str:
    """How it ended. After a kernel that took the device with it, the rest is run in a new process."""
    end = time.monotonic() + most
    for _ in range(1 + MOST_RESTARTS):
        status = _run_process(stage, end - time.monotonic(), log, environment)
        if status != LOST_DEVICE:
            break
    if status is None:
        return f"cut off after {most:.0f} s"
    if status == NOTHING_TO_DO:
        return "done: nothing was left to do"
    return "done" if status == 0 else f"failed with status {status}"


def _run_process(stage: Stage, seconds: float, log: Path, environment: Mapping[str, str]) -> int | None:
    """Its exit status; None if it was ended, with all that it has started."""
    with log.open("a") as output:
        print(f"\n== {stage.name}: {' '.join(stage.command)}", file=output, flush=True)
        process = subprocess.Popen(
            stage.command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**environment, "DTME_STAGE": stage.name},
            start_new_session=True,
        )
        try:
            return process.wait(max(0.1, seconds))
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """The whole group: workers and profilers too."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(2)
        except subprocess.TimeoutExpired:
            continue
