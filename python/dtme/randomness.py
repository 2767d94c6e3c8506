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


class Saved:
    """The mode and the buffers of one module, without those of its children. It does not keep the module alive."""

    def __init__(self, module: nn.Module) -> None:
        self.training, self.buffers = module.training, dict(module._buffers)
        self.values = [(b, b.detach().clone()) for b in self.buffers.values() if b is not None]

    @torch.no_grad()
    def put_back(self, module: nn.Module) -> None:
        """Let ``module``, which it was made of, be as it was then."""
        module.training = self.training
        for name, buffer in self.buffers.items():
            module._buffers[name] = buffer
        for buffer, value in self.values:
            # batch norm writes without telling the version counter; what a graph saved is not written for nothing
            if not buffer.is_meta and not torch.equal(buffer, value):
                buffer.copy_(value)


@contextmanager
def put_back(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Modes, buffers and random numbers are as before afterwards. Yields a function that winds random numbers back."""
    saved = [(module, Saved(module)) for module in model.modules()]
    state = random_state()
    try:
        yield lambda: wind_back(state)
    finally:
        for module, before in saved:
            before.put_back(module)
        wind_back(state)


@contextmanager
def left_as_it_was(model: nn.Module, *, training: bool = False) -> Iterator[Callable[[], None]]:
    """Without gradients, and in evaluation mode unless ``training``; otherwise as ``put_back``."""
    with put_back(model) as rewind, torch.no_grad():
        if not training:
            for module in model.modules():
                module.training = False
        yield rewind
