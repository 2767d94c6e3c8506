"""The method from end to end on rendered rooms: train jointly, analyze, expand, train on, compare, save, reload.

The comparison is the honest one: from one checkpoint, the same budget of further steps on the same batches, once
expanded and once not. Whatever comes out is printed.
"""

import argparse
import copy
import itertools
import math
import time
from pathlib import Path

import torch
from torch import Tensor

import dtme
from dtme.comparison.delta import delta_m
from dtme.tables import aligned, ruled

from ..clients import import_torchvision
from ..rooms.pictures import colorize, decode, sheet
from .data import Data, Options, open_data
from .data.images import colours
from .data.rooms import DEMO_TASKS, SIZE
from .models import PRETRAINED_LR, UNTRAINED_LR, VIT, default_lr, is_pretrained, load_backbone, tokens_of, with_heads
from .tasks import losses_of, lower_is_better
from .training import Batches, evaluate, train


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--steps", type=int, default=300, help="joint steps, and as many again with and without expansion"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--backbone",
        default="small",
        help=f"a name or folder of a transformers model; not pretrained: small (the default), {', '.join(VIT)}",
    )
    parser.add_argument(
        "--size", type=int, help=f"pixels along an image's side (default: {SIZE[0]}, or a pretrained backbone's own)"
    )
    parser.add_argument(
        "--lr", type=float, help=f"default: {UNTRAINED_LR:g}, or {PRETRAINED_LR:g} for a pretrained backbone"
    )
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--scenes", type=int, default=2000, help="training scenes; an eighth as many are held out")
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--cache", type=Path, default=Options.cache, help="where rendered scenes are kept")


