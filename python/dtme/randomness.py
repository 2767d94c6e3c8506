"""Random numbers that are drawn again, and models that are looked at without being changed."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


def rewinder() -> Callable[[], None]:
    """A function that winds every source of random numbers back to where it is now.

    While a CUDA graph is recorded they cannot be read; then it does nothing.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return lambda: None
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()

    def rewind() -> None:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)

    return rewind


@contextmanager
def evaluating(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Evaluation mode without gradients; yields a function that winds random numbers back."""
    training = [module for module in model.modules() if module.training]
    rewind = rewinder()
    try:
        for module in training:
            module.training = False
        with torch.no_grad():
            yield rewind
    finally:
        for module in training:
            module.training = True
        rewind()
