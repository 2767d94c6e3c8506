"""``fair``: joint training and single-task runs under several conditions; the same command goes on after a kill."""

import argparse
from functools import partial
from typing import Any

from ..results import write_json
from ..runner.command import (
    Prepared,
    add_options,
    check_folder,
    is_together,
    prepared,
    run_apart,
    runs_of,
    to_its_end,
)
from ..runner.tune import Tuner, label
from .conditions import DECAY, Condition, conditions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    lines = "\n".join(f"  {c.folder:11} {c.title}: {', '.join(c.arms)}" for c in conditions(300).values())
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"folders in OUT, for --steps 300:\n{lines}"
    add_options(parser)


def run(args: argparse.Namespace) -> int:
    return to_its_end(partial(run_conditions, args))


def run_conditions(args: argparse.Namespace) -> int:
    """All conditions in turn, each as ``run`` would run it; what is done is left as it is.

    Raises:
        ValueError: something does not go with the rest, under any of the conditions; nothing was run then.
    """
    if is_together():
        raise ValueError("fair tunes learning rates, which runs on one device: start it without torchrun")
    if args.weight_decay == DECAY:
        raise ValueError(f"--weight-decay {DECAY:g} is that of one of the conditions: take another for the rest")
    plan = conditions(args.steps)
    ready: dict[str, Prepared] = {}
    for condition in plan.values():  # all of them before any is run, which takes hours
        options = options_of(args, condition)
        ready[condition.key] = prepared(options)
        if condition.rates_of is not None:
            rates_of(options, ready[condition.key], ready[condition.rates_of].tuner)
    for condition in plan.values():
        options = options_of(args, condition)
        if condition.rates_of is not None:
            tuner = ready[condition.key].tuner
            rates = rates_of(options, ready[condition.key], ready[condition.rates_of].tuner)
            if rates != tuner.known():
                write_json(tuner.path, rates)
        print(f"{condition.folder}: {condition.title}", flush=True)
        run_apart(options)
    print(f"all conditions are in {args.out}: python -m benchmarks.paper fair-report {args.out} --to DIR")
    return 0


def options_of(args: argparse.Namespace, condition: Condition) -> argparse.Namespace:
    """The options of ``run`` for a condition."""
    own: dict[str, Any] = {
        "experiment": "fair",
        "arms": list(condition.arms),
        "tune": condition.is_tuned,
        "out": args.out / condition.folder,
        "steps": condition.steps,
    }
    if condition.weight_decay is not None:
        own["weight_decay"] = condition.weight_decay
    return argparse.Namespace(**vars(args) | own)


def rates_of(options: argparse.Namespace, ready: Prepared, source: Tuner) -> dict[str, Any]:
    """The rates that a condition has, and those of ``source``, whose rates it uses, as far as they are known by now.

    Raises:
        ValueError: the condition has another rate than ``source``, or runs at another.
    """
    there, tuned, runs = ready.tuner.known(), source.known(), runs_of(ready.arms, ready.data)
    wanted = {name: tuned[name] for name in (label(*run) for run in runs) if name in tuned}
    for name, facts in wanted.items():
        if name in there and there[name]["lr"] != facts["lr"]:
            raise ValueError(
                f"{ready.tuner.path} has the rate {there[name]['lr']:g} for {name}, where {source.path} has "
                f"{facts['lr']:g}: remove {options.out}, or name another --out"
            )
    rates = there | wanted
    if len(wanted) == len(runs):
        check_folder(options, ready.base, runs, rates)
    return rates
