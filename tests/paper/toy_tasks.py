"""Small models whose gradients are known, and batches for them."""

import numpy as np
import torch
from torch import nn

import dtme
from benchmarks.paper.metrics import DepthRMSE
from benchmarks.paper.tasks import Task

WIDTH, TOKENS, IMAGES = 8, 5, 4


def task(loss, weight=1.0):
    return Task(1, loss, DepthRMSE, "RMSE", "m", lower_is_better=True, weight=weight)


def quadratic(prediction, target):
    """Half the squared distance from ``target[:-1]``, plus ``target[-1]``; no labels where the target is all NaN."""
    if target.isnan().all():
        return 0 * prediction.sum()
    return 0.5 * (prediction - target[:-1]).square().sum() + target[-1]


class Point(nn.Module):
    """Shared and own numbers, all of which a task predicts: at first zero, so that minus its target is its gradient."""

    def __init__(self, names, numbers):
        super().__init__()
        self.tasks = tuple(names)
        self.shared = nn.Parameter(torch.zeros(numbers, dtype=torch.float64))
        self.own = nn.ParameterDict({name: nn.Parameter(torch.zeros(2, dtype=torch.float64)) for name in names})

    def forward(self, x=None, tasks=None):
        return {name: torch.cat([self.shared, self.own[name]]) for name in tasks or self.tasks}

    def shared_parameters(self):
        return [self.shared]

    def task_parameters(self, name):
        return [self.own[name]]


OWN_GRADIENT = torch.tensor([0.25, -0.5], dtype=torch.float64)


def with_gradients(rows, losses=None):
    """Tasks a, b, ..., a ``Point`` and a batch on which its shared gradients are ``rows`` and its losses ``losses``."""
    rows = torch.as_tensor(np.asarray(rows), dtype=torch.float64)
    names = "abcdefgh"[: len(rows)]
    tasks, labels = {}, {}
    for position, (name, row) in enumerate(zip(names, rows, strict=True)):
        gradient = torch.cat([row, OWN_GRADIENT * (position + 1)])
        value = 0.0 if losses is None else losses[position] - 0.5 * gradient.square().sum().item()
        labels[name] = torch.cat([-gradient, torch.tensor([value], dtype=torch.float64)])
        tasks[name] = task(quadratic, weight=position + 2.0)
    return tasks, Point(names, rows.shape[1]), (None, labels)


def shared_gradient(make, rows, losses=None):
    """What a new combination leaves on the shared parameter; those of one task have their task's gradient."""
    tasks, model, batch = with_gradients(rows, losses)
    make(tasks).step(model, batch, tasks)
    for position, name in enumerate(tasks):
        torch.testing.assert_close(model.own[name].grad, OWN_GRADIENT * (position + 1))
    return model.shared.grad


def tokens_loss(prediction, target):
    """Mean squared error over the images that have labels: those that are not NaN."""
    known = ~target.isnan().flatten(1).any(1)
    return torch.where(known[:, None, None], prediction - target.nan_to_num(), 0.0).square().mean()


def transformer(names, dropout=0.1, seed=0):
    """A ``MultiTaskModel`` with dropout in its backbone, and batch norms in its heads."""
    torch.manual_seed(seed)
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=dropout, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return dtme.MultiTaskModel(encoder, {name: Head() for name in names})


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.project = nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, tokens):
        return self.project(torch.tanh(self.norm(tokens.mT).mT))


def token_batch(names, seed=0, absent=()):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(IMAGES, TOKENS, WIDTH, generator=random)
    labels = {name: torch.randn(IMAGES, TOKENS, 3, generator=random) for name in names}
    return x, {name: label * torch.nan if name in absent else label for name, label in labels.items()}


def token_tasks(names):
    return {name: task(tokens_loss, weight=position + 1.0) for position, name in enumerate(names)}


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def train(model, combination, optimizer, tasks, batches):
    """The losses of every step."""
    seen = []
    for batch in batches:
        optimizer.zero_grad()
        seen.append(combination.step(model, batch, tasks))
        optimizer.step()
        combination.after(model, batch, tasks)
    return seen
