"""A small model of one's own with a batch for it, and analyses of the two."""

import torch
import torch.nn.functional as F
from torch import nn

import dtme
from tests.dtme.clients import TASKS, WIDTH, OwnTransformer

COUNTS = ("ranks", "range_counts", "null_counts", "valid_counts")


def same(a, b):
    for name in COUNTS:
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    torch.testing.assert_close(a.gains, b.gains, rtol=1e-8, atol=1e-12)


def make_model(tasks=TASKS, seed=0):
    torch.manual_seed(seed)
    return dtme.MultiTaskModel(OwnTransformer(), {task: nn.Linear(WIDTH, 2) for task in tasks}).double()


def make_batch(rows=2, tasks=TASKS, seed=0, tokens=5):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, tokens, WIDTH, generator=generator).double()
    return x, {task: torch.randn(rows, tokens, 2, generator=generator).double() for task in tasks}


def analyze(model, loader, losses=F.mse_loss, tasks=TASKS, **options):
    losses = dict.fromkeys(tasks, losses) if losses is F.mse_loss else losses
    return dtme.analyze(model, loader, losses, progress=False, **options)
