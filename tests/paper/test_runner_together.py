"""One run on several processes, which torchrun starts."""

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn

from benchmarks.paper.arms import Combination
from benchmarks.paper.results import read_runs
from benchmarks.paper.runner.together import average_gradients, in_any_process, share_buffers
from benchmarks.paper.runner.training import Diverged, Training
from benchmarks.paper.tasks import Task

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def launched(*arguments):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*TORCHRUN, *arguments], capture_output=True, text=True, env=environment)
    return done.returncode, done.stdout + done.stderr


class Scaled(nn.Module):
    tasks = ("a",)

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x, tasks=None):
        return {"a": self.scale * x}

    def parameter_groups(self, lr, weight_decay):
        return [{"params": [self.scale], "lr": lr, "weight_decay": weight_decay}]


def averaging() -> None:
    """On each of two processes: gradients of halves of a batch, averaged, are those of the batch."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)).double(), torch.randn(8, 5).double()
    unused = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    late = nn.Parameter(torch.ones(2))  # of another dtype, and used on one process alone
    optimizer = torch.optim.SGD([*model.parameters(), unused, late])
    (want,) = torch.autograd.grad(model(x).square().mean(), [model[0].weight])
    loss = model(x[rank::2]).square().mean()
    (loss + late.sum() if rank else loss).backward()
    average_gradients(optimizer)
    torch.testing.assert_close(model[0].weight.grad, want, rtol=1e-12, atol=1e-14)
    assert torch.equal(late.grad, torch.full((2,), 0.5)) and torch.equal(unused.grad, torch.zeros_like(unused))
    assert in_any_process(rank == 1) and not in_any_process(False)
    training = Training(Scaled(), Combination({"a": None}), 3, 0)
    training.train_with(0.1, 0.0)
    task = Task(1, lambda y, target: (y * target).mean(), None, "", "", lower_is_better=True)
    batches = [(torch.ones(2, 1), {"a": torch.full((2, 1), x)}) for x in (1.0, math.nan if rank else 1.0)]
    try:
        training.run(batches, {"a": task}, lambda _: None)
    except Diverged as error:
        assert ("the loss of 'a' is nan" if rank else "in another process") in str(error) and "at step 1" in str(error)
    else:
        raise AssertionError("one process has no number, and both have to stop")
    norm = nn.BatchNorm1d(2)
    norm.running_mean += rank + 1
    share_buffers(norm)
    assert norm.running_mean.tolist() == [1, 1]
    dist.destroy_process_group()


def test_gradients_of_parts_average_to_those_of_the_batch():
    status, said = launched(
        "--no-python", sys.executable, "-c", "import tests.paper.test_runner_together as t; t.averaging()"
    )
    assert status == 0, said


@pytest.mark.parametrize("arm", ["pcgrad"])
def test_what_needs_one_device_is_refused_by_name(tmp_path, arm):
    status, said = launched("-m", "benchmarks.paper", *COMMAND, "--arms", arm, "--out", str(tmp_path / "out"))
    assert status and f"arm '{arm}' trains on one device only" in said


COMMAND = ("run", "pilot", "--size", "32", "--train", "16", "--val", "7", "--steps", "6", "--batch", "4", "--read", "8")


def test_a_run_of_two_processes(tmp_path):
    options = ("--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out"), "--device", "cpu")
    status, said = launched("-m", "benchmarks.paper", *COMMAND, *options)
    assert status == 0, said
    runs = list(read_runs(tmp_path / "out"))
    assert [run["arm"] for run in runs] == ["joint", "tm+te"]
    for run in runs:
        assert run["status"] == "done" and run["settings"]["processes"] == 2
        assert all(value is not None for value in run["metrics"].values())
        assert run["conflicts"]["start"]["valid_counts"] > 0  # read by both
    odd = launched("-m", "benchmarks.paper", *COMMAND, *options[:2], "--out", str(tmp_path / "odd"), "--batch", "3")
    assert odd[0] and "--batch must be a multiple of the 2 processes, got 3" in odd[1]
