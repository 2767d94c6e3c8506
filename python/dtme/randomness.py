"""Random numbers that are drawn again, and models that are looked at without being changed."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn


class State(NamedTuple):
    """Where every source of random numbers is."""

    python: Any
    numpy: Any
    cpu: Tensor
    cuda: tuple[Tensor, ...]


def random_state() -> State | None:
    """Where every source of random numbers is now; None while a CUDA graph is recorded, when it cannot be read."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return None
    cuda = tuple(torch.cuda.get_rng_state_all()) if torch.cuda.is_initialized() else ()
    return State(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)


def wind_back(state: State | None) -> None:
    """To where ``random_state`` was read."""
    if state is None:
        return
    random.setstate(state.python)
    np.random.set_state(state.numpy)
    torch.set_rng_state(state.cpu)
    if state.cuda:
        torch.cuda.set_rng_state_all(state.cuda)


def was_drawn(state: State | None) -> bool:
    """Whether a random number was drawn since ``random_state`` was read."""
    now = random_state()
    if state is None or now is None:
        return True
    numpy = all(np.array_equal(a, b) for a, b in zip(state.numpy, now.numpy, strict=True))
    tensors = zip((state.cpu, *state.cuda), (now.cpu, *now.cuda), strict=True)
    return not (state.python == now.python and numpy and all(torch.equal(a, b) for a, b in tensors))


@contextmanager
def put_back(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Modes, buffers and random numbers are as before afterwards. Yields a function that winds random numbers back."""
    modes = [(module, module.training) for module in model.modules()]
    holders = [(module, dict(module._buffers)) for module in model.modules() if module._buffers]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    state = random_state()
    try:
        yield lambda: wind_back(state)
    finally:
        for module, mode in modes:
            module.training = mode
        for module, before in holders:
            module._buffers.update(before)
        with torch.no_grad():
            for buffer, value in buffers:
                # batch norm writes without telling the version counter; what a graph saved is not written for nothing
                if not buffer.is_meta and not torch.equal(buffer, value):
                    buffer.copy_(value)
        wind_back(state)


@contextmanager
def left_as_it_was(model: nn.Module, *, training: bool = False) -> Iterator[Callable[[], None]]:
    """Without gradients, and in evaluation mode unless ``training``; otherwise as ``put_back``."""
    with put_back(model) as rewind, torch.no_grad():
        if not training:
            for module in model.modules():
                module.training = False
        yield rewind
