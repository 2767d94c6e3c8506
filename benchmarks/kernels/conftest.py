"""What every speed report shares: shapes, device, and the facts that a figure is worth nothing without."""

import ctypes
import os
import platform
import subprocess
from typing import NamedTuple

import pytest
import torch

from dtme_kernels.info import extension, triton_version

from .race import Replay, Result, race

DEVICE = torch.device(os.environ.get("DTME_BENCH_DEVICE", "cuda" if torch.cuda.is_available() else "cpu"))


if DEVICE.type == "cpu" and platform.libc_ver()[0] == "glibc":
    # freed memory stays with the process, as in the midst of a training run: else what is timed is the kernel clearing
    # pages for whoever allocates
    _TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
    for _option in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
        ctypes.CDLL(None).mallopt(_option, 2**31 - 1)


class Shape(NamedTuple):
    """One backbone's block: B images of N tokens with p channels in H heads; K tasks, t task tokens, D blocks."""

    images: int
    tokens: int
    channels: int
    heads: int
    tasks: int = 4
    task_tokens: int = 6
    blocks: int = 12


WIDTHS = {"ViT-T": (192, 3, 12), "ViT-S": (384, 6, 12), "ViT-B": (768, 12, 12), "ViT-L": (1024, 16, 24)}
if DEVICE.type == "cuda":
    SIZES = {"224 px": (64, 197), "448x576 px": (6, 1008), "512 px": (6, 1024)}
    SHAPES = {
        f"{model}, {size}": Shape(images, tokens, p, heads, tasks=5, blocks=blocks)
        for model, (p, heads, blocks) in WIDTHS.items()
        for size, (images, tokens) in SIZES.items()
    }
else:
    SHAPES = {
        "ViT-T, 224 px": Shape(8, 197, 192, 3),
        "ViT-S, 224 px": Shape(4, 197, 384, 6),
        "ViT-B, 224 px": Shape(2, 197, 768, 12),
        "ViT-T, 512 px": Shape(2, 1024, 192, 3),
    }
_races: dict[str, dict[str, Result]] = {}  # a race is run once, and shown by a test a rival


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every rival of a report is a test of its own, in one race: ``RIVALS`` names them, ours last."""
    if "rival" in metafunc.fixturenames:
        metafunc.parametrize("rival", metafunc.module.RIVALS)
    if "shape" in metafunc.fixturenames:
        shapes = getattr(metafunc.module, "SHAPES", SHAPES) | getattr(metafunc.module, "MORE_SHAPES", {})
        metafunc.parametrize("shape", shapes.values(), ids=shapes.keys())


@pytest.fixture
def device() -> torch.device:
    torch.manual_seed(0)
    return DEVICE


@pytest.fixture
def report(benchmark, request, rival):
    """``report(make_rivals, moved=bytes, operations=flops)``: race, and show this rival's times.

    ``make_rivals`` checks every rival's result and returns them by name; it is called once a race.
    """
    key = f"{request.node.originalname.removeprefix('test_')}, {request.node.callspec.id.replace(rival, '').strip('-')}"
    benchmark.group = key.replace("--", ", ").replace("px-", "px, ")

    def run(make_rivals, *, moved: int, operations: int, host: bool = False) -> None:
        if key not in _races:
            _races[key] = race(make_rivals(), DEVICE, host=host)
        if rival not in _races[key]:
            pytest.skip(f"{rival} does not run on {DEVICE.type}")
        result = _races[key][rival]
        benchmark._timer = Replay(result.seconds)
        benchmark.pedantic(lambda: None, rounds=len(result.seconds))
        median = float(torch.tensor(result.seconds, dtype=torch.float64).median())
        assert abs(benchmark.stats.stats.median - median) <= 0.5 * median, "pytest-benchmark did not read the replay"
        benchmark.extra_info |= _facts() | {
            "GB/s": moved / median / 1e9,
            "TFLOP/s": operations / median / 1e12,
            "peak MB": None if result.peak_bytes is None else result.peak_bytes / 1e6,
        }

    return run


def _facts() -> dict[str, object]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    on_gpu = DEVICE.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "triton": triton_version(),
        "c++": extension(),
        "commit": commit or "unknown",
    }


def pytest_benchmark_update_machine_info(config, machine_info) -> None:
    """What a figure depends on, and nothing else about somebody's machine."""
    cpu = machine_info["cpu"]
    facts = {"cpu": cpu.get("brand_raw", "unknown"), "cores": cpu.get("count"), "python": platform.python_version()}
    machine_info.clear()
    machine_info |= facts


def pytest_benchmark_update_json(config, benchmarks, output_json) -> None:
    """Percentiles instead of every single time."""
    for record in output_json["benchmarks"]:
        del record["options"]  # of a clock that pytest-benchmark did not run
        times = torch.tensor(record["stats"].pop("data"), dtype=torch.float64)
        low, high = times.quantile(torch.tensor([0.2, 0.8], dtype=torch.float64)).tolist()
        record["stats"] |= {"p20": low, "p80": high}
