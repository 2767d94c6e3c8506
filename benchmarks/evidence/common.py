"""Small vision transformers trained on rendered rooms, and a file of results that grows seed by seed."""

import argparse
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dtme
from dtme.files import write_beside
from dtme.tables import aligned, ruled

from ..clients import import_torchvision
from ..paper.data import Options, open_data
from ..paper.data.rooms import DEMO_TASKS, TASKS, renderer
from ..paper.models import with_heads
from ..paper.results import write_json
from ..paper.runner.measures import run_facts
from ..paper.tasks import choose, losses_of
from ..paper.training import Batch, Batches, train

LR, TRAIN_BATCH = 1e-3, 16
Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser, *, seeds: int, out: str, **defaults: int) -> None:
    """The options of all commands; ``defaults`` are those of the sizes."""
    parser.add_argument("--seeds", type=int, default=seeds, help="seeds 0, 1, ...: each is a row of the results")
    help_of = {
        "scenes": "rendered scenes",
        "size": "pixels along an image's side",
        "patch": "pixels along a patch's side",
        "depth": "transformer blocks",
        "width": "channels",
        "steps": f"joint training steps of {TRAIN_BATCH} images",
        "batch": "images per batch of the analysis",
    }
    for name, text in help_of.items():
        parser.add_argument(f"--{name}", type=int, default=defaults[name], help=text)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cache", type=Path, default=Path("out/evidence"), help="rendered scenes and trained models")
    parser.add_argument("--out", type=Path, default=Path(out), help="goes on with the seeds that are there")
    parser.add_argument("--fresh", action="store_true", help="drop the results that are there")


def check_positive(args: argparse.Namespace, *names: str) -> None:
    for name in names:
        if getattr(args, name) < 1:
            raise SystemExit(f"--{name.replace('_', '-')} must be positive, got {getattr(args, name)}")
    if args.size % args.patch:
        raise SystemExit(f"--size must be a multiple of --patch, got {args.size} and {args.patch}")


# --- data and models --------------------------------------------------------------------------------------------------


def scenes(args: argparse.Namespace) -> Batches:
    """The rendered training scenes: from the cache, or rendered once."""
    size = (args.size, args.size)
    data = open_data("rooms", Options(tasks=DEMO_TASKS, size=size, train=args.scenes, val=1, cache=args.cache))
    return Batches(data, "train", TRAIN_BATCH, torch.device(args.device))


def untrained(args: argparse.Namespace, data: Batches, seed: int) -> dtme.MultiTaskModel:
    import_torchvision()
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=args.width,
        num_hidden_layers=args.depth,
        num_attention_heads=4,
        intermediate_size=3 * args.width,
        image_size=args.size,
        patch_size=args.patch,
    )
    return with_heads(ViTModel(config, add_pooling_layer=False), data.data).to(args.device)


def trained(args: argparse.Namespace, data: Batches, seed: int) -> dtme.MultiTaskModel:
    """Backbone and heads, trained jointly from scratch: from the cache, or trained once; in evaluation mode."""
    model = untrained(args, data, seed)
    sizes = [args.scenes, args.size, args.patch, args.depth, args.width, args.steps, LR, TRAIN_BATCH, args.device]
    name = hashlib.sha256(json.dumps([*sizes, renderer()]).encode()).hexdigest()[:12]
    path = args.cache / f"model-{name}-{seed}.pt"
    if not path.exists():
        train(model, data, args.steps, LR, seed, f"training model {seed}")
        state = model.state_dict()
        write_beside(path, lambda beside: torch.save(state, beside))
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


class Ordered:
    """Some of the scenes in a given order, the same at every iteration: a loader of ``(images, {task: labels})``."""

    def __init__(self, data: Batches, order: Tensor, batch: int) -> None:
        self.data, self.parts = data, order.split(batch)

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[Batch]:
        return map(self.data.take, self.parts)


def losses() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    return losses_of(choose(TASKS, DEMO_TASKS))


# --- results ----------------------------------------------------------------------------------------------------------


class Results:
    """``{"settings", "summary", "runs", "rows"}`` in a JSON file, written after every seed; rows that are there stay.

    Raises:
        SystemExit: the file holds results of other settings, and they were not to be dropped.
    """

    def __init__(self, path: Path, settings: dict[str, Any], fresh: bool) -> None:
        self.path, self.settings = path, json.loads(json.dumps(settings))
        self.rows: list[Row] = []
        if path.exists() and not fresh:
            content = json.loads(path.read_text())
            if content["settings"] != self.settings:
                was, now = content["settings"], self.settings
                other = [name for name in {**was, **now} if was.get(name) != now.get(name)]
                raise SystemExit(
                    f"{path} holds results of another {', '.join(other)}: --out names another file, --fresh drops them"
                )
            self.rows = content["rows"]

    def missing(self, seeds: int) -> list[int]:
        there = {row["seed"] for row in self.rows}
        return [seed for seed in range(seeds) if seed not in there]

    def add(self, row: Row, summary: Callable[[list[Row]], Any]) -> None:
        self.rows = sorted([*self.rows, row | {"run": run_facts()}], key=lambda row: row["seed"])
        content = {"settings": self.settings, "summary": summary(self.rows), "rows": self.rows}
        write_json(self.path, content)


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The options that the numbers hang on."""
    left_out = ("seeds", "cache", "out", "fresh", "command", "run")
    settings = {name: value for name, value in vars(args).items() if name not in left_out}
    return settings | {"tasks": DEMO_TASKS, "training lr": LR, "training batch": TRAIN_BATCH}


def table(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the head; the first column is aligned to the left."""
    return "\n".join(ruled(aligned(rows, "<" + ">" * (len(rows[0]) - 1))))
