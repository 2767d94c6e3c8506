"""Many runs, some at once, each in a process that a kill of another does not touch."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from tqdm.auto import tqdm

from ..results import read_run, run_path
from .config import Config, differences
from .measures import fcntl

PATIENCE = 60.0
"""Seconds in which a worker that was asked to stop has to have saved its run."""


class RunError(RuntimeError):
    """Runs failed: the message names them and says why."""


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """The folder is this process's as long as it runs.

    Raises:
        RunError: another process runs into it.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("a") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise RunError(f"another process runs into {out}: wait for it, or name another --out") from error
        yield


def is_done(config: Config, out: Path) -> bool:
    """Whether the run's JSON is there.

    Raises:
        ValueError: it is there and is of other settings.
    """
    path = run_path(out, config.name)
    if not path.exists():
        return False
    if other := differences(read_run(path).get("settings", {}), config.settings | {"lr": config.lr}):
        raise ValueError(f"{path} was run with another {other}. Remove it, or name another --out")
    return True


@dataclass
class _Worker:
    """A process, the run it is at, and how many steps of it were counted."""

    number: int
    process: subprocess.Popen[str]
    log: IO[str]
    config: Config | None = None
    steps: int = 0


def _visible_devices() -> list[str]:
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(i) for i in range(max(1, torch.cuda.device_count()))]


def in_turn(configs: Sequence[Config], jobs: int) -> list[Config]:
    """Seeds in groups of ``jobs``, in each group arm by arm: runs at once then seldom wait for one joint training."""
    seeds = list(dict.fromkeys(config.seed for config in configs))
    group = {seed: at // jobs for at, seed in enumerate(seeds)}
    kinds = [(config.arm, config.task, config.variant) for config in configs]
    place = {kind: at for at, kind in enumerate(dict.fromkeys(kinds))}
    order = sorted(zip(kinds, configs, strict=True), key=lambda pair: (group[pair[1].seed], place[pair[0]]))
    return [config for _, config in order]


class Schedule:
    """Runs ``configs`` into ``out``, ``jobs`` at a time; those that are done are left as they are.

    Args:
        place: the other arguments of ``one.Workplace``, as JSON holds them.
        title: of the progress bar.

    Raises:
        RunError: some runs failed, after all others were run. KeyboardInterrupt: stopped; running the same goes on.
    """

    def __init__(
        self,
        configs: Sequence[Config],
        out: Path,
        *,
        jobs: int = 2,
        place: dict[str, Any] | None = None,
        title: str = "",
    ) -> None:
        self.out, self.place, self.title = out, {**(place or {}), "out": str(out)}, title
        self.waiting = [config for config in configs if not is_done(config, out)]
        self.total, self.jobs = len(configs), max(1, min(jobs, len(self.waiting)))
        self.failed: dict[str, str] = {}
        self._events: queue.Queue[tuple[_Worker, dict[str, Any] | None]] = queue.Queue()

    def run(self) -> None:
        if not self.waiting:
            return
        (self.out / "work").mkdir(parents=True, exist_ok=True)
        steps = sum(config.steps for config in self.waiting)
        self.done = self.total - len(self.waiting)
        self._bar = tqdm(total=steps, desc=self.title, unit="step", smoothing=0.05)
        self._bar.set_postfix_str(f"{self.done} of {self.total} runs")
        workers = [self._start(number) for number in range(self.jobs)]
        try:
            while any(worker.config is not None for worker in workers):
                worker, event = self._events.get()
                self._handle(worker, event, workers)
        except KeyboardInterrupt:
            tqdm.write("stopping: every run is saved, the same command goes on")
            raise
        finally:
            self._stop(workers)
            self._bar.close()
        if self.failed:
            lines = "\n".join(f"  {name}: {why}" for name, why in self.failed.items())
            raise RunError(
                f"{len(self.failed)} of {self.total} runs failed, the others are done; "
                f"logs are in {self.out / 'work'}:\n{lines}"
            )

    # --- workers -----------------------------------------------------------------------------------------------------

    def _start(self, number: int) -> _Worker:
        log = (self.out / "work" / f"worker-{number}.log").open("a")
        environment = os.environ | {"OMP_NUM_THREADS": str(self.waiting[0].threads)}
        if self.waiting[0].device == "cuda":
            environment["CUDA_VISIBLE_DEVICES"] = _visible_devices()[number % len(_visible_devices())]
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.paper.runner.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            start_new_session=True,  # Ctrl-C reaches this process alone, which then asks each worker to save
        )
        worker = _Worker(number, process, log)
        threading.Thread(target=self._listen, args=(worker,), daemon=True).start()
        self._next(worker)
        return worker

    def _listen(self, worker: _Worker) -> None:
        assert worker.process.stdout is not None
        for line in worker.process.stdout:
            self._events.put((worker, json.loads(line)))
        self._events.put((worker, None))

    def _next(self, worker: _Worker) -> None:
        """Give a worker its next run, or let it end."""
        assert worker.process.stdin is not None
        worker.config, worker.steps = (self.waiting.pop(0) if self.waiting else None), 0
        try:
            if worker.config is None:
                worker.process.stdin.close()
            else:
                order = {"config": worker.config.as_dict(), "place": self.place}
                worker.process.stdin.write(json.dumps(order) + "\n")
                worker.process.stdin.flush()
        except BrokenPipeError:
            pass  # it is dead, and `_listen` tells

    def _handle(self, worker: _Worker, event: dict[str, Any] | None, workers: list[_Worker]) -> None:
        config = worker.config
        if config is None:
            return
        if event is None:  # it is dead: out of memory, killed
            status = worker.process.wait()
            self._finish(worker, failed=f"the process ended with status {status} (see {worker.log.name})")
            worker.config = None
            if self.waiting:
                workers[workers.index(worker)] = self._start(worker.number)
            return
        if event["event"] == "step":
            is_there = event["what"] in ("going on", "building")  # steps of earlier, or that another run trained
            self._count(worker, event["step"], is_there)
            self._bar.set_postfix_str(f"{self.done} of {self.total} runs, {config.name} {event['what']}")
            return
        if event["event"] == "done":
            self._finish(worker)
            if event["status"] == "diverged":
                tqdm.write(f"{config.name} diverged: {event['reason']}")
        else:
            self._finish(worker, failed=event.get("error", "it was stopped"))
        self._next(worker)

    def _finish(self, worker: _Worker, failed: str | None = None) -> None:
        assert worker.config is not None
        self._count(worker, worker.config.steps, True)
        self.done += 1
        if failed is not None:
            self.failed[worker.config.name] = failed
            tqdm.write(f"{worker.config.name} failed: {failed}")

    def _count(self, worker: _Worker, step: int, is_there: bool = False) -> None:
        """Steps that were there, or that nobody trains any more, are done and say nothing of how long others take.

        Nor does the time until then, in which a worker started, read data or applied a structure.
        """
        more = max(0, step - worker.steps)
        worker.steps += more
        if not is_there:
            self._bar.update(more)
            return
        self._bar.last_print_t = time.time()
        self._bar.initial += more
        self._bar.last_print_n += more
        self._bar.n += more
        self._bar.refresh()

    def _stop(self, workers: Sequence[_Worker]) -> None:
        """Ask all to save and end; nobody waits for one that does not."""
        for worker in workers:
            if worker.config is not None and worker.process.poll() is None:
                worker.process.send_signal(signal.SIGTERM)
        for worker in workers:
            try:
                worker.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
            worker.log.close()
