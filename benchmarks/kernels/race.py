"""Time rivals against each other: interleaved, so that a drifting clock meets all of them, and from a cold cache."""

import ctypes
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch

Rivals = Mapping[str, Callable[[], Any]]
FLUSH = 2**28  # bytes: several times the last cache of a GPU, or of the cores that one process gets


class Result(NamedTuple):
    """Of one rival."""

    seconds: list[float]
    peak_bytes: int | None
    """The most memory above what was allocated before; on the CPU, where Linux can tell what was resident."""


def race(rivals: Rivals, device: torch.device, *, rounds: int = 21, host: bool = False) -> dict[str, Result]:
    """Run every rival once a round.

    Args:
        rounds: at least 5 are run; after those, no more than 20 seconds' worth of rounds.
        host: time from call to completion with the host's clock, for rivals that wait for the device themselves.
            Otherwise a GPU is timed by events, behind a pause in which the host can queue the whole rival.
    """
    peaks = {name: _warm_up(rival, device) for name, rival in rivals.items()}
    measure = _host_time if host or device.type != "cuda" else _device_time
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    end = time.perf_counter() + 20
    for done in range(rounds):
        if done >= 5 and time.perf_counter() > end:
            break
        for name, rival in rivals.items():
            seconds[name].append(measure(rival, device))
    return {name: Result(seconds[name], peaks[name]) for name in rivals}


def _warm_up(rival: Callable[[], Any], device: torch.device) -> int | None:
    """Compile, then once more for the memory."""
    rival()
    if device.type != "cuda":
        return _host_peak(rival)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    rival()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _host_peak(rival: Callable[[], Any]) -> int | None:
    own = Path("/proc/self")
    try:
        ctypes.CDLL(None).malloc_trim(0)  # else what the rival takes may be there already
        (own / "clear_refs").write_text("5")  # the most resident so far is what is resident now
        before = _status(own, "VmRSS")
        rival()
        return _status(own, "VmHWM") - before
    except (AttributeError, OSError):
        return None


def _status(process: Path, key: str) -> int:
    """Bytes."""
    (line,) = (line for line in (process / "status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


@cache
def _flush(device: torch.device) -> torch.Tensor:
    """What is written between two rivals, so that neither finds in a cache what the other has left there."""
    return torch.zeros(FLUSH, dtype=torch.int8, device=device)


def _host_time(rival: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    else:
        _flush(device).add_(1)
    start = time.perf_counter()
    rival()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _device_time(rival: Callable[[], Any], device: torch.device) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _flush(device).add_(1)
    torch.cuda._sleep(2_000_000)  # cycles: about a millisecond
    start.record()
    rival()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


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
