"""The definition. Everything else is measured against it."""

import torch
from torch import Tensor


def token_covariance(tokens: Tensor) -> Tensor:
    """C = sum over tokens of x x^T (Eq. 1), in at least float32."""
    rows = tokens.reshape(-1, tokens.shape[-1]).to(torch.promote_types(tokens.dtype, torch.float32))
    product = rows.mT @ rows
    # a matrix product promises no symmetry to the last bit: mirror one triangle
    return product.tril() + product.tril(-1).mT


def token_covariance_backward(grad: Tensor, tokens: Tensor) -> Tensor:
    """dx = (G + G^T) x."""
    rows = tokens.reshape(-1, tokens.shape[-1]).to(grad.dtype)
    return (rows @ (grad + grad.mT)).to(tokens.dtype).reshape(tokens.shape)


@torch.no_grad()
def token_covariance_(accumulator: Tensor, tokens: list[Tensor]) -> None:
    """C_d += sum over tokens of x x^T, for every layer d; all sums first, as tokens may be views of the accumulator."""
    sums = [token_covariance(x.detach()) for x in tokens]
    for layer, x in zip(accumulator.view(-1, *accumulator.shape[-2:]), sums, strict=True):
        layer += x
