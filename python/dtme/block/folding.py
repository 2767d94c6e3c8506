"""A block for one task alone, as an exported task has it: its modulation, and its task keys and values as constants."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import dtme_kernels

from ..blocks import Arguments, channels_last, find_tokens, replace_argument
from .adapter import BlockAdapter
from .attention import JoinedStreams, OwnTokens, attend, attend_concatenated
from .task_buffers import EPS
from .watch import check_whole


class FoldedBlock(nn.Module):
    """What one task has of a ``BlockAdapter``, in its place as the child ``<block>.dtme``.

    It has no state but its weights: nothing is looked up and nothing is kept when it runs, so that threads share it.
    ``weight.<owner>`` and ``bias.<owner>`` (p,) are parameters, those of a batch norm as the affine map that its
    running statistics make of it. ``task_key`` and ``task_value`` (1, H, t, d) and ``task_gate`` () are buffers:
    training would not change them.

    Args:
        adapter: of the task's block; ``attach`` takes its place.
        plain: run torch's own operators in place of this project's.
    """

    def __init__(self, adapter: BlockAdapter, task: str, plain: bool) -> None:
        super().__init__()
        self.name, self.num_features, self.plain = adapter.name, adapter.num_features, plain
        self._block = adapter._block
        owner = adapter.own_tasks.get(task, "")
        weight, bias = _map_of(adapter, owner)
        self.weight, self.bias = nn.ParameterDict(weight), nn.ParameterDict(bias)
        self._owner = owner if weight else None
        key, value, gate = _constants(adapter, owner)
        self.task_key: Tensor | None
        self.task_value: Tensor | None
        self.task_gate: Tensor | None
        for name, constant in (("task_key", key), ("task_value", value), ("task_gate", gate)):
            self.register_buffer(name, constant)
        self.site = adapter.site if key is not None else None
        self._watched = adapter._watched if key is not None else []

    def attach(self) -> None:
        """Hang it on its block, unless the task has nothing there."""
        if self.site is None and self._owner is None:
            return
        block = self._block[0]
        block.dtme = self
        block.register_forward_pre_hook(self.enter, with_kwargs=True)
        if self.site is not None:
            self.site.seam.install(self.attention_forward)

    def enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        """Modulate what enters the block."""
        is_whole = block is self._block[0] and block._modules.get("dtme") is self
        check_whole(self.name, is_whole, (self.weight, self.bias), self._watched)
        if self._owner is None:
            return None
        where, tokens = find_tokens(args, kwargs, self.name)
        last = channels_last(block, self.name, tokens, self.num_features)
        changed = self.modulate(last, self.weight[self._owner], self.bias[self._owner])
        return replace_argument(args, kwargs, where, changed if last is tokens else changed.movedim(-1, 1))

    def modulate(self, tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """(B, ..., p)."""
        if self.plain:
            wide = torch.promote_types(tokens.dtype, torch.float32)
            return (tokens.to(wide) * weight.to(wide) + bias.to(wide)).to(tokens.dtype)
        changed = dtme_kernels.modulate(tokens.flatten(1, -2), weight.unsqueeze(0), bias.unsqueeze(0))
        return changed.view(tokens.shape)

    def attention_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the attention's own forward."""
        assert self.site is not None
        seam = self.site.seam
        own = OwnTokens(self.name, seam.is_square, seam.cached_sizes(args, kwargs))
        return seam.run(self._attend(own), *args, **kwargs)

    def _attend(self, own: OwnTokens) -> Any:
        assert self.task_key is not None and self.task_value is not None
        task_kv, gate = (self.task_key, self.task_value), self.task_gate
        if self.plain:
            return partial(_attend_plainly, partial(attend_concatenated, None, task_kv, gate, own))
        streams = JoinedStreams(self.name, 1, [0], task_kv, {} if gate is None else {0: gate})
        return partial(attend, streams, None, own)


def fold(adapters: list[BlockAdapter], task: str, plain: bool) -> None:
    """Put what ``task`` has of ``adapters`` in their places; of other tasks nothing stays."""
    folded = [FoldedBlock(adapter, task, plain) for adapter in adapters]
    for adapter in adapters:
        adapter.remove()
    for block in folded:
        block.attach()


def _attend_plainly(run: Any, query: Tensor, key: Tensor, value: Tensor | None, *args: Any, **options: Any) -> Tensor:
    out = run(query, key, value, *args, **options)
    # how torch's fused attention lays its output out is not how that lies which it is decomposed to for ONNX, say
    return out.clone(memory_format=torch.contiguous_format) if torch.compiler.is_exporting() else out


def _map_of(adapter: BlockAdapter, owner: str) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Scale and shift of every channel by their owner; empty where the task has none."""
    if owner not in adapter.weight:
        return {}, {}
    weight, bias = adapter.weight[owner], adapter.bias[owner]
    if adapter.running_mean is None or adapter.running_var is None:
        return {owner: weight}, {owner: bias}
    mean, var = adapter.running_mean[owner], adapter.running_var[owner]
    with torch.no_grad():
        scale = weight.to(var.dtype) / (var + EPS).sqrt()
        shift = bias.to(var.dtype) - mean * scale
    return {owner: nn.Parameter(scale, weight.requires_grad)}, {owner: nn.Parameter(shift, bias.requires_grad)}


def _constants(adapter: BlockAdapter, owner: str) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Keys and values of the task tokens, and their gate."""
    if owner not in adapter.tokens:
        return None, None, None
    with torch.no_grad():
        key, value = adapter.project(adapter.tokens[owner].unsqueeze(0))
    gate = adapter.gate[owner].detach().clone() if owner in adapter.gate else None
    return key.clone(), value.clone(), gate
