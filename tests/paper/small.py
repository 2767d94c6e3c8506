"""A small ViT for rendered rooms, and batches of them: what structures are applied to in tests."""

from functools import cache

import torch
from torch.utils.data import DataLoader

from benchmarks.paper.arms import Setting
from benchmarks.paper.data.dataset import Data
from benchmarks.paper.data.rooms import TASKS
from benchmarks.paper.models import build
from benchmarks.rooms.scenes import Scenes

SIZE = (32, 32)
NAMES = ("semseg", "depth", "normals")


@cache
def batches():
    """Four of two rooms each."""
    scenes = Scenes(8, SIZE, seed=0, split="train", tasks=NAMES)
    return tuple((images - 0.5, labels) for images, labels in DataLoader(scenes, batch_size=2))


def small_model(seed=0, names=NAMES):
    data = Data("rooms", {name: TASKS[name] for name in names}, None, None, SIZE)
    return build(data, "small", seed)


def small_setting(loader=None, **options):
    loader = batches() if loader is None else loader
    return Setting(small_model(), loader, {name: TASKS[name] for name in NAMES}, **{"seed": 0, **options})


def backward(model, batch=None):
    """Gradients of the sum of all losses; the losses."""
    x, labels = batches()[0] if batch is None else batch
    predictions = model(x)
    losses = {task: TASKS[task].loss(predictions[task], labels[task]) for task in model.tasks}
    torch.stack(list(losses.values())).sum().backward()
    return losses
