"""Made-up modulations and task tokens by which tasks can be told apart: new ones are the identity, or almost."""

import zlib

import torch
from torch import Tensor, nn


def probe(block: str, parameters: nn.ParameterDict, owner: str, default: Tensor | None) -> Tensor | None:
    """What stands in for ``parameters[owner]``, the same for every call; ``default`` where it has none."""
    if owner not in parameters:
        return default
    real = parameters[owner]
    generator = torch.Generator().manual_seed(zlib.crc32(f"{block}/{owner}/{real.ndim}".encode()))
    noise = torch.randn(real.shape, generator=generator).to(real)
    return real + 0.5 * noise
