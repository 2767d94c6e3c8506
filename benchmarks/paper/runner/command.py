"""``run``: an experiment, or some arms of it, over seeds; the same command goes on after a kill."""

import argparse
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..data import DATA_SETS, Data, Options, open_data
from ..decoders import DECODERS
from ..experiments import ARMS, EXPERIMENTS
from ..models import PRETRAINED_LR, UNTRAINED, UNTRAINED_LR, build, default_lr
from ..results import FORMAT, read_json, read_runs, write_json
from .batches import InOrder, splits
from .config import Config, differences
from .one import RunOfArm, Workplace
from .schedule import RunError, Schedule, claimed, in_turn, is_done
from .together import joined
from .tune import FIRST_SEED, HELD_OUT, JOINT, Tuner, label
from .worker import what_happened


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = "\n".join(f"  {name:12} {experiment.title}" for name, experiment in EXPERIMENTS.items())
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"experiments:\n{names}\n\narms: {', '.join(ARMS)}"
    parser.add_argument("experiment", choices=EXPERIMENTS, metavar="EXPERIMENT", help="one of those below")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="some arms instead of the experiment's own")
    parser.add_argument("--tune", action="store_true", help="tune every arm's learning rate first, around --lr")
    add_options(parser)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What is trained, where and how: the options that do not say which arms, nor whether their rates are tuned."""
    defaults = Config("", 0)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results; what is there is gone on with")
    parser.add_argument("--seeds", type=int, default=1, help="seeds 0, 1, ... that every arm is run with")
    add_data(parser)
    training = add_training(parser)
    training.add_argument("--tune-seeds", type=int, default=1, help="seeds that every rate is tried with")
    training.add_argument("--expand-at", type=float, default=defaults.expand_at, help="share of the steps before it")
    training.add_argument("--read", type=int, default=defaults.read, help="items that an analysis reads")
    training.add_argument("--num-tokens", type=int, default=defaults.num_tokens, help="task tokens per task and block")
    training.add_argument("--modulation", type=float, default=defaults.modulation, help="share of the blocks")
    training.add_argument("--expansion", type=float, default=defaults.expansion, help="share of the blocks")
    training.add_argument("--no-conflicts", action="store_true", help="leave out the analyses that nothing depends on")
    machine = add_machine(parser)
    machine.add_argument("--loader-workers", type=int, default=0, help="processes that read data, for every run")
    machine.add_argument("--save-every", type=float, default=60.0, help="seconds between two savings of a run")
    machine.add_argument("--tensorboard", action="store_true", help="write OUT/tensorboard")


def add_data(parser: argparse.ArgumentParser) -> None:
    """Options of what is trained on what."""
    defaults = Config("", 0)
    data = parser.add_argument_group("data and model")
    data.add_argument("--data", choices=DATA_SETS, default=defaults.data)
    data.add_argument("--root", type=Path, help="where the data set's files are")
    data.add_argument("--tasks", nargs="+", help="some of its tasks")
    data.add_argument("--size", type=int, nargs="+", metavar="PIXELS", help="of images: one side, or height and width")
    data.add_argument("--train", type=int, help="at most so many training items")
    data.add_argument("--val", type=int, help="at most so many items to validate on")
    data.add_argument("--data-seed", type=int, default=0, help="of data that is drawn")
    data.add_argument("--tokenizer", help="of texts: a folder or name; by default the backbone's own")
    data.add_argument(
        "--backbone",
        default=defaults.backbone,
        help="small, narrow, vit-tiny, -small, -base, -large, or any transformers name or folder; untrained:NAME "
        "for its architecture with weights that are drawn",
    )
    data.add_argument(
        "--decoder", choices=DECODERS, help="heads of dense tasks: pixels for rooms, else conv, which is the paper's"
    )


def add_training(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Options of the joint training."""
    defaults = Config("", 0)
    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=int, default=defaults.steps)
    training.add_argument("--batch", type=int, default=defaults.batch)
    training.add_argument(
        "--lr", type=float, help=f"default: {UNTRAINED_LR:g}, or {PRETRAINED_LR:g} for a pretrained backbone"
    )
    training.add_argument("--weight-decay", type=float, default=defaults.weight_decay)
    return training


