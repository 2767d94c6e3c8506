"""``smoke``: every data set, arm, experiment and study for a few steps, their reports, and a run that is killed."""

import argparse
import gzip
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from .data import DATA_SETS, trees
from .results import Run, read_runs

SIZE = {"rooms": (32, 32), "fashion": (40, 40), **dict.fromkeys(("nyud", "pascal", "taskonomy"), trees.SIZE)}
"""Height and width in pixels; texts have none."""
ARMS = ("single", "joint", "tm+te")
"""Of the data sets that are tried beside the rooms, which are tried with all arms."""
STEPS = ["--steps", "4", "--batch", "4", "--read", "8", "--train", "16", "--val", "8", "--jobs", "2"]


CHECKPOINTS = ("trunk.lr-0.001.seed-0.step-15.part.pt", "tm+te.seed-0.pt")
"""In the joint part of a run, and in its own."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = "OUT/latest is made anew every time, as runs that are there would not be run again"
    parser.add_argument("--out", type=Path, default=Path("out/paper/smoke"), help=what)
    parser.add_argument("--only", nargs="+", choices=DATA_SETS, default=list(DATA_SETS), help="some data sets")


def run(args: argparse.Namespace) -> int:
    from .__main__ import main

    started, seconds = time.perf_counter(), {}
    latest = args.out / "latest"
    if latest.exists():
        shutil.rmtree(latest)
    for name in args.only:
        since = time.perf_counter()
        root = small_files(name, latest / "data")
        out = latest / name
        arms = ["everything"] if name == "rooms" else ["methods", "--arms", *ARMS]
        options = [] if root is None else ["--root", str(root)]
        options += ["--size", *map(str, SIZE[name])] if name in SIZE else []
        command = [
            "run",
            *arms,
            "--data",
            name,
            *options,
            *STEPS,
            "--out",
            str(out),
            "--cache",
            str(args.out / "cache"),
        ]
        if main(command) or main(["report", str(out)]):
            return 1
        seconds[name] = time.perf_counter() - since
    outs = [str(latest / name) for name in args.only]
    if main(["compare-report", *outs, "--to", str(latest / "compare-report")]):
        return 1
    if "rooms" in args.only:
        since = time.perf_counter()
        if any(main(command) for command in evidence(latest, args.out / "cache")):
            return 1
        seconds["studies"] = time.perf_counter() - since
    since = time.perf_counter()
    whole, killed = killed_and_resumed(latest / "killed", args.out / "cache")
    if figures(whole) != figures(killed):
        raise SystemExit("a run that was killed and went on differs from one in one piece")
    seconds["kill"] = time.perf_counter() - since
    parts = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
    print(f"a run that was killed went on to the same bits: weights {whole['weights']}, metrics {whole['metrics']}")
    print(f"all of it in {time.perf_counter() - started:.0f} s ({parts})")
    return 0


def evidence(out: Path, cache: Path) -> list[list[str]]:
    """The commands of the three studies, on rooms, and of their reports; the last one on a pretrained backbone."""
    same = ["--size", "32", "--steps", "4", "--batch", "4", "--train", "40", "--cache", str(cache)]
    studied = [*same, "--val", "8"]
    signal, fair, pretrained = (str(out / name) for name in ("signal", "fair", "pretrained"))
    sizes = ["--read", "32", "--sample", "16", "--permuted", "8"]
    return [
        ["signal", "--out", signal, "--seeds", "2", *studied, *sizes],
        ["signal-report", signal, "--to", str(out / "signal-report")],
        ["fair", "--out", fair, "--tasks", "semseg", "depth", "--no-conflicts", *studied],
        ["fair-report", fair, "--to", str(out / "fair-report")],
        ["pretrain", "--out", pretrained, *same],
        ["compare", "--out", str(out / "compare"), "--backbone", pretrained, "--seeds", "2", "--read", "8", *studied],
    ]


def figures(content: Run) -> Run:
    """All of a run that does not hang on the clock or on the machine."""
    names = ("metrics", "losses", "conflicts", "structure", "combination", "weights", "parameters")
    return {name: content[name] for name in names}


# --- small data sets --------------------------------------------------------------------------------------------------


def small_files(name: str, folder: Path) -> Path | None:
    """A small data set in the layout of the real one; None for one that needs no files."""
    if name == "rooms":
        return None
    root = folder / name
    if not root.exists():
        writers: dict[str, Callable[[Path], None]] = {"fashion": write_fashion, "wordnet": write_wordnet}
        writers.get(name, lambda path: trees.write_tree(name, path, 24, 0))(root)
    return root


def write_fashion(root: Path, count: int = 64) -> None:
    """Files like those of Fashion-MNIST: noise that is brighter in the row that the class names."""
    root.mkdir(parents=True)
    draws = np.random.default_rng(0)
    for part in ("train", "t10k"):
        labels = draws.integers(0, 10, count).astype(np.uint8)
        images = draws.integers(0, 100, (count, 28, 28)).astype(np.uint8)
        images[np.arange(count), 2 * labels + 4] += 150
        for kind, array, magic in (("images-idx3", images, 0x803), ("labels-idx1", labels, 0x801)):
            header = np.array([magic, *array.shape], ">u4").tobytes()
            (root / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes(), mtime=0))


def write_wordnet(root: Path, count: int = 200) -> None:
    """Glosses of drawn words whose first one tells the part of speech."""
    root.mkdir(parents=True)
    draws = random.Random(0)
    lines = []
    for number in range(count):
        part, words = draws.choice("nvar"), [draws.choice("abcdefgh") * draws.randint(2, 5) for _ in range(6)]
        depth = draws.randint(0, 12) if part in "nv" else -1
        lines.append(f"{part}{part} {' '.join(words)} {number}\t{part}\t{draws.randint(0, 44):02d}\t{depth}\n")
    (root / "wordnet.tsv").write_text("".join(lines))


# --- a kill -----------------------------------------------------------------------------------------------------------


def killed_and_resumed(out: Path, cache: Path, checkpoints: Sequence[str] = CHECKPOINTS) -> tuple[Run, Run]:
    """TM + TE on rooms in one piece; and killed as soon as each of ``checkpoints`` is there, then gone on with."""
    options = ["--size", "32", "--steps", "60", "--batch", "4", "--read", "8", "--train", "24", "--val", "8"]
    command = ["run", "pilot", "--arms", "tm+te", *options, "--save-every", "0", "--jobs", "1", "--cache", str(cache)]
    killed = out / "killed"
    for checkpoint in checkpoints:
        process = _start([*command, "--out", str(killed)])
        path, until = killed / "work" / checkpoint, time.monotonic() + 300
        while not path.exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        if process.poll() is not None or not path.exists():
            raise RuntimeError(f"the run that was to be killed at {path} ended before:\n{process.communicate()[0]}")
        process.kill()  # its worker sees that nobody listens any more, saves and ends
        process.communicate()
    processes = [_start([*command, "--out", str(folder)]) for folder in (out / "whole", killed)]
    for process in processes:
        said, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(said)
    whole, resumed = (next(read_runs(folder)) for folder in (out / "whole", killed))
    return whole, resumed


def _start(arguments: Sequence[str]) -> "subprocess.Popen[str]":
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.paper", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
