"""Can one task be taken out of a decoder that is given the features of all? It is found out by trying."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .randomness import put_back
from .trees import map_leaves, map_tensors, opaque, tensors

Decoder = Callable[[dict[str, Any]], Mapping[str, Any]]


class Example(NamedTuple):
    """What a decoder was given last."""

    tasks: tuple[str, ...]
    features: Any
    """Of any task, their tensors on the meta device: shapes and dtypes, no values."""


def example_of(features: Mapping[str, Any]) -> Example:
    def without_values(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return torch.empty_like(leaf, device="meta", requires_grad=False)
        return leaf if opaque(leaf) is None else None  # a key-value cache, say, would be kept alive

    return Example(tuple(features), map_leaves(without_values, next(iter(features.values()))))


def name_of(decoder: Any) -> str:
    """What messages and saved models call it."""
    return type(decoder).__name__ if isinstance(decoder, nn.Module) else getattr(decoder, "__name__", repr(decoder))


def check_independent(
    model: nn.Module, decoder: Decoder, task: str, tasks: Sequence[str], example: Example | None
) -> None:
    """Refuse a decoder that needs the features of other tasks, or may need them once its weights have changed.

    Args:
        model: holds the decoder's weights, if it has any, in evaluation mode. Call this outside of inference mode.

    Raises:
        RuntimeError: names the decoder and says why.
    """

    def refuse(problem: str) -> RuntimeError:
        return RuntimeError(
            f"{task!r} cannot be exported alone, because the decoder {name_of(decoder)} {problem}: export the whole "
            "model"
        )

    if example is None:
        raise RuntimeError(
            f"the decoder {name_of(decoder)} has to be tried on the features of {task!r} alone: call the model once, "
            "not compiled, so that their shapes are known"
        )
    generator = torch.Generator().manual_seed(0)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    features = {name: map_tensors(lambda like: _random(like, device, generator), example.features) for name in tasks}
    others = [x for name in tasks if name != task for x in tensors(features[name]) if x.requires_grad]
    poisoned = {name: found if name == task else map_tensors(_poison, found) for name, found in features.items()}

    with put_back(model) as rewind, torch.enable_grad():

        def predict(given: dict[str, Any], what: str) -> list[Tensor]:
            rewind()
            try:
                return list(tensors(decoder(map_tensors(torch.clone, given))[task]))  # it may write over them
            except Exception as error:  # whatever a decoder raises that was not made for this
                raise refuse(f"raises {type(error).__name__} when it is given {what}: {error}") from error

        want = predict(features, "features of the shapes last seen")
        reached = [output for output in want if output.requires_grad]
        if reached and others:
            ones = [torch.ones_like(output) for output in reached]
            if any(g is not None for g in torch.autograd.grad(reached, others, ones, allow_unused=True)):
                raise refuse("reads the features of other tasks for it")
        if not _agree(predict(poisoned, "features that are NaN for other tasks"), want):
            raise refuse("lets the features of other tasks change it")
        if not _agree(predict({task: features[task]}, f"the features of {task!r} alone"), want):
            raise refuse("predicts something else when it is given the features of that task alone")


def _random(like: Tensor, device: torch.device, generator: torch.Generator) -> Tensor:
    if not like.is_floating_point():
        return torch.zeros(like.shape, dtype=like.dtype, device=device)
    values = torch.randn(like.shape, generator=generator, dtype=torch.promote_types(like.dtype, torch.float32))
    return values.to(device, like.dtype).requires_grad_()


def _poison(tensor: Tensor) -> Tensor:
    return torch.full_like(tensor, torch.nan, requires_grad=False) if tensor.is_floating_point() else tensor


def _agree(found: list[Tensor], want: list[Tensor]) -> bool:
    """Up to rounding, which other numbers of tasks in one batch may change."""
    try:
        torch.testing.assert_close(found, want)
    except AssertionError:
        return False
    return True
