"""``scenes``: draw a sheet of the embedded data set with all its labels, and say how fast it renders."""

import argparse
import os
import time

from torch.utils.data import DataLoader

from .labels import CLASSES
from .pictures import colorize, sheet
from .scenes import SPLITS, Scenes, render


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--show", metavar="PNG", default="scenes.png", help="where to draw the sheet")
    parser.add_argument("--count", type=int, default=8, help="number of scenes")
    parser.add_argument("--size", type=int, nargs=2, default=(128, 128), metavar=("H", "W"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=SPLITS, default="train")


def images_per_second(workers: int, count: int = 256) -> float:
    """64 × 64 images with all labels that torch's loader gets in a second; 0 workers: this process alone."""
    loader = DataLoader(Scenes(count), batch_size=32, num_workers=workers)
    start = time.perf_counter()
    for _ in loader:
        pass
    return count / (time.perf_counter() - start)


def run(args: argparse.Namespace) -> int:
    images, labels = render(range(args.count), tuple(args.size), args.seed, args.split)
    rows = [
        [colorize("image", image.numpy()), *(colorize(task, labels[task][i].numpy()) for task in CLASSES)]
        for i, image in enumerate(images)
    ]
    sheet(args.show, rows, ["image", *CLASSES])
    print(f"{args.show}: {args.count} scenes of {args.size[0]} × {args.size[1]} ({args.split}, seed {args.seed})")
    cores = os.cpu_count() or 1
    alone, together = images_per_second(0), images_per_second(cores)
    print(f"{alone:.0f} images of 64 × 64 with all labels per second, {together:.0f} with {cores} workers")
    return 0
