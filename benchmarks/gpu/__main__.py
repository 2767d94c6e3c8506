"""``python -m benchmarks.gpu --budget 300``: what is worth most on a GPU in so many seconds.

Every figure is a JSON line in ``OUT/lines.jsonl`` as soon as it is known. What is written there at the end, or whenever
the run is cut off, can be looked at with ``python -m benchmarks.kernels --show`` and continued with ``--resume``.
"""

import argparse
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

from benchmarks.kernels import lines
from benchmarks.kernels.__main__ import RESULTS, slug
from benchmarks.kernels.device import ON_GPU

from . import cache, record
from .runner import run
from .stages import Stage, stages
from .summary import summary


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--budget", type=float, default=300, metavar="SECONDS")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder for lines.jsonl, log, summary, json")
    parser.add_argument("--stages", default="", metavar="REGEX", help="only stages whose name matches")
    parser.add_argument("--resume", action="store_true", help="leave out what OUT/lines.jsonl holds")
    parser.add_argument("--list", action="store_true", help="only name the stages, with their estimated seconds")
    parser.add_argument(
        "--record", action="store_true", help="without a GPU: compile, launch into a recorder, fill cache"
    )
    chosen = parser.parse_args()
    wanted = [stage for stage in stages() if re.search(chosen.stages, stage.name)]
    if chosen.list:
        print("\n".join(f"{stage.name:18}{stage.seconds:5.0f} s, {stage.most:.0f} s at most" for stage in wanted))
        return 0
    if not (chosen.record or ON_GPU):
        parser.error("no CUDA device: --record compiles, and tries everything but the figures, without one")
    chosen.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))  # so that the stage ends with this
    if chosen.record:
        return record.record(wanted, chosen.out)
    good = measure(wanted, chosen.budget - seconds_so_far(), chosen.out, chosen.resume)
    return 0 if good else 1


def seconds_so_far() -> float:
    """Since this process began: to import torch, which may take long the first time, is part of a budget."""
    after_the_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started = int(after_the_name[19]) / os.sysconf("SC_CLK_TCK")
    return max(0.0, float(Path("/proc/uptime").read_text().split()[0]) - started)


def measure(wanted: list[Stage], budget: float, out: Path, resume: bool) -> bool:
    """Run the stages; whether none has failed."""
    path = out / "lines.jsonl"
    if not resume:
        path.unlink(missing_ok=True)
    done = {line["name"] for line in lines.read(path, "stage") if line["status"].startswith("done")}
    os.environ["DTME_LINES"] = str(path)
    print(f"carried cache: {'yes' if cache.unpack() else 'none'}", flush=True)
    environment = {**os.environ, **cache.environment(), "PYTEST_PLUGINS": "benchmarks.gpu.compiles"}
    good = run([stage for stage in wanted if stage.name not in done], budget, out / "log.txt", environment)
    text = "\n".join(summary(path))
    (out / "summary.txt").write_text(text + "\n")
    print(text, flush=True)
    keep(path, out)
    return good


def keep(path: Path, out: Path) -> None:
    """The races as ``--show`` reads them, beside the lines and among the repository's results."""
    result = lines.gather(path)
    if result["benchmarks"]:
        name = f"{slug(result['benchmarks'][0]['extra_info']['device'])}.json"
        (out / name).write_text(json.dumps(result, indent=1))
        shutil.copy(out / name, RESULTS / name)


if __name__ == "__main__":
    sys.exit(main())
