"""A measurement whose command is killed does not go on behind its back."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


def children_of(pid):
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rsplit(")", 1)[1].split()
            command = (entry.parent / "cmdline").read_text()
        except OSError:
            continue
        if int(fields[1]) == pid and "spawn_main" in command:
            found.append(int(entry.parent.name))
    return found


def until(condition, seconds):
    end = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < end:
        time.sleep(0.1)
    return value


def is_gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes by /proc")
def test_workers_end_with_the_command_that_started_them(tmp_path):
    options = ["--size", "32", "--train", "24", "--val", "4", "--steps", "100000", "--batch", "4", "--seeds", "1"]
    options += ["--read", "16", "--sample", "8", "--permuted", "0", "--shares", "0.5", "--device", "cpu"]
    command = [sys.executable, "-m", "benchmarks.paper", "signal", *options]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )
    try:
        lock = tmp_path / "out" / "work" / "trunk.lr-0.001.seed-0.step-50000.lock"
        assert until(lock.exists, 240)  # the worker trains
        workers = children_of(process.pid)
        assert workers
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert until(lambda: all(map(is_gone, workers)), 60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
