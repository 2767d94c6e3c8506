"""``signal``: measure the conflicts of a joint training image by image, at shares of it; a kill is gone on from."""

import argparse
import math
import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ...clients import import_torchvision
from ..data import open_data
from ..results import FORMAT, read_json, write_json
from ..runner.batches import splits
from ..runner.command import add_arguments as add_run_arguments
from ..runner.command import add_data, add_machine, add_training, check_fit, config_of, to_its_end
from ..runner.config import differences
from ..runner.measures import run_facts
from ..runner.schedule import RunError, claimed
from ..runner.tune import JOINT
from .probe import RATIOS, SHARES, Probe

_progress: "SimpleQueue[tuple[str, str, int]]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder of the measurements; what is there stays")
    parser.add_argument("--title", help="of the setting, as a report prints it")
    parser.add_argument("--seeds", type=int, default=2, help="seeds 0, 1, ...")
    add_data(parser)
    add_training(parser)
    measuring = parser.add_argument_group("measuring")
    measuring.add_argument("--shares", type=float, nargs="+", default=list(SHARES), help="of the training behind it")
    measuring.add_argument("--read", type=int, default=4096, help="images, or texts, of every measurement")
    measuring.add_argument("--sample", type=int, default=256, help="images that have a token space of their own")
    measuring.add_argument("--permuted", type=int, default=512, help="images also read with the labels of others")
    add_machine(parser)


def run(args: argparse.Namespace) -> int:
    return to_its_end(partial(measure_all, args))


def measure_all(args: argparse.Namespace) -> int:
    """All seeds in turn, some at once; what is measured is left as it is."""
    with claimed(args.out):
        _measure_all(args)
    print(f"measured in {args.out}: python -m benchmarks.paper signal-report {args.out} --to {args.out / 'report'}")
    return 0


def _measure_all(args: argparse.Namespace) -> None:
    config = replace(config_of(with_defaults(args)), arm=JOINT, conflicts=False)
    check(args, config)
    data = open_data(config.data, config.options)  # makes what is cached
    check_fit(config, data)
    if len(splits(data, config).train) < config.read:
        raise ValueError(f"--read {config.read} is more than the {len(data.train)} training items")
    settings = {name: value for name, value in config.settings.items() if name != "expand_at"}
    settings |= {"lr": config.lr, "sample": args.sample, "permuted": args.permuted, "ratios": list(RATIOS)}
    path = args.out / "experiment.json"
    was = read_json(path) if path.exists() else {"settings": settings, "seeds": [], "shares": []}
    if other := differences(was["settings"], settings):
        raise ValueError(f"{args.out} holds measurements with another {other}: name another --out")
    content = {
        "format": FORMAT,
        "experiment": "signal",
        "title": args.title or f"{args.backbone}, {args.data}",
        "data": config.data,
        "tasks": list(data.tasks),
        "settings": settings,
        "seeds": sorted({*was["seeds"], *range(args.seeds)}),
        "shares": sorted({*was["shares"], *args.shares}),
        "facts": run_facts(),
    }
    write_json(path, content)
    probes = [
        Probe(replace(config, seed=seed), args.out, args.shares, args.sample, args.permuted)
        for seed in range(args.seeds)
    ]
    try:
        run_probes(probes, args.jobs)
    finally:
        seconds = {f"seed-{p.config.seed}": read_json(p.times) for p in probes if p.times.exists()}
        write_json(path, content | {"seconds": was.get("seconds", {}) | seconds})


def with_defaults(args: argparse.Namespace) -> argparse.Namespace:
    """With the options of ``run`` that mean nothing here."""
    parser = argparse.ArgumentParser()
    add_run_arguments(parser)
    defaults = parser.parse_args(["pilot", "--out", str(args.out)])
    return argparse.Namespace(**{**vars(defaults), **vars(args)})


def check(args: argparse.Namespace, config: Any) -> None:
    """Raises: ValueError: an option is out of its range."""
    if args.sample < 1 or args.sample % config.batch:
        raise ValueError(f"--sample must be a multiple of --batch {config.batch}, got {args.sample}")
    if config.read % args.sample:
        raise ValueError(f"--read must be a multiple of --sample {args.sample}, got {config.read}")
    if not 0 <= args.permuted <= config.read:
        raise ValueError(f"--permuted must be at most --read {config.read}, got {args.permuted}")
    # files are named by whole percents: two shares of one percent would pass for each other
    if bad := [share for share in args.shares if not (0 <= share <= 1 and math.isclose(round(share, 2), share))]:
        raise ValueError(f"--shares must be in [0, 1] and whole percents, such as 0.25, got {bad[0]}")
    args.shares = sorted({round(share, 2) for share in args.shares})


# --- several at once --------------------------------------------------------------------------------------------------


def run_probes(probes: Sequence[Probe], jobs: int) -> None:
    """Each in one of ``jobs`` processes.

    Raises:
        RunError: a process was killed.
        Whatever a probe raises, when the others are through.
    """
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    total = sum(not probe.is_measured(share) for probe in probes for share in probe.shares)
    if not total:
        return
    with (
        tqdm(total=total, desc="signal", unit="measurement") as bar,
        ProcessPoolExecutor(min(jobs, len(probes)), context, initializer=_begin, initargs=(queue,)) as pool,
    ):
        futures = [pool.submit(_one, probe) for probe in probes]
        while not all(future.done() for future in futures):
            _show(queue, bar, futures)
        _show(queue, bar, futures)
    wait(futures)
    try:
        for future in futures:
            future.result()
    except BrokenProcessPool as error:
        raise RunError(
            "a process that measured was killed, as for want of memory: what was saved stays, start again to go on"
        ) from error


def _show(queue: "SimpleQueue[tuple[str, str, int]]", bar: tqdm, futures: Sequence[Future[None]]) -> None:
    time.sleep(0.5)
    while not queue.empty():
        name, what, number = queue.get()
        if what == "measured":
            bar.update()
        bar.set_postfix_str(f"{name}: {what} {number}")


def _begin(queue: "SimpleQueue[tuple[str, str, int]]") -> None:
    global _progress
    _progress = queue
    import_torchvision()  # before a saved model is unpickled, whose library may import it


def _one(probe: Probe) -> None:
    last = 0.0

    def tell(name: str, what: str, number: int) -> None:
        nonlocal last
        parent = multiprocessing.parent_process()
        if parent is not None and not parent.is_alive():  # it was killed, and a pool waits for its next order for ever
            os._exit(1)
        if what == "measured" or time.monotonic() - last > 1:
            last = time.monotonic()
            _progress.put((name, what, number))

    probe.run(tell)
