"""Everything of a model that an analysis could disturb."""

import random

import numpy as np
import torch
from torch import nn


class Dropping(nn.Module):
    """A head with everything an analysis could disturb: batch statistics, dropout, a buffer that counts calls."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop, self.out = nn.BatchNorm1d(24), nn.Dropout(0.5), nn.Linear(24, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1
        return self.out(self.drop(self.norm(x.flatten(0, 1)).view_as(x)))


def snapshot(model):
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        {name: p.requires_grad for name, p in model.named_parameters()},
        {name: p.grad for name, p in model.named_parameters()},
        {name: m.training for name, m in model.named_modules()},
        {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()},
        (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()),
    )


def same(before, after):
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert before[1:5] == after[1:5]
    assert (
        torch.equal(before[5][0], after[5][0]) and (before[5][1] == after[5][1]).all() and before[5][2] == after[5][2]
    )
