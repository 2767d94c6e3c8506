"""Time rivals against each other: interleaved, so that a drifting clock meets all of them, and from a cold cache."""

import ctypes
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch

FLUSH = 2**28  # bytes: several times the last cache of a GPU, or of the cores that one process gets
LONGEST_PAUSE = 0.05  # seconds; a queue of launches is full long before


class Rival(NamedTuple):
    """What is timed, and what raises an AssertionError where its result is wrong."""

    run: Callable[[], Any]
    check: Callable[[], None] = lambda: None


class Result(NamedTuple):
    """Of one rival: its times, or why it has none."""

    seconds: list[float]
    peak_bytes: int | None = None
    """The most memory above what was allocated before; on the CPU, where Linux can tell what was resident."""
    repeats: bool | None = None
    """Whether two runs gave the same bits; None of rivals that return no tensors."""
    error: str | None = None


class Runner(NamedTuple):
    """A rival that has run, and how long the host was busy with it."""

    run: Callable[[], Any]
    host_seconds: float


Report = Callable[[str, Result, bool], None]
Measure = Callable[[Runner, torch.device], float]


def race(
    rivals: Mapping[str, Rival],
    device: torch.device,
    *,
    rounds: int = 21,
    host: bool = False,
    report: Report | None = None,
) -> dict[str, Result]:
    """Run every rival once a round. One that fails, whenever it does, leaves the race; the others go on.

    Args:
        rounds: at least 5 are run; after those, no more than 20 seconds' worth of rounds.
        host: time from call to completion with the host's clock, for rivals that wait for the device themselves.
            Otherwise a GPU is timed by events, behind a pause in which the host can queue the whole rival.
        report: ``report(name, result, final)`` is called with every rival's first times, then with all of them.
    """
    measure: Measure = _host_time if host or device.type != "cuda" else _device_time
    tell: Report = report or (lambda name, result, final: None)
    results: dict[str, Result] = {}
    runners: dict[str, Runner] = {}
    for name, rival in rivals.items():
        with _failing(name, results, tell):
            rival.check()
            runners[name], results[name] = _warm_up(rival, device)
            if report:
                first = [measure(runners[name], device) for _ in range(3)]
                tell(name, results[name]._replace(seconds=first), False)
        if results[name].error and device_is_lost(device):
            return results  # the others had no chance
    end = time.perf_counter() + 20
    for done in range(rounds):
        if done >= 5 and time.perf_counter() > end:
            break
        for name in [name for name, result in results.items() if not result.error]:
            with _failing(name, results, tell):
                results[name].seconds.append(measure(runners[name], device))
    for name, result in results.items():
        if not result.error:
            tell(name, result, True)
    return results


def device_is_lost(device: torch.device) -> bool:
    """After an illegal access nothing runs on the device in this process: another has to go on."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def run_once(rivals: Mapping[str, Rival], device: torch.device, report: Report) -> dict[str, Result]:
    """Run every rival, unchecked, then once more: for a profiler that has been told to wait until then."""
    results: dict[str, Result] = {}
    for name, rival in rivals.items():
        with _failing(name, results, report):
            start = time.perf_counter()
            rival.run()
            results[name] = Result([time.perf_counter() - start])
            if device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.profiler.start()
                rival.run()
                torch.cuda.synchronize()
                torch.cuda.profiler.stop()
            report(name, results[name], True)
    return results


def compiled(function: Callable[..., Any], dynamic: bool | None = False) -> Callable[..., Any]:
    """``torch.compile``, but only once it is called: to import the compiler alone takes seconds."""
    made = cache(lambda: torch.compile(function, dynamic=dynamic))
    return lambda *args: made()(*args)


@contextmanager
def _failing(name: str, results: dict[str, Result], tell: Report) -> Iterator[None]:
    """An error becomes the rival's result."""
    try:
        yield
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        results[name] = Result([], error=f"{type(error).__name__}: {lines[0][:300]}")
        tell(name, results[name], True)


def _warm_up(rival: Rival, device: torch.device) -> tuple[Runner, Result]:
    """Compile; once more for the memory and the bits; on a GPU a third time, for what the host has to do."""
    first = rival.run()
    if device.type != "cuda":
        peak, second = _host_peak(rival.run)
        return Runner(rival.run, 0.0), Result([], peak, _same(first, second))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    second = rival.run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    repeats = _same(first, second)
    del first, second
    torch.cuda.synchronize()
    start = time.perf_counter()
    rival.run()
    host_seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    return Runner(rival.run, host_seconds), Result([], peak, repeats)


def _same(first: Any, second: Any) -> bool | None:
    """Of a tensor, or a tuple or list of them."""
    pairs = list(zip(*(x if isinstance(x, tuple | list) else [x] for x in (first, second)), strict=True))
    if not all(isinstance(x, torch.Tensor) for pair in pairs for x in pair):
        return None
    return all(torch.equal(a, b) for a, b in pairs)


def _host_peak(run: Callable[[], Any]) -> tuple[int | None, Any]:
    """Of one run, and what it returns."""
    own = Path("/proc/self")
    try:
        ctypes.CDLL(None).malloc_trim(0)  # else what the rival takes may be there already
        (own / "clear_refs").write_text("5")  # the most resident so far is what is resident now
        before = _status(own, "VmRSS")
    except (AttributeError, OSError):
        return None, run()
    result = run()
    return _status(own, "VmHWM") - before, result


def _status(process: Path, key: str) -> int:
    """Bytes."""
    (line,) = (line for line in (process / "status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


@cache
def _flush(device: torch.device) -> torch.Tensor:
    """What is written between two rivals, so that neither finds in a cache what the other has left there."""
    return torch.zeros(FLUSH, dtype=torch.int8, device=device)


def _host_time(runner: Runner, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    else:
        _flush(device).add_(1)
    start = time.perf_counter()
    runner.run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _device_time(runner: Runner, device: torch.device) -> float:
    """Behind a pause in which the host queues all that the rival launches: half as long again as it took before."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _flush(device).add_(1)
    pause = min(LONGEST_PAUSE, 0.0005 + 1.5 * runner.host_seconds)
    torch.cuda._sleep(int(pause * _cycles_per_second(device)))
    start.record()
    runner.run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


@cache
def _cycles_per_second(device: torch.device) -> float:
    """Of the clock that ``_sleep`` counts, the fastest of three tries: a clock that slows down makes a pause longer."""
    cycles, seconds = 10_000_000, []
    for _ in range(3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.cuda._sleep(cycles)
        end.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(end) / 1000)
    return cycles / min(seconds)


class Replay:
    """A clock for pytest-benchmark that shows times measured before: two readings a round."""

    def __init__(self, seconds: list[float]) -> None:
        self.readings = self._read(seconds)

    @staticmethod
    def _read(seconds: list[float]) -> Iterator[float]:
        for begin, length in zip(accumulate([0.0, *seconds]), seconds, strict=False):
            yield begin
            yield begin + length

    def __call__(self) -> float:
        return next(self.readings)