def run(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    try:
        check(args)
        data, model = prepare(args, torch.device(args.device))
    except ValueError as error:
        raise SystemExit(str(error)) from error
    score(args, data, model)
    print(f"done in {time.perf_counter() - started:.0f} s")


def check(args: argparse.Namespace) -> None:
    """What can be known to be wrong before anything is loaded; makes the folder of the results.

    Raises:
        ValueError: names the option.
    """
    if min(args.steps, args.batch, args.scenes) < 1:
        raise ValueError("--steps, --batch and --scenes must be positive")
    if args.lr is not None and not (args.lr > 0 and math.isfinite(args.lr)):
        raise ValueError(f"--lr must be a positive number, got {args.lr}")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:  # the second where torch was built without it
        raise ValueError(f"--device {args.device} cannot be used here: {error}") from error
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {args.out} cannot be made: {error}") from error


def prepare(args: argparse.Namespace, device: torch.device) -> tuple[Data, dtme.MultiTaskModel]:
    """The rooms, and a model that has shown that it takes them.

    Raises:
        ValueError: the backbone does not take images of this size.
    """
    size = (args.size, args.size) if args.size is not None else own_size(args.backbone)
    torch.manual_seed(args.seed)
    backbone = load_backbone(args.backbone, size, None)  # before anything is rendered: it may refuse the size
    count = {"train": args.scenes, "val": max(1, args.scenes // 8)}
    data = open_data("rooms", Options(tasks=DEMO_TASKS, size=size, seed=args.seed, cache=args.cache, **count))
    model = with_heads(backbone, data).to(device)
    images, _ = Batches(data, "val", 1, device).take([0])
    try:
        with torch.no_grad():
            model.eval()(images)
    except (ValueError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"--backbone {args.backbone} does not take images of {size[0]} × {size[1]} pixels: {error}. "
            "Without --size they have the size that it was trained with"
        ) from error
    return data, model


def own_size(backbone: str) -> tuple[int, int]:
    """(height, width) of the images that a backbone was trained with, as far as its patches tile them.

    Raises:
        ValueError: its config does not tell.
    """
    if not is_pretrained(backbone):
        return SIZE
    import_torchvision()
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(backbone)
    except OSError as error:
        raise ValueError(f"--backbone {backbone} cannot be loaded: {error}") from error
    size, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    sides = {size} if isinstance(size, int) else set(size or ())
    if len(sides) != 1 or not isinstance(patch, int):
        raise ValueError(f"--backbone {backbone} has no square image_size and patch_size in its config: see --size")
    side = sides.pop() // patch * patch
    return side, side


def score(args: argparse.Namespace, data: Data, model: dtme.MultiTaskModel) -> None:
    """Everything that comes after data and model are there."""
    device, lr = torch.device(args.device), args.lr or default_lr(args.backbone)
    height, width = data.size
    print(f"{type(model.backbone).__name__} on {device}, {height} × {width} pixels, tasks {', '.join(data.tasks)}")
    training, held_out = (Batches(data, split, args.batch, device) for split in ("train", "val"))

    losses = {"joint": train(model, training, args.steps, lr, args.seed, "joint training")}
    scores = {"joint": evaluate(model, held_out)}

    report = dtme.analyze(model, training, losses_of(data.tasks), max_batches=max(1, 512 // args.batch))
    plan = report.plan(modulation=0.5, expansion=0.5, num_tokens=6)
    print(f"\n{report}\n")
    draw_conflicts(model, held_out, report, args.out / "conflict_map.png")
    expanded = dtme.expand(copy.deepcopy(model), plan)
    expanded.print_trainable_parameters()

    for name, contender in (("not expanded", model), ("expanded", expanded)):
        losses[name] = train(contender, training, args.steps, lr / 2, args.seed + 1, f"{name:14}")
        scores[name] = evaluate(contender, held_out)
    print(f"\n{comparison(data, scores, args.steps)}\n")

    write_results(args.out, report, plan, expanded, held_out, losses)
    reload_and_predict(args, expanded, held_out)


def comparison(data: Data, scores: dict[str, dict[str, float]], steps: int) -> str:
    """The table of held-out metrics; Δm is against the run that was not expanded, not against single-task models."""
    joint, plain, expanded = (scores[name] for name in ("joint", "not expanded", "expanded"))
    # a model that hardly trained may find no edge at all, and nothing can be relative to 0
    known = [task for task in joint if plain[task] and math.isfinite(plain[task])]
    total, terms = delta_m({t: expanded[t] for t in known}, {t: plain[t] for t in known}, lower_is_better(data.tasks))
    rows = [["task", "metric", "joint", "not expanded", "expanded", "difference", "Δm"]]
    for task in joint:
        info, term = data.tasks[task], f"{terms[task]:+.2f} %" if task in terms else "–"
        metric = f"{info.metric} {info.unit} {'↓' if info.lower_is_better else '↑'}"
        values = [f"{score[task]:.3f}" for score in (joint, plain, expanded)]
        rows.append([task, metric, *values, f"{expanded[task] - plain[task]:+.3f}", term])
    rows.append(["mean", "", "", "", "", "", f"{total:+.2f} %" if len(known) == len(joint) else "–"])
    title = (
        f"Held-out scenes after {steps} joint steps, and {steps} more without and with expansion on the same batches"
    )
    return "\n".join([title, "", *ruled(aligned(rows, "<<>>>>>"))])


def write_results(
    out: Path,
    report: dtme.ConflictReport,
    plan: dtme.ExpansionPlan,
    model: dtme.MultiTaskModel,
    held_out: Batches,
    losses: dict[str, dict[str, list[float]]],
) -> None:
    report.save(out / "report.json")
    plan.save(out / "plan.json")
    report.plot(out / "conflicts.png")
    plot_losses(losses, out / "losses.png")
    draw_predictions(model, held_out, out / "predictions.png")
    model.save_pretrained(out / "model")
    print(f"wrote {', '.join(path.name for path in sorted(out.iterdir()))} into {out}/")


def plot_losses(losses: dict[str, dict[str, list[float]]], path: Path) -> None:
    """One panel per task: joint training, then both further runs from its end."""
    from matplotlib.figure import Figure

    joint, *further = losses.items()
    tasks = list(joint[1])
    figure = Figure(figsize=(11, 2.9), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks)), tasks, strict=True):
        steps = len(joint[1][task])
        for (name, curves), color in zip([joint, *further], ("#999999", "#2f6fb0", "#d9772b"), strict=True):
            curve = smooth(curves[task])
            start = 0 if name == joint[0] else steps
            axes.plot(range(start, start + len(curve)), curve, color=color, label=name, linewidth=1.5)
        axes.set_yscale("log")
        for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            axis(lambda value, _: f"{value:.3g}")
        axes.set_title(f"{task} loss", fontsize=10, loc="left")
        axes.set_xlabel("step", fontsize=9)
        axes.tick_params(labelsize=8, which="both")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)


def smooth(curve: list[float], window: int = 15) -> list[float]:
    """Mean over the last ``window`` steps."""
    sums = [0.0, *itertools.accumulate(curve)]
    return [(sums[i] - sums[max(0, i - window)]) / min(i, window) for i in range(1, len(sums))]


@torch.no_grad()
def draw_predictions(model: dtme.MultiTaskModel, held_out: Batches, path: Path, count: int = 6) -> None:
    """Held-out scenes: the image, and every task's label beside its prediction."""
    images, labels = next(iter(held_out))
    predictions = model.eval()(images[:count])
    rows = []
    for i, image in enumerate(colours(images[:count].cpu().numpy())):
        row = [colorize("image", image)]
        for task in labels:
            row.append(colorize(task, labels[task][i].cpu().numpy()))
            row.append(colorize(task, decode(task, predictions[task][i].cpu().numpy())))
        rows.append(row)
    columns = ["image", *(name for task in labels for name in (task, "predicted"))]
    sheet(path, rows, columns, legend=("semseg", "depth"), panel=1.3)


def draw_conflicts(model: dtme.MultiTaskModel, held_out: Batches, report: dtme.ConflictReport, path: Path) -> None:
    """Where in one held-out scene the tasks pull apart, in the block whose range rate is the highest."""
    images, labels = next(iter(held_out))
    block = report.blocks[int(report.range_rates.nan_to_num(-1).argmax())]
    losses = losses_of(held_out.tasks)
    maps = dtme.conflict_map(model, (images, labels), losses, report, block)
    dtme.plot_conflict_map(maps, path, images=torch.from_numpy(colours(images.cpu().numpy())))


def reload_and_predict(args: argparse.Namespace, model: dtme.MultiTaskModel, held_out: Batches) -> None:
    """What a user of the saved model does: a fresh backbone and heads, the weights, one task."""
    fresh = with_heads(load_backbone(args.backbone, held_out.data.size, None), held_out.data)
    again = dtme.MultiTaskModel.from_pretrained(args.out / "model", fresh.backbone, dict(fresh.heads), tokens_of)
    images, _ = next(iter(held_out))
    with torch.no_grad():
        depth: Tensor = again.to(args.device).eval()(images, tasks="depth")["depth"]
        same = torch.equal(depth, model(images, tasks="depth")["depth"])
    if not same:
        raise SystemExit("the reloaded model predicts something else than the one that was saved")
    print(f"reloaded {args.out / 'model'}: depth alone, {depth.mean():.2f} m on average, the same bits")
