"""Statistics of the batch-norm modulator, one set for every task or group."""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-5
"""Of the batch-norm modulator's variance."""


class TaskBuffers(nn.Module):
    """Buffers by owner, as ``nn.ParameterDict`` is for parameters."""

    def __init__(self, buffers: Mapping[str, Tensor]) -> None:
        super().__init__()
        for owner, buffer in buffers.items():
            self.register_buffer(owner, buffer)

    def __getitem__(self, owner: str) -> Tensor:
        return self.get_buffer(owner)


def batch_norm(rows: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, training: bool) -> Tensor:
    """Of (..., p), with running statistics; in their dtype, float32 or better."""
    wide, weight, bias = (x.to(mean.dtype) for x in (rows, weight, bias))
    return F.batch_norm(wide.flatten(0, -2), mean, var, weight, bias, training, eps=EPS).view(rows.shape).to(rows.dtype)
