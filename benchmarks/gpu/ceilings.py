"""``python -m benchmarks.gpu.ceilings``: what this is run with, and what a copy and a large product reach here."""

import platform
from functools import partial

import torch

from benchmarks.kernels import lines
from benchmarks.kernels.device import DEVICE, ON_GPU, RECORDING, facts
from benchmarks.kernels.race import Rival, race

COPIED = 2**30  # bytes read, and as many written
SIDE = 8192


def main() -> None:
    capability = ".".join(map(str, torch.cuda.get_device_capability())) if DEVICE.type == "cuda" else "none"
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda, "capability": capability}
    lines.write("versions", **facts(), **versions)
    if ON_GPU and not RECORDING:
        measure()


def measure() -> None:
    """Bandwidth of a copy, bytes read and written counted, and the rate of a bfloat16 product of random numbers."""
    source, target = (torch.ones(COPIED, dtype=torch.int8, device=DEVICE) for _ in range(2))
    a, b = (torch.randn(SIDE, SIDE, device=DEVICE).bfloat16() for _ in range(2))
    work = {"copy": 2 * COPIED, "product": 2 * SIDE**3}
    rivals = {"copy": Rival(partial(target.copy_, source)), "product": Rival(partial(torch.mm, a, b))}
    for name, result in race(rivals, DEVICE).items():
        if result.error:
            lines.write("ceiling", name=name, error=result.error)
        else:
            median = sorted(result.seconds)[len(result.seconds) // 2]
            lines.write("ceiling", name=name, median=median, per_second=work[name] / median)


if __name__ == "__main__":
    main()
