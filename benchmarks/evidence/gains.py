"""Do gains and rates say in which block tasks gain most from affine maps of their own?

Every seed is a trained model. One block at a time is given affine maps, which start as the identity and are all that is
trained for a few steps, in evaluation mode: first one map for each task, then one that all tasks share. Both runs have
the same optimizer, batches and steps. What counts is the fall of the sum of the losses over all analysed scenes.
Adam's steps have the same length for every map, whatever its gradient's, which is what a gain supposes; those of SGD
are longer for a shared map, whose gradient is the sum of the tasks'.
"""

import argparse
import itertools
import statistics
import time
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

import dtme

from ..paper.data.rooms import TASKS
from ..ranks import spearman
from .common import Ordered, Results, Row, check_positive, losses, scenes, settings_of, table, trained
from .common import add_arguments as add_common

PREDICTORS = ("gain", "range rate", "null rate", "position")
"""Of a block; its position, the later the higher, is what needs no analysis at all."""
EFFECTS = ("own - shared", "own")
OPTIMIZERS = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
RESAMPLES = 10_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sizes = {"scenes": 512, "size": 32, "patch": 8, "depth": 8, "width": 64, "steps": 200, "batch": 8}
    add_common(parser, seeds=10, out="benchmarks/results/gains.json", **sizes)
    parser.add_argument("--map-steps", type=int, default=50, help="training steps of a block's maps")
    parser.add_argument("--map-batch", type=int, default=16, help="images per such step")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adam")
    parser.add_argument("--lr", nargs="+", type=float, default=[1e-3], help="of the maps, each tried by itself")


def run(args: argparse.Namespace) -> None:
    check_positive(args, *("seeds", "scenes", "size", "patch", "depth", "width", "steps", "batch"))
    check_positive(args, "map_steps", "map_batch")
    results = Results(args.out, settings_of(args), args.fresh)
    missing = results.missing(args.seeds)
    data = scenes(args) if missing else None
    for seed in missing:
        started = time.perf_counter()
        row = one_seed(args, data, seed)
        row["seconds"] = time.perf_counter() - started
        results.add(row, summary)
        print(f"seed {seed}: {row['seconds']:.0f} s", flush=True)
    print(f"\n{show(summary(results.rows))}\n\nwrote {args.out}")


def one_seed(args: argparse.Namespace, data: Any, seed: int) -> Row:
    model = trained(args, data, seed)
    generator = torch.Generator().manual_seed(seed)
    loader = Ordered(data, torch.randperm(args.scenes, generator=generator), args.batch)
    report = dtme.analyze(model, loader, losses(), progress=False)
    whole = Ordered(data, torch.arange(args.scenes), 128)
    before = total_loss(model, whole)
    row: Row = {
        "seed": seed,
        "loss": before,
        "gain": report.gains.tolist(),
        "range rate": report.range_rates.tolist(),
        "null rate": report.null_rates.tolist(),
        "position": [*range(len(report.blocks))],
        "falls": {run_name(args, lr): {"own": [], "shared": []} for lr in args.lr},
    }
    for block, lr in tqdm([*itertools.product(report.blocks, args.lr)], desc=f"seed {seed}", unit="block"):
        for kind, falls in row["falls"][run_name(args, lr)].items():
            dtme.expand(model, plan_of(report, block, kind), freeze_backbone=True)
            try:
                train_maps(args, model, data, lr, seed)
                falls.append(before - total_loss(model, whole))
            finally:
                dtme.collapse(model)
    return row


def run_name(args: argparse.Namespace, lr: float) -> str:
    return f"{args.optimizer}, lr {lr:g}"


def plan_of(report: dtme.ConflictReport, block: str, kind: str) -> dtme.ExpansionPlan:
    """A map in one block: one for each task, or one that a group of all tasks shares."""
    groups = {"all": report.tasks} if kind == "shared" else {}
    return dtme.ExpansionPlan(report.tasks, 1, {block: report.tasks}, {}, report.num_features, groups)


def train_maps(args: argparse.Namespace, model: dtme.MultiTaskModel, data: Any, lr: float, seed: int) -> None:
    """Train nothing but what ``expand`` added. The batches depend on the seed alone."""
    maps = [parameter for name, parameter in model.named_parameters() if ".dtme." in name]
    stepper = OPTIMIZERS[args.optimizer](maps, lr=lr)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(args.map_steps):
        images, labels = data.take(torch.randperm(args.scenes, generator=generator)[: args.map_batch])
        loss = sum_of_losses(model(images), labels)
        for parameter, gradient in zip(maps, torch.autograd.grad(loss, maps), strict=True):
            parameter.grad = gradient
        stepper.step()


def sum_of_losses(predictions: dict[str, Tensor], labels: dict[str, Tensor]) -> Tensor:
    return torch.stack([TASKS[task].loss(prediction, labels[task]) for task, prediction in predictions.items()]).sum()


@torch.no_grad()
def total_loss(model: dtme.MultiTaskModel, whole: Ordered) -> float:
    """The mean over batches, weighted by their images."""
    total = count = 0.0
    for images, labels in whole:
        total += len(images) * sum_of_losses(model(images), labels).item()
        count += len(images)
    return total / count


# --- what comes of it -------------------------------------------------------------------------------------------------


def interval(values: list[float]) -> list[float]:
    """Of the mean at 95 %: means of resamples of the models."""
    x = torch.tensor(values, dtype=torch.float64)
    drawn = torch.randint(len(x), (RESAMPLES, len(x)), generator=torch.Generator().manual_seed(0))
    return x[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()


def effect_of(row: Row, name: str, effect: str) -> list[float]:
    falls = row["falls"][name]
    if effect == "own":
        return falls["own"]
    return [own - shared for own, shared in zip(falls["own"], falls["shared"], strict=True)]


def summary(rows: list[Row]) -> dict[str, Any]:
    """{optimizer and rate: {effect: {"fall", "over blocks", predictor: its rank correlations}}}."""
    return {
        name: {effect: correlations(rows, [effect_of(row, name, effect) for row in rows]) for effect in EFFECTS}
        for name in rows[0]["falls"]
    }


def correlations(rows: list[Row], effects: list[list[float]]) -> dict[str, Any]:
    """``effects`` are falls of the losses, by model and block."""
    shares = [[fall / row["loss"] for fall in some] for row, some in zip(rows, effects, strict=True)]
    found: dict[str, Any] = {
        "fall": statistics.fmean(itertools.chain(*shares)),
        "over blocks": statistics.fmean(statistics.pstdev(some) for some in shares),
    }
    for predictor in PREDICTORS:
        each = [spearman(row[predictor], some) for row, some in zip(rows, effects, strict=True)]
        found[predictor] = {"mean": statistics.fmean(each), "interval": interval(each), "models": each}
    return found


def show(found: dict[str, Any]) -> str:
    lines = [["fall of the losses", "mean", "± blocks", *PREDICTORS]]
    for name, effects in found.items():
        for effect, row in effects.items():
            cells = [f"{row['fall']:.2%}", f"{row['over blocks']:.2%}"]
            for predictor in PREDICTORS:
                low, high = row[predictor]["interval"]
                cells.append(f"{row[predictor]['mean']:+.2f} [{low:+.2f}, {high:+.2f}]")
            lines.append([f"{name}, {effect}", *cells])
    title = "Rank correlations over the blocks of a model, mean over models and its 95 % interval"
    return f"{title}\n\n{table(lines)}"
