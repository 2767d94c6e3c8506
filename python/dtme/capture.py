"""Look into a model without changing it: record its blocks' inputs, and put everything back."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import nested_tensors
from .blocks import check_channels, find_tokens, replace_argument
from .randomness import put_back
from .streams import Layout, innermost, unfold
from .torch_private import recomputing

SHARED = Layout((), ((),))
"""The one stream of a backbone that is not expanded."""


class Entered(NamedTuple):
    """The tokens that entered a block."""

    tokens: Tensor
    """(T * B, ..., p)."""
    layout: Layout
    """Their T streams."""
    version: int
    attempt: int
    """Of the forward: an earlier one was given up."""

    def by_image(self, num_tasks: int) -> Tensor:
        """(B, n, p): all tokens that each image has here, so weighted that each of ``num_tasks`` tasks counts the same.

        A second moment of them is the mean of the tasks' own, however many of them share a stream.
        """
        streams = unfold(self.tokens.flatten(1, -2), self.layout.num_streams)
        sizes = torch.tensor([len(stream) or num_tasks for stream in self.layout.streams])
        if (sizes != num_tasks).any():
            streams = streams * (sizes / num_tasks).sqrt().to(streams)[:, None, None, None]
        return streams.transpose(0, 1).flatten(1, 2)


class BlockInputs:
    """Records the tokens that enter each block during one forward."""

    def __init__(self, blocks: dict[str, nn.Module]) -> None:
        self.blocks = blocks

    @contextmanager
    def record(self, *, gradients: bool) -> Iterator[dict[str, list[Entered]]]:
        """Yield {block: what entered it}, filled in the order the blocks run; ``check`` it when the forward is done.

        A block of an expanded backbone may run once for every task.

        Args:
            gradients: let the graph start at the first block, so that none is computed below it. The hooks then have to
                stay until the backward pass is done: activation checkpointing runs the blocks again in it.
        """
        seen: dict[str, list[Entered]] = {}
        started: list[Tensor] = []

        def hook(name: str) -> Any:
            def enter(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                forward = innermost()
                if forward is not None and forward.probes:  # a comparison
                    return None
                layout, attempt = (SHARED, 0) if forward is None else (forward.layout, forward.attempt)
                where, tokens = find_tokens(args, kwargs, name)
                check_channels(block, name, tokens, None)
                if tokens.is_inference():  # made under inference_mode: takes part in no graph
                    tokens = tokens.clone()
                if gradients and not tokens.requires_grad:
                    started.append(tokens.requires_grad_())
                args, kwargs = replace_argument(args, kwargs, where, tokens)
                if not recomputing():  # else it is recorded already
                    before = [known for known in seen.get(name, []) if known.attempt == attempt]
                    if any(set(known.layout.tasks) & set(layout.tasks) or not layout.tasks for known in before):
                        raise ValueError(f"block {name!r} runs more than once in a forward: its tokens are ambiguous")
                    seen[name] = [*before, Entered(tokens, layout, tokens._version, attempt)]
                return args, kwargs

            return enter

        handles = [
            block.register_forward_pre_hook(hook(name), prepend=True, with_kwargs=True)
            for name, block in self.blocks.items()
        ]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()
            for tokens in started:  # the first block's may be the caller's own tensor
                tokens.requires_grad_(False)

    def check(self, seen: dict[str, list[Entered]]) -> None:
        """ValueError naming a block that did not run, or whose tokens were changed in place."""
        if missing := [name for name in self.blocks if name not in seen]:
            raise ValueError(f"block {missing[0]!r} did not run in a forward")
        for name, runs in seen.items():
            if any(run.tokens._version != run.version for run in runs):
                where = f"block {name!r} or one before it"
                raise ValueError(f"{where} changes its tokens in place: their gradient cannot be taken")


@contextmanager
def unchanged(model: nn.Module, train_mode: bool) -> Iterator[None]:
    """Freeze all weights and set one mode; at the end weights, buffers, modes and random states are as before."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    nested = nested_tensors.switch_off(model)
    try:
        with put_back(model):
            model.train(train_mode)
            for parameter in trained:
                parameter.requires_grad_(False)
            yield
    finally:
        nested_tensors.switch_back(nested)
        for parameter in trained:
            parameter.requires_grad_(True)
