"""The method from end to end on rendered rooms: train jointly, analyze, expand, train on, compare, save, reload.

The comparison is the honest one: from one checkpoint, the same budget of further steps on the same batches, once
expanded and once not. Whatever comes out is printed.
"""

import argparse
import copy
import itertools
import math
import os
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

import dtme

from ..clients import import_torchvision
from ..rooms.pictures import colorize, decode, sheet
from ..rooms.scenes import Scenes
from .data.rooms import TASKS
from .metrics import delta_m
from .models import PixelHead
from .tasks import lower_is_better
from .training import Batches, evaluate, train

DEMO_TASKS = ("semseg", "depth", "normals", "edges")
SIZE = 64  # pixels, for the small backbone; a pretrained one brings its own


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--steps", type=int, default=300, help="joint steps, and as many again with and without expansion"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--backbone", help="any transformers model name or folder (default: a small ViT, not pretrained)"
    )
    parser.add_argument("--lr", type=float, help="default: 1e-3, or 5e-5 for a pretrained backbone")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--scenes", type=int, default=2000, help="training scenes; an eighth as many are held out")
    parser.add_argument("--out", type=Path, default=Path("out"))


def run(args: argparse.Namespace) -> None:
    if min(args.steps, args.batch, args.scenes) < 1:
        raise SystemExit("--steps, --batch and --scenes must be positive")
    started = time.perf_counter()
    torch.manual_seed(args.seed)
    backbone, size, patch = load_backbone(args.backbone)
    device = torch.device(args.device)
    lr = args.lr or (5e-5 if args.backbone else 1e-3)
    model = build(backbone, size, patch).to(device)
    print(f"{type(backbone).__name__} on {device}, {size} × {size} pixels, tasks {', '.join(DEMO_TASKS)}")
    training, held_out = (load_scenes(split, args, size, device) for split in ("train", "val"))

    losses = {"joint": train(model, training, args.steps, lr, args.seed, "joint training")}
    scores = {"joint": evaluate(model, held_out)}

    chosen = {task: TASKS[task].loss for task in DEMO_TASKS}
    report = dtme.analyze(model, training, chosen, max_batches=max(1, 512 // args.batch))
    plan = report.plan(modulation=0.5, expansion=0.5, num_tokens=6)
    print(f"\n{report}\n")
    draw_conflicts(model, held_out, report, args.out / "conflict_map.png")
    expanded = dtme.expand(copy.deepcopy(model), plan)
    expanded.print_trainable_parameters()

    for name, contender in (("not expanded", model), ("expanded", expanded)):
        losses[name] = train(contender, training, args.steps, lr / 2, args.seed + 1, f"{name:14}")
        scores[name] = evaluate(contender, held_out)
    print(f"\n{comparison(scores, args.steps)}\n")

    write_results(args.out, report, plan, expanded, held_out, losses)
    reload_and_predict(args, expanded, held_out, size, patch)
    print(f"done in {time.perf_counter() - started:.0f} s")


def load_backbone(name: str | None) -> tuple[nn.Module, int, int]:
    """(transformers model, image side, patch side), the last two in pixels."""
    import_torchvision()
    from transformers import AutoModel, ViTConfig, ViTModel

    if name is None:
        config = ViTConfig(
            hidden_size=128,
            num_hidden_layers=6,
            num_attention_heads=4,
            intermediate_size=384,
            image_size=SIZE,
            patch_size=8,
        )
        return ViTModel(config, add_pooling_layer=False), SIZE, 8
    backbone = AutoModel.from_pretrained(name)
    size, patch = getattr(backbone.config, "image_size", None), getattr(backbone.config, "patch_size", None)
    if not isinstance(size, int) or not isinstance(patch, int):
        raise SystemExit(
            f"--backbone {name}: {type(backbone).__name__} has no square image_size and patch_size in its config"
        )
    return backbone, size // patch * patch, patch


def build(backbone: nn.Module, size: int, patch: int) -> dtme.MultiTaskModel:
    grid, width = (size // patch, size // patch), backbone.config.hidden_size
    return dtme.MultiTaskModel(
        backbone, {task: PixelHead(width, TASKS[task].channels, grid, patch) for task in DEMO_TASKS}
    )


def load_scenes(split: str, args: argparse.Namespace, size: int, device: torch.device) -> Batches:
    """Render a split once, on all cores, and keep it in memory."""
    count = args.scenes if split == "train" else max(1, args.scenes // 8)
    scenes = Scenes(count, (size, size), seed=args.seed, split=split, tasks=DEMO_TASKS)
    chunks = DataLoader(scenes, batch_size=50, num_workers=min(16, os.cpu_count() or 1))
    images, labels = zip(*tqdm(chunks, desc=f"rendering {split:5}", unit="batch"), strict=True)
    stacked = {task: torch.cat([label[task] for label in labels]) for task in DEMO_TASKS}
    return Batches(torch.cat(images), stacked, args.batch, device)


def comparison(scores: dict[str, dict[str, float]], steps: int) -> str:
    """The table of held-out metrics; Δm is against the run that was not expanded, not against single-task models."""
    joint, plain, expanded = (scores[name] for name in ("joint", "not expanded", "expanded"))
    # a model that hardly trained may find no edge at all, and nothing can be relative to 0
    known = [task for task in joint if plain[task] and math.isfinite(plain[task])]
    total, terms = delta_m({t: expanded[t] for t in known}, {t: plain[t] for t in known}, lower_is_better(TASKS))
    rows = [["task", "metric", "joint", "not expanded", "expanded", "difference", "Δm"]]
    for task in joint:
        info, term = TASKS[task], f"{terms[task]:+.2f} %" if task in terms else "–"
        metric = f"{info.metric} {info.unit} {'↓' if info.lower_is_better else '↑'}"
        values = [f"{score[task]:.3f}" for score in (joint, plain, expanded)]
        rows.append([task, metric, *values, f"{expanded[task] - plain[task]:+.3f}", term])
    rows.append(["mean", "", "", "", "", "", f"{total:+.2f} %" if len(known) == len(joint) else "–"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [
        [f"{c:<{w}}" if i < 2 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(r, widths, strict=True))] for r in rows
    ]
    head, *lines = ["  ".join(row) for row in cells]
    title = (
        f"Held-out scenes after {steps} joint steps, and {steps} more without and with expansion on the same batches"
    )
    return "\n".join([title, "", head, "─" * len(head), *lines])


def write_results(
    out: Path,
    report: dtme.ConflictReport,
    plan: dtme.ExpansionPlan,
    model: dtme.MultiTaskModel,
    held_out: Batches,
    losses: dict[str, dict[str, list[float]]],
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    report.save(out / "report.json")
    plan.save(out / "plan.json")
    report.plot(out / "conflicts.png")
    plot_losses(losses, out / "losses.png")
    draw_predictions(model, held_out, out / "predictions.png")
    model.save_pretrained(out / "model")
    print(f"wrote {', '.join(path.name for path in sorted(out.iterdir()))} into {out}/")


def plot_losses(losses: dict[str, dict[str, list[float]]], path: Path) -> None:
    """One panel a task: joint training, then both further runs from its end."""
    from matplotlib.figure import Figure

    joint, *further = losses.items()
    figure = Figure(figsize=(11, 2.9), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(DEMO_TASKS)), DEMO_TASKS, strict=True):
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
    for i, image in enumerate(held_out.pixels(images[:count]).cpu().numpy()):
        row = [colorize("image", image)]
        for task in DEMO_TASKS:
            row.append(colorize(task, labels[task][i].cpu().numpy()))
            row.append(colorize(task, decode(task, predictions[task][i].cpu().numpy())))
        rows.append(row)
    columns = ["image", *(name for task in DEMO_TASKS for name in (task, "predicted"))]
    sheet(path, rows, columns, legend=("semseg", "depth"), panel=1.3)


def draw_conflicts(model: dtme.MultiTaskModel, held_out: Batches, report: dtme.ConflictReport, path: Path) -> None:
    """Where in one held-out scene the tasks pull apart, in the block whose range rate is the highest."""
    images, labels = next(iter(held_out))
    block = report.blocks[int(report.range_rates.nan_to_num(-1).argmax())]
    losses = {task: TASKS[task].loss for task in DEMO_TASKS}
    maps = dtme.conflict_map(model, (images, labels), losses, report, block)
    dtme.plot_conflict_map(maps, path, images=held_out.pixels(images))


def reload_and_predict(
    args: argparse.Namespace, model: dtme.MultiTaskModel, held_out: Batches, size: int, patch: int
) -> None:
    """What a user of the saved model does: a fresh backbone and heads, the weights, one task."""
    backbone, _, _ = load_backbone(args.backbone)
    fresh = build(backbone, size, patch)
    again = dtme.MultiTaskModel.from_pretrained(args.out / "model", fresh.backbone, dict(fresh.heads))
    images, _ = next(iter(held_out))
    with torch.no_grad():
        depth: Tensor = again.to(args.device).eval()(images, tasks="depth")["depth"]
        same = torch.equal(depth, model(images, tasks="depth")["depth"])
    if not same:
        raise SystemExit("the reloaded model predicts something else than the one that was saved")
    print(f"reloaded {args.out / 'model'}: depth alone, {depth.mean():.2f} m on average, the same bits")
