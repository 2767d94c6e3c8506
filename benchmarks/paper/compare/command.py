"""``compare``: the arms that tell whether conflict chooses better than chance, and a page of the answers.

It is ``run`` with arms of its own and ``compare-report`` behind it. With ``--minutes``, what is complete when they are
over is reported, and the same command goes on with the rest.
"""

import argparse
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from ..experiments import EXPERIMENTS
from ..results import read_runs
from ..runner.command import add_options, is_together, run_apart, to_its_end
from .findings import find
from .folders import read_settings
from .report import write

EXPERIMENT = "compare"
PRESETS = {
    "gpu10": "--data rooms --size 224 --train 2000 --val 250 --backbone vit-small --batch 16 --steps 300 "
    "--expand-at 0.5 --read 512 --seeds 5 --no-conflicts --device cuda --jobs 4 --minutes 10"
}
"""Options by name. ``gpu10`` renders its rooms where it runs, and stops after ten minutes wherever it is then."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    lines = "\n".join(f"  {name}: {options}" for name, options in PRESETS.items())
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"presets, whose options those of the command line override:\n{lines}"
    parser.add_argument("--preset", choices=PRESETS, help="one of those below")
    arms = EXPERIMENTS[EXPERIMENT].arms
    parser.add_argument("--arms", nargs="+", metavar="ARM", default=list(arms), help=f"instead of {', '.join(arms)}")
    parser.add_argument("--tune", action="store_true", help="tune every arm's learning rate first, around --lr")
    parser.add_argument("--minutes", type=float, help="after which the runs are put down, and what is done reported")
    add_options(parser)


def with_presets(argv: Sequence[str]) -> list[str]:
    """The arguments of the command, with the options of a preset that is named before them, where they override it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", choices=PRESETS)
    named = parser.parse_known_args(argv)[0].preset
    return [*(PRESETS[named].split() if named else ()), *argv]


def run(args: argparse.Namespace) -> int:
    return to_its_end(partial(_run, args))


def _run(args: argparse.Namespace) -> int:
    if is_together():
        raise ValueError("compare runs several models at once, each on one device: start it without torchrun")
    if args.minutes is not None and not args.minutes > 0:
        raise ValueError(f"--minutes must be positive, got {args.minutes}")
    with interrupted_after(args.minutes) as is_over:
        try:
            run_apart(argparse.Namespace(**vars(args), experiment=EXPERIMENT))
        except KeyboardInterrupt:
            if not is_over.is_set():
                raise
            print(f"{args.minutes:g} minutes are over; the same command goes on")
    if next(read_runs(args.out), None) is None:
        raise ValueError("no run is done yet: give it more --minutes, or fewer --steps")
    print(write(find(read_settings([args.out])), args.out / "report"))
    return 0


@contextmanager
def interrupted_after(minutes: float | None) -> Iterator[threading.Event]:
    """Interrupt the body as Ctrl-C would when the time is over; None for never. Yields what is set then."""
    is_over = threading.Event()

    def interrupt() -> None:
        is_over.set()
        os.kill(os.getpid(), signal.SIGTERM)  # which is an interrupt in `to_its_end`; Ctrl-C may be ignored

    timer = threading.Timer(60 * (minutes or 0), interrupt)
    timer.daemon = True
    if minutes is not None:
        timer.start()
    try:
        yield is_over
    finally:
        timer.cancel()
