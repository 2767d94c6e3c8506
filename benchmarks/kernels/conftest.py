"""What every speed report shares: the shapes, and the facts that a figure is worth nothing without."""

import platform
import subprocess
from typing import NamedTuple

import pytest
import torch


class Shape(NamedTuple):
    """One backbone's block: B images of N tokens with p channels in H heads; K tasks, t task tokens, D blocks."""

    images: int
    tokens: int
    channels: int
    heads: int
    tasks: int = 4
    task_tokens: int = 6
    blocks: int = 12


SHAPES = {
    "ViT-T, 224²": Shape(8, 197, 192, 3),
    "ViT-S, 224²": Shape(4, 197, 384, 6),
    "ViT-B, 224²": Shape(2, 197, 768, 12),
    "ViT-T, 512²": Shape(2, 1024, 192, 3),
}


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def shape(request) -> Shape:
    torch.manual_seed(0)
    return request.param


@pytest.fixture(autouse=True)
def _facts(benchmark) -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    benchmark.extra_info |= {
        "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit or "unknown",
    }


def pytest_benchmark_update_machine_info(config, machine_info) -> None:
    machine_info.pop("node", None)  # the name of somebody's machine is no fact about the figures


def pytest_benchmark_update_json(config, benchmarks, output_json) -> None:
    """Percentiles instead of every single time."""
    for record in output_json["benchmarks"]:
        times = torch.tensor(record["stats"].pop("data"), dtype=torch.float64)
        low, high = times.quantile(torch.tensor([0.2, 0.8], dtype=torch.float64)).tolist()
        record["stats"] |= {"p20": low, "p80": high}
