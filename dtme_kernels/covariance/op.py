"""Schemas, shapes, gradient and dispatch of ``torch.ops.dtme.token_covariance`` and its in-place sibling."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..launch import cannot_run
from ..registry import Operator, library
from . import reference

_KERNELS = f"{__package__}.kernel"


def _fake(tokens: Tensor) -> Tensor:
    p = tokens.shape[-1]
    return tokens.new_empty((p, p), dtype=torch.promote_types(tokens.dtype, torch.float32))


def _backward_fake(grad: Tensor, tokens: Tensor) -> Tensor:
    return tokens.new_empty(tokens.shape)


def _in_place_fake(accumulator: Tensor, tokens: list[Tensor]) -> None:
    return None


def _setup(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(call: Any, ctx: Any, grad: Tensor) -> Tensor:
    return call(grad, *ctx.saved_tensors)


token_covariance = Operator("token_covariance(Tensor tokens) -> Tensor", reference.token_covariance, _fake)
token_covariance_backward = Operator(
    "token_covariance_backward(Tensor grad, Tensor tokens) -> Tensor",
    reference.token_covariance_backward,
    _backward_fake,
)
token_covariance.differentiate(_setup, _backward, once=token_covariance_backward)
token_covariance_ = Operator(
    "token_covariance_(Tensor(a!) accumulator, Tensor[] tokens) -> ()", reference.token_covariance_, _in_place_fake
)
token_covariance.implement_triton(_KERNELS, cannot_run)
token_covariance_backward.implement_triton(_KERNELS, lambda grad, tokens: cannot_run(tokens))
token_covariance_.implement_triton(_KERNELS, lambda accumulator, tokens: cannot_run(*tokens))


def _counted(write: Callable[..., None], accumulator: Tensor, tokens: list[Tensor]) -> None:
    """Autograd must see that the accumulator has changed; of an operator in Python it does not by itself."""
    write(accumulator, tokens)
    if not accumulator.is_inference():  # which counts no versions
        torch.autograd.graph.increment_version(accumulator)


def _dispatched(keys: Any, accumulator: Tensor, tokens: list[Tensor]) -> None:
    below = keys & torch._C._after_ADInplaceOrView_keyset
    _counted(partial(token_covariance_.overload.redispatch, below), accumulator, tokens)


library.impl("token_covariance_", _dispatched, "ADInplaceOrView", with_keyset=True)
if "triton" in token_covariance_.implementations:  # by its name it passes by the dispatcher
    token_covariance_.implementations["triton"] = partial(_counted, token_covariance_.implementations["triton"])
