"""Without a GPU: run all stages under the recording driver, to try them, to fill a cache, and to see what would fit."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.kernels import lines

from . import cache
from .runner import run
from .stages import Stage

BUDGET = 300
PLUGINS = "benchmarks.gpu.compiles,benchmarks.gpu.recording"
WORKERS = 14  # of the machine that is planned for


class Compiled(NamedTuple):
    """What Triton did in a stage: kernels, of which so many came from the cache, and seconds of one core."""

    kernels: int
    hits: int
    seconds: float


def record(wanted: list[Stage], out: Path) -> int:
    """Twice: the first pass fills the cache, and the second finds everything in it. Then pack it and show the plan."""
    shutil.rmtree(cache.FOLDER, ignore_errors=True)
    passes, good = [], True
    for name in ("empty", "carried"):
        path = out / f"recorded-{name}.jsonl"
        path.unlink(missing_ok=True)
        os.environ["DTME_LINES"] = str(path)
        environment = {**os.environ, **cache.environment(), "PYTEST_PLUGINS": PLUGINS, "DTME_BENCH_DEVICE": "recording"}
        print(f"\nwith a cache that is {name}:", flush=True)
        patient = [stage._replace(most=3600.0) for stage in wanted if "compiled" not in stage.name]  # by torch.compile
        good = run(patient, float("inf"), out / f"recorded-{name}.txt", environment) and good
        passes.append(path)
    size = cache.pack()
    text = "\n".join([*fitting(wanted, *passes), f"\n{cache.ARCHIVE}: {size / 1e6:.1f} MB"])
    (out / "fits.txt").write_text(text + "\n")
    print(text)
    return 0 if good else 1


def compiled(path: Path, stage: str) -> Compiled:
    found = [line for line in lines.read(path, "compile") if line["stage"] == stage]
    return Compiled(len(found), sum(line["hit"] for line in found), sum(line["cpu"] for line in found))


def fitting(wanted: list[Stage], empty: Path, carried: Path) -> Iterator[str]:
    """Which stages fit the budget: a stage takes its estimate and what compiling took here, on one core, or on many."""
    columns = f"{'sum':>6}{'fits':>6}   "
    yield f"\n{'':18}{'':9}{'with an empty cache':>30}{'with a carried one':>27}"
    yield f"{'':18}{'estimate':>9}{'kernels':>9}{'compile':>9}{columns}{'hits':>5}{'load':>7}{columns}".rstrip()
    left = [float(BUDGET), float(BUDGET)]
    for stage in wanted:
        cells = []
        for i, path in enumerate((empty, carried)):
            found = compiled(path, stage.name)
            seconds = found.seconds / (WORKERS if stage.parallel else 1)
            whole = stage.seconds + seconds
            fits = whole <= left[i]
            left[i] -= whole if fits else 0
            cells.append(f"{found.hits if i else found.kernels:>{5 if i else 9}}{seconds:>{7 if i else 9}.1f}")
            cells.append(f"{BUDGET - left[i]:>6.0f}{'yes' if fits else 'no':>6}")
        yield f"{stage.name:18}{stage.seconds:>9.0f}{cells[0]}{cells[1]}   {cells[2]}{cells[3]}"
