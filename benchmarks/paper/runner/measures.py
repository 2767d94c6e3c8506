"""What a run's JSON tells beside its metrics."""

import ctypes
import gc
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

import dtme
import dtme_kernels
from dtme.randomness import put_back

from ...clients import import_torchvision
from ...kernels.device import facts
from ..arms import Batch, Facts
from ..tasks import Tasks

try:
    import fcntl
    import resource
except ImportError:  # on Windows
    fcntl = resource = None  # type: ignore[assignment]


def conflicts_of(report: dtme.ConflictReport) -> Facts:
    """Rates per block and the counts behind them, summed over blocks and pairs of tasks."""
    rates = {"range": report.range_rates, "null": report.null_rates}
    counts = {"range": report.range_counts, "null": report.null_counts, "valid": report.valid_counts}
    return {
        "blocks": list(report.blocks),
        "ranks": report.ranks.tolist(),
        **{name: [None if rate != rate else rate for rate in values.tolist()] for name, values in rates.items()},
        **{f"{name}_counts": int(values.sum()) // 2 for name, values in counts.items()},
    }


def what_is_not_finite(model: Any, batches: Iterable[Batch], tasks: Tasks) -> str | None:
    """The first loss, or gradient of one, that is not finite over some batches, the model as it is evaluated."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    with put_back(model), torch.enable_grad():
        model.eval()
        for x, labels in batches:
            predictions = model(x)
            for name, task in tasks.items():
                loss = task.loss(predictions[name], labels[name])
                if not loss.isfinite():
                    return f"the loss of {name!r} is {loss.item()}"
                gradients = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
                if not all(gradient is None or gradient.isfinite().all() for gradient in gradients):
                    return f"a gradient of the loss of {name!r} is not finite"
    return None


def run_facts() -> dict[str, str]:
    """What a figure is worth nothing without."""
    import_torchvision()
    import transformers

    return {**facts(), "transformers": transformers.__version__, "dtme": dtme_kernels.__version__}


def reset_peak_memory(device: str) -> None:
    """Of this process on a CPU; where the system cannot forget a peak, it is that of all runs of the process so far.

    What earlier runs have left behind is given back first, as far as it can be.
    """
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # of the GNU library: else it keeps what was freed
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: str) -> int:
    """Bytes: the device's, or what the process held on a CPU, all of Python and torch included."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if resource is None:
        return 0
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Of the processes that make ``path``, one; the others wait for it. A process that dies lets the next one in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
