"""What the speed reports run on, and the facts that a figure is worth nothing without."""

import os
import subprocess
from functools import cache
from shutil import which

import torch

from dtme_kernels.info import extension, triton_version

# under the recording driver (benchmarks.gpu.recording) what would run on a GPU is launched, on CPU tensors, by nobody
RECORDING = os.environ.get("DTME_BENCH_DEVICE") == "recording"
_named = os.environ.get("DTME_BENCH_DEVICE", "cuda" if torch.cuda.is_available() else "cpu")
DEVICE = torch.device("cpu" if RECORDING else _named)
ON_GPU = RECORDING or DEVICE.type == "cuda"
LOST_DEVICE = 70  # the exit status that asks for a new process, which resumes


@cache
def facts() -> dict[str, str]:
    """Of this process. ``DTME_COMMIT`` names the commit where git cannot tell it."""
    commit = os.environ.get("DTME_COMMIT", "")
    if not commit and which("git"):
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    device = f"CPU, {torch.get_num_threads()} threads"
    if ON_GPU:
        device = "recording driver" if RECORDING else torch.cuda.get_device_name()
    return {
        "device": device,
        "torch": torch.__version__,
        "triton": triton_version(),
        "c++": extension(),
        "commit": commit or "unknown",
    }