def add_machine(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Options of what it runs on."""
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    machine.add_argument("--jobs", type=int, default=2, help="runs at once; under torchrun every run has all processes")
    machine.add_argument(
        "--threads", type=int, default=1, help="of every run on a CPU; another number, other last digits"
    )
    machine.add_argument("--cache", type=Path, default=Options().cache, help="for what can be made again")
    return machine


def run(args: argparse.Namespace) -> int:
    return to_its_end(partial(_run, args))


def _run(args: argparse.Namespace) -> int:
    if is_together():
        with joined(args.device) as device:
            return run_together(args, device)
    return run_apart(args)


def is_together() -> bool:
    """Whether torchrun started several processes for every run."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def to_its_end(work: Callable[[], int]) -> int:
    """The status of the process that does ``work``: what goes wrong with it is one line, and a kill is no error.

    Raises:
        SystemExit: with that line.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return work()
    except RunError as error:
        raise SystemExit(str(error)) from error
    except ValueError as error:  # of a library, it may be of many lines
        raise SystemExit(" ".join(str(error).split())) from error
    except OSError as error:
        raise SystemExit(what_happened(error)) from error
    except KeyboardInterrupt:
        return 130


def run_apart(args: argparse.Namespace) -> int:
    """Some runs at once, each in a process."""
    with claimed(args.out):
        ready = prepared(args)
        base, arms, data = ready.base, ready.arms, ready.data
        tuned = ready.tuner.known()
        write_experiment(args, base, arms, data, tuned)  # before anything is trained whose settings it tells
        if args.tune:
            tuned = ready.tuner.tune(runs_of(arms, data))
            write_experiment(args, base, arms, data, tuned)
        configs = configs_of(args, base, arms, data, tuned)
        ordered = in_turn(configs, args.jobs)
        Schedule(ordered, args.out, jobs=args.jobs, place=place_of(args), title=args.experiment).run()
    print(f"{len(configs)} runs are in {args.out}: python -m benchmarks.paper report {args.out}")
    return 0


@dataclass(frozen=True)
class Prepared:
    """What a command means, before anything of it is run."""

    base: Config
    """What all runs have in common."""
    arms: list[str]
    data: Data
    tuner: Tuner


def prepared(args: argparse.Namespace) -> Prepared:
    """What ``run_apart`` starts from, with all that can be checked before anything is written or trained.

    Raises:
        ValueError: an option, the data, the backbone or what is in ``args.out`` does not go with the rest.
    """
    base, arms = config_of(args), arms_of(args)
    data = open_data(base.data, base.options)
    tuner = Tuner(base, data.tasks, args.out, args.tune_seeds, args.jobs, place_of(args))
    check_folder(args, base, runs_of(arms, data), tuner.known())
    check_fit(base, data)
    if args.tune:
        check_fit(replace(base, held_out=HELD_OUT), data)
    return Prepared(base, arms, data, tuner)


def run_together(args: argparse.Namespace, device: str) -> int:
    """One run after the other, each on all processes that torchrun started; each takes its part of every batch."""
    base, arms = config_of(args), arms_of(args)
    if args.tune:
        raise ValueError("--tune runs on one device: tune first, without torchrun; its rates are used here")
    rank = dist.get_rank()
    if rank == 0:
        data = open_data(base.data, base.options)  # makes what is cached
    dist.barrier()
    data = open_data(base.data, base.options)
    tuned = Tuner(base, data.tasks, args.out, 1, 1, {}).known()
    check_folder(args, base, runs_of(arms, data), tuned)
    dist.barrier()
    if rank == 0:
        write_experiment(args, base, arms, data, tuned)
    place = Workplace(args.out, **{k: v for k, v in place_of(args).items() if k != "out"})
    for config in configs_of(args, base, arms, data, tuned):
        if not is_done(config, args.out):
            if rank == 0:
                print(config.name, flush=True)
            RunOfArm(replace(config, device=device), ARMS[config.arm], place).run()
        dist.barrier()
    return 0


# --- what the options mean --------------------------------------------------------------------------------------------


def check_options(args: argparse.Namespace) -> None:
    """Raises: ValueError: an option is out of its range."""
    least = dict.fromkeys(("seeds", "steps", "batch", "read", "jobs", "threads", "tune_seeds", "num_tokens"), 1)
    least |= dict.fromkeys(("weight_decay", "save_every", "loader_workers"), 0)
    for name, limit in least.items():
        if not limit <= getattr(args, name) < inf:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {limit}, got {getattr(args, name)}")
    if args.seeds > FIRST_SEED:
        raise ValueError(f"--seeds must be at most {FIRST_SEED}, where those of tuning begin, got {args.seeds}")
    if not 0 <= args.expand_at < 1:
        raise ValueError(f"--expand-at must be in [0, 1), got {args.expand_at}")
    for name in ("modulation", "expansion"):
        if not 0 <= getattr(args, name) <= 1:
            raise ValueError(f"--{name} must be in [0, 1], got {getattr(args, name)}")
    if args.lr is not None and not 0 < args.lr < inf:
        raise ValueError(f"--lr must be positive, got {args.lr}")
    if args.size is not None and len(args.size) > 2:
        raise ValueError(f"--size takes one side, or height and width, got {args.size}")


def config_of(args: argparse.Namespace) -> Config:
    """What all runs have in common."""
    check_options(args)
    lr = args.lr if args.lr is not None else default_lr(args.backbone)
    is_text = args.data == "wordnet"
    own = args.backbone.removeprefix(UNTRAINED) if is_text and args.backbone != "small" else None
    options = Options(
        root=args.root,
        tasks=None if args.tasks is None else tuple(args.tasks),
        size=None if args.size is None else (args.size[0], args.size[-1]),
        seed=args.data_seed,
        train=args.train,
        val=args.val,
        tokenizer=args.tokenizer or own,
        cache=args.cache,
    )
    decoder = args.decoder or ("pixels" if args.data == "rooms" else "conv")
    same = (
        "data",
        "backbone",
        "steps",
        "batch",
        "weight_decay",
        "expand_at",
        "read",
        "num_tokens",
        "threads",
        "device",
    )
    return Config(
        "",
        0,
        options=options,
        decoder=decoder,
        lr=lr,
        trunk_lr=lr,
        modulation=args.modulation,
        expansion=args.expansion,
        conflicts=not args.no_conflicts,
        **{name: getattr(args, name) for name in same},
    )


def arms_of(args: argparse.Namespace) -> list[str]:
    arms = list(args.arms or EXPERIMENTS[args.experiment].arms)
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise ValueError(f"--arms names the unknown arm {unknown[0]!r}; arms are {', '.join(ARMS)}")
    return list(dict.fromkeys(arms))


def place_of(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in ("save_every", "loader_workers", "tensorboard")}


def runs_of(arms: Sequence[str], data: Data) -> list[tuple[str, str | None]]:
    """Every arm once, or once per task where each task is trained alone."""
    return [(arm, task) for arm in arms for task in (data.names if ARMS[arm].is_single else [None])]


def configs_of(
    args: argparse.Namespace, base: Config, arms: Sequence[str], data: Data, tuned: dict[str, Any]
) -> list[Config]:
    return [config_of_run(base, *run, seed, tuned) for seed in range(args.seeds) for run in runs_of(arms, data)]


def config_of_run(base: Config, arm: str, task: str | None, seed: int, tuned: dict[str, Any]) -> Config:
    """At the rates that were tuned, if any were; the joint part at that of the joint training."""
    joint = tuned.get(JOINT, {}).get("lr", base.lr)
    lr = tuned.get(label(arm, task), {}).get("lr", joint)
    return replace(base, arm=arm, task=task, seed=seed, lr=lr, trunk_lr=joint if task is None else lr)


def check_folder(
    args: argparse.Namespace, base: Config, runs: Sequence[tuple[str, str | None]], tuned: dict[str, Any]
) -> None:
    """Before anything is written: a folder holds one experiment's settings, and its arms are all tuned, or none is.

    Raises:
        ValueError: what is there was run with other settings or rates than it would be now, those of runs that this
            command leaves alone included: arms are compared with them.
    """
    path = args.out / "experiment.json"
    if path.exists():
        was = read_json(path)
        now = common_settings(base) | {"lr": base.lr}
        if other := differences(was.get("settings", {}) | {"lr": was.get("lr")}, now):
            raise ValueError(f"{args.out} holds runs with another {other}: name another --out")
    there = [(run["arm"], run["task"], run["seed"]) for run in read_runs(args.out)]
    if args.tune and (other := [label(arm, task) for arm, task, _ in there if label(arm, task) not in tuned]):
        raise ValueError(f"{args.out} holds runs of {other[0]} at a rate that was not tuned: name another --out")
    if tuned and not args.tune and (other := [label(*run) for run in runs if label(*run) not in tuned]):
        raise ValueError(f"the rates in {args.out} are tuned, but not that of {other[0]}: add --tune")
    for arm, task, seed in there:
        is_done(config_of_run(base, arm, task, seed, tuned), args.out)


def check_fit(base: Config, data: Data) -> None:
    """The backbone runs on two items of the data, here once rather than in every run.

    Raises:
        ValueError: it does not, or the batch is too large for the data, or the device is not there.
    """
    data = splits(data, base)
    if base.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {base.device}: torch sees no such device")
    model = build(data, base.backbone, base.seed).eval()
    indices = range(min(2, len(data.val)))
    try:
        with torch.no_grad():
            for x, labels in InOrder(data.val, indices, len(indices), "cpu"):
                for name, prediction in model(x).items():
                    data.tasks[name].loss(prediction, labels[name])
    except (RuntimeError, TypeError, IndexError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"--backbone {base.backbone} does not run on --data {base.data}: {reason}") from error


def common_settings(base: Config) -> dict[str, Any]:
    """The joint training's rate is not among them: it may be tuned later on."""
    return {name: value for name, value in base.settings.items() if name not in ("trunk_lr", "held_out")}


def write_experiment(
    args: argparse.Namespace, base: Config, arms: Sequence[str], data: Data, tuned: dict[str, Any]
) -> None:
    """``experiment.json``; arms and seeds that were run before stay in it."""
    path = args.out / "experiment.json"
    was = read_json(path) if path.exists() else {"arms": {}, "seeds": []}
    content = {
        "format": FORMAT,
        "experiment": args.experiment,
        "arms": was["arms"] | {arm: ARMS[arm].title for arm in arms},
        "seeds": sorted({*was["seeds"], *range(args.seeds)}),
        "settings": common_settings(base),
        "lr": base.lr,
        "tuned": tuned,
        "data": base.data,
        "tasks": {
            name: {"metric": task.metric, "unit": task.unit, "lower_is_better": task.lower_is_better}
            for name, task in data.tasks.items()
        },
    }
    write_json(path, content)
