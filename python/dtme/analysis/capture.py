"""Look into a model without changing it: record its blocks' inputs, and put everything back."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from .. import nested_tensors
from ..blocks import BlockError, find_tokens, holds_channels_first, replace_argument
from ..interrupts import Deferred
from ..layouts import Layout, unfold
from ..randomness import Saved, random_state, was_drawn, wind_back
from ..streams import innermost
from ..torch_private import recomputing

SHARED = Layout((), ((),))
"""The one stream of a backbone that is not expanded."""


class Entered(NamedTuple):
    """The tokens that entered a block."""

    tokens: Tensor
    """(T * B, ..., p), or maps (T * B, p, H, W)."""
    inside: Tensor
    """What the block was given: the tokens, or a view of them, which only what goes through the block depends on."""
    layout: Layout
    """Their T streams."""
    version: int
    attempt: int
    """Of the forward: an earlier one was given up."""
    precision: torch.dtype
    """In which the block computes: that of autocast, or its tokens'."""
    is_map: bool
    """Whether the channels are on the second axis."""

    def in_streams(self, tensor: Tensor) -> Tensor:
        """The tokens, or their gradient, as (T, B, N, p)."""
        last = tensor.movedim(1, -1) if self.is_map else tensor
        return unfold(last.flatten(1, -2), self.layout.num_streams)

    def by_image(self, num_tasks: int, mask: Tensor | None = None) -> Tensor:
        """(B, n, p): all tokens that each image has here, so weighted that each of ``num_tasks`` tasks counts the same.

        A second moment of them is the mean of the tasks' own, however many of them share a stream.

        Args:
            mask: (B, N) bool; the others become zero, which adds nothing to a second moment.
        """
        streams = self.in_streams(self.tokens)
        if mask is not None:
            streams = streams.masked_fill(~mask[..., None], 0)
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
                if tokens.is_inference():  # made under inference_mode: takes part in no graph
                    tokens = tokens.clone()
                if gradients and not tokens.requires_grad:
                    started.append(tokens.requires_grad_())
                inside = tokens.view_as(tokens) if tokens.requires_grad and torch.is_grad_enabled() else tokens
                args, kwargs = replace_argument(args, kwargs, where, inside)
                if not recomputing():  # else it is recorded already
                    before = [known for known in seen.get(name, []) if known.attempt == attempt]
                    if any(set(known.layout.tasks) & set(layout.tasks) or not layout.tasks for known in before):
                        raise BlockError(
                            f"block {name!r} runs more than once in a forward, so that its tokens are ambiguous: let "
                            "a step call the model once"
                        )
                    is_map = holds_channels_first(block, tokens)
                    entered = Entered(tokens, inside, layout, tokens._version, attempt, precision(tokens), is_map)
                    seen[name] = [*before, entered]
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
        """BlockError naming a block that did not run, or whose tokens were changed in place."""
        if missing := [name for name in self.blocks if name not in seen]:
            raise BlockError(f"block {missing[0]!r} did not run in a forward")
        for name, runs in seen.items():
            if any(run.tokens._version != run.version for run in runs):
                where = f"block {name!r} or one before it"
                raise BlockError(f"{where} changes its tokens in place: their gradient cannot be taken")


def precision(tokens: Tensor) -> torch.dtype:
    """What matrix products with ``tokens`` are computed in here."""
    kind = tokens.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tokens.dtype


class Unchanged:
    """Holds a model, and every other module that runs beside it, frozen and in one mode.

    When it is left, also by an exception or Ctrl-C, weights, buffers, modes and random numbers are as before.

    Args:
        model: held from the beginning.
        train_mode: the mode.
    """

    def __init__(self, model: nn.Module, train_mode: bool) -> None:
        self.model, self.train_mode = model, train_mode
        # weak: a forward may make a module for one line, as in nn.Softmax(-1)(scores), again and again
        self._saved: WeakKeyDictionary[nn.Module, Saved] = WeakKeyDictionary()
        self._trained: list[nn.Parameter] = []
        self._nested: list[tuple[nn.Module, str, bool]] = []
        self._hooks: WeakKeyDictionary[nn.Module, dict[str, dict[int, Any]]] = WeakKeyDictionary()
        self._others: dict[str, None] = {}
        """Classes of the modules with weights that are no part of the model, in the order they were met."""

    def __enter__(self) -> "Unchanged":
        self._random = random_state()
        try:
            self.hold(self.model)
        except BaseException as error:
            self.__exit__(error)
            raise
        return self

    def __exit__(self, error: object = None, *others: object) -> None:
        for module, hooks in self._hooks.items() if error is not None else ():
            for name, before in hooks.items():  # a forward may have been interrupted between a hook and its handle
                if list(now := vars(module)[name]) != list(before):
                    now.clear()
                    now.update(before)
        for module, saved in reversed(list(self._saved.items())):  # buffers that modules share: the first saved counts
            saved.put_back(module)
        nested_tensors.switch_back(self._nested)
        for parameter in self._trained:
            parameter.requires_grad_(True)
        wind_back(self._random)

    def hold(self, module: nn.Module) -> None:
        """Save ``module`` and all in it that is not held yet, freeze it and set its mode."""
        with Deferred():  # it may be met in the middle of a forward
            for part in module.modules():
                if part not in self._saved:
                    self._saved[part] = Saved(part)
                    self._hooks[part] = {n: dict(v) for n, v in vars(part).items() if n.endswith("_hooks")}
            self._nested += nested_tensors.switch_off(module)
            if self.train_mode:
                module.train()  # which may keep a part of it, frozen statistics say, in evaluation mode
            for part in module.modules() if not self.train_mode else ():
                part.training = False  # and no more: train(False) of some merge weights
            for parameter in module.parameters():
                if parameter.requires_grad:
                    self._trained.append(parameter)
                    parameter.requires_grad_(False)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Hold whatever other module this thread calls inside, before its forward runs.

        Raises:
            ValueError: such modules ran, and random numbers were drawn in evaluation mode. A module whose method is
                called, rather than itself, is never seen, only its children are: it may be what draws them.
        """
        thread, before = threading.get_ident(), random_state()

        def meet(module: nn.Module, args: Any) -> None:
            if threading.get_ident() == thread and module not in self._saved:
                self.hold(module)
                if next(module.parameters(), None) is not None:  # else it is a loss or an activation
                    self._others[type(getattr(module, "_orig_mod", module)).__name__] = None

        handle = register_module_forward_pre_hook(meet)
        try:
            yield
        finally:
            handle.remove()
        if self._others and not self.train_mode and was_drawn(before):
            raise ValueError(
                f"modules that are no part of {type(self.model).__name__} ran ({', '.join(self._others)}), and random "
                "numbers were drawn, though all is in evaluation mode: something around these modules may still be in "
                "training mode, with dropout. Pass the whole model and say where its blocks are, as in "
                'analyze(net, loader, step, blocks="backbone")'
            )
