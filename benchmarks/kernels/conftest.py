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
    "ViT-T, 224 px": Shape(8, 197, 192, 3),
    "ViT-S, 224 px": Shape(4, 197, 384, 6),
    "ViT-B, 224 px": Shape(2, 197, 768, 12),
    "ViT-T, 512 px": Shape(2, 1024, 192, 3),
}
RIVALS = {"printed", "eager", "concatenated", "ours"}


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def shape(request) -> Shape:
    torch.manual_seed(0)
    return request.param


@pytest.fixture(autouse=True)
def _facts(benchmark, request) -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    benchmark.extra_info |= {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit or "unknown",
    }
    # rivals are compared within a group: same operation, shape and direction
    labels = [label for label in request.node.callspec.id.split("-") if label not in RIVALS]
    benchmark.group = ", ".join([request.node.originalname.removeprefix("test_"), "-".join(labels)])


def pytest_benchmark_update_machine_info(config, machine_info) -> None:
    """What a figure depends on, and nothing else about somebody's machine."""
    cpu = machine_info["cpu"]
    facts = {"cpu": cpu.get("brand_raw", "unknown"), "cores": cpu.get("count"), "python": platform.python_version()}
    machine_info.clear()
    machine_info |= facts


def pytest_benchmark_update_json(config, benchmarks, output_json) -> None:
    """Percentiles instead of every single time."""
    for record in output_json["benchmarks"]:
        times = torch.tensor(record["stats"].pop("data"), dtype=torch.float64)
        low, high = times.quantile(torch.tensor([0.2, 0.8], dtype=torch.float64)).tolist()
        record["stats"] |= {"p20": low, "p80": high}
