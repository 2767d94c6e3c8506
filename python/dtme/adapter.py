"""What ``expand`` hangs on a block: its tasks' modulation and tokens, as the child module ``<block>.dtme``."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dtme_kernels

from . import attention as seams
from .blocks import find_tokens, replace_argument
from .streams import Layout, Streams, layout, recomputing, repeat_rows, sources
from .trees import map_tensors


class BlockAdapter(nn.Module):
    """Modulation, task tokens and stream bookkeeping of one block.

    Parameters are named ``weight.<task>`` (p,), ``bias.<task>`` (p,) and ``tokens.<task>`` (t, p): one for each task, so that
    an optimizer never moves those of a task that did not run. Everything is reached through bound methods, which deepcopy
    and pickle carry along.

    Args:
        name: the block's name, for messages.
        streams: the state all adapters of a backbone share.
        separated: tasks with a stream of their own before this block.
    """

    def __init__(self, name: str, block: nn.Module, streams: Streams, separated: frozenset[str]) -> None:
        super().__init__()
        self.name = name
        self.streams = streams
        self.separated_before = self.separated_after = separated
        self.weight, self.bias, self.tokens = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        self.running_mean = self.running_var = None  # TaskBuffers, for the batch-norm modulator
        self.seam: str | None = None
        # in a tuple: a module held as an attribute would become a child, and the block would contain itself
        self._host: tuple[nn.Module, nn.Module | None, nn.Module | None] = (block, None, None)
        self._former: dict[str, Any] = {}
        self.selected: tuple[str, ...] = ()
        self._layout: Layout = ()
        self._task_kv: seams.KeysValues | None = None
        self._capture = False
        self._calls = 0
        hook = block.register_forward_pre_hook(self.enter, with_kwargs=True)
        self._handles = [hook]

    # --- putting modules in --------------------------------------------------------------------------------------

    def add_modulation(self, tasks: tuple[str, ...], like: Tensor, modulator: str) -> None:
        """W = 1, b = 0: the identity, until trained (batch norm normalises from the start: Table 11)."""
        if not tasks:
            return
        for task in tasks:
            self.weight[task] = nn.Parameter(torch.ones_like(like))
            self.bias[task] = nn.Parameter(torch.zeros_like(like))
        if modulator == "batch_norm":
            wide = like.to(torch.promote_types(like.dtype, torch.float32))
            self.running_mean = TaskBuffers({task: torch.zeros_like(wide) for task in tasks})
            self.running_var = TaskBuffers({task: torch.ones_like(wide) for task in tasks})
        self.separated_after |= frozenset(tasks)

    def add_tokens(self, tasks: tuple[str, ...], num_tokens: int, like: Tensor, site: seams.Site) -> None:
        """Normal with std 0.02, without a position."""
        attention, norm, self.seam = site
        self._host = (self._host[0], attention, norm)
        for task in tasks:
            self.tokens[task] = nn.Parameter(torch.randn_like(like.expand(num_tokens, -1)) * 0.02)
        if self.seam == "transformers":
            self._former["config"] = seams.install_transformers(attention)
        # the block's own tokens reach the norm or, without one, the attention
        self._handles.append((norm or attention).register_forward_pre_hook(self.remember))
        attention.forward = self.attention_forward  # type: ignore[method-assign]
        self.separated_after |= frozenset(tasks)

    def remove(self) -> None:
        """Leave the block as it was found."""
        for handle in self._handles:
            handle.remove()
        block, attention, _ = self._host
        if attention is not None:
            vars(attention).pop("forward", None)
            for name, value in self._former.items():
                setattr(attention, name, value)
        if getattr(block, "dtme", None) is self:
            del block.dtme

    def close(self) -> None:
        """Make this the last block: from its output on every selected task has rows of its own."""
        self._handles.append(self._host[0].register_forward_hook(self.leave))

    def fold(self, task: str) -> None:
        """Keep one task only, its task keys and values as constants: what ``export_task`` ships."""
        with torch.no_grad():
            if task in self.tokens:
                self._layout = ((task,),)
                key, value = self.task_keys_values()
                self.register_buffer("task_key", key.detach().clone())
                self.register_buffer("task_value", value.detach().clone())
        self.tokens = nn.ParameterDict()
        for name in ("weight", "bias"):
            kept = {key: value for key, value in getattr(self, name).items() if key == task}
            setattr(self, name, nn.ParameterDict(kept))

    # --- the block's input: streams and modulation ----------------------------------------------------------------

    def enter(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Split the streams that part here, modulate, and repeat what else comes by image (a mask, say)."""
        where, tokens = find_tokens(args, kwargs, self.name)
        selected = self.selected = self.streams.current(tokens, self.name)
        before, after = layout(selected, self.separated_before), layout(selected, self.separated_after)
        self._layout = after
        if tokens.shape[0] % len(before):
            raise ValueError(
                f"block {self.name!r} got {tokens.shape[0]} rows, which {len(before)} task streams do not divide"
            )
        batch = tokens.shape[0] // len(before)
        index = sources(before, after)
        if any(stream[0] in self.weight for stream in after):
            changed = self.modulate(tokens, index, len(before))
        else:
            changed = repeat_rows(tokens, index, len(before))

        def by_image(tensor: Tensor) -> Tensor:
            # built for B images before the streams parted; two-dimensional floats are positions, not images
            built = tensor.ndim >= 3 or (tensor.ndim == 2 and not tensor.is_floating_point())
            repeated = built and tensor.shape[0] == batch and tensor is not tokens
            return repeat_rows(tensor, [0] * len(after), 1) if repeated else tensor

        if len(after) > 1:
            args, kwargs = (
                map_tensors(by_image, args),
                {name: map_tensors(by_image, value) for name, value in kwargs.items()},
            )
        self.streams.mark(changed, selected)
        return replace_argument(args, kwargs, where, changed)

    def remember(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        """Find the streams again where checkpointing recomputes the block's forward, but not the hook before it."""
        if recomputing() and not self._capture:
            _, tokens = find_tokens(args, kwargs or {}, self.name)
            self._layout = layout(self.streams.current(tokens, self.name), self.separated_after)

    def modulate(self, tokens: Tensor, index: list[int], num_streams: int) -> Tensor:
        """(T_before * B, ..., p) → (T_after * B, ..., p); a stream without a map of its own keeps its bits."""
        if self.running_mean is not None:
            return self._batch_norm(repeat_rows(tokens, index, num_streams))
        like = next(iter(self.weight.values()))
        names = [stream[0] for stream in self._layout]
        weight = torch.stack([self.weight[task] if task in self.weight else torch.ones_like(like) for task in names])
        bias = torch.stack([self.bias[task] if task in self.bias else torch.zeros_like(like) for task in names])
        shape = tokens.shape[1:]  # (..., p): whatever lies between the batch and the channels is one token axis
        if num_streams == 1:
            streams = tokens.flatten(1, -2)
        else:
            streams = repeat_rows(tokens, index, num_streams).flatten(1, -2).unflatten(0, (len(index), -1))
        return dtme_kernels.modulate(streams, weight, bias).reshape(-1, *shape)

    def _batch_norm(self, tokens: Tensor) -> Tensor:
        def normalise(task: str, stream: Tensor) -> Tensor:
            if task not in self.weight:
                return stream
            running = self.running_mean[task], self.running_var[task]
            rows = stream.reshape(-1, stream.shape[-1])
            out = F.batch_norm(rows, *running, self.weight[task], self.bias[task], self.training)
            return out.reshape(stream.shape)

        streams = tokens.unflatten(0, (len(self._layout), -1)).unbind(0)
        return torch.cat([normalise(tasks[0], stream) for tasks, stream in zip(self._layout, streams, strict=True)])

    def leave(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Tasks that still share a stream get a copy each: an output is task-major over all selected tasks."""
        if len(self._layout) == len(self.selected):
            return output
        index = sources(self._layout, tuple((task,) for task in self.selected))
        return map_tensors(lambda tensor: repeat_rows(tensor, index, len(self._layout)), output)

    # --- the block's attention: task keys and values --------------------------------------------------------------

    def attention_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the attention's own forward."""
        attention = self._host[1]
        assert attention is not None
        if self._expanded():
            self._task_kv = self._constants() or self.task_keys_values(kwargs)
        try:
            return self._run(attention, args, kwargs)
        finally:
            self._task_kv = None

    def _expanded(self) -> list[int]:
        """Streams that have task tokens in this block."""
        if hasattr(self, "task_key"):
            return list(range(len(self._layout)))
        return [i for i, stream in enumerate(self._layout) if stream[0] in self.tokens]

    def _constants(self) -> seams.KeysValues | None:
        return (self.task_key, self.task_value) if hasattr(self, "task_key") else None

    def task_keys_values(self, kwargs: Mapping[str, Any] | None = None) -> seams.KeysValues:
        """Keys and values of the task tokens, (T, H, t, d) each: once per step, not once per image."""
        _, attention, norm = self._host
        assert attention is not None
        tokens = torch.stack([self.tokens[self._layout[i][0]] for i in self._expanded()])
        options = {}
        if kwargs and kwargs.get("position_embeddings") is not None:
            options["position_embeddings"] = seams.without_position(kwargs["position_embeddings"], tokens.shape[1])
        self._capture = True
        try:
            tokens = tokens if norm is None else norm(tokens)
            if self.seam == "timm":
                return seams.project_timm(attention, tokens)[1:]
            self._run(attention, (tokens,), options)
            assert self._task_kv is not None
            return self._task_kv
        finally:
            self._capture = False

    def _run(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The attention's own code, with ``attend`` for its inner product."""
        if self.seam == "timm":
            return seams.run_timm(self.attend, attention, *args, **kwargs)
        forward = type(attention).forward
        if self.seam == "transformers":
            return forward(attention, *args, **kwargs)
        self._calls = 0
        with seams.CatchAttention(self.attend):
            output = forward(attention, *args, **kwargs)
        if self._calls != 1:
            times = f"called scaled_dot_product_attention {self._calls} times, not once"
            raise seams.NotExpandable(f"block {self.name!r}: its attention {times}")
        return output

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """``scaled_dot_product_attention`` over (T * B, H, N, d) with every stream's task keys joined to its own."""
        self._calls += 1
        if self._capture:
            self._task_kv = (key, value)
            return query
        options = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
        num_streams, joined = len(self._layout), self._expanded()
        rest = [i for i in range(num_streams) if i not in joined]

        def part(tensor: Tensor, streams: list[int]) -> Tensor:
            if tensor.shape[0] == 1:  # a mask shared by all rows
                return tensor.unsqueeze(0)
            tensor = tensor.unflatten(0, (num_streams, -1))
            return tensor if len(streams) == num_streams else tensor[streams]

        def mask(streams: list[int]) -> Tensor | None:
            return None if attn_mask is None else part(seams.four_dimensional(attn_mask), streams)

        if query.shape[-2] != key.shape[-2] or query.shape[0] % num_streams:
            raise seams.NotExpandable(f"block {self.name!r}: its attention is not over its own tokens")
        out = []
        if joined:
            assert self._task_kv is not None
            qkv = (part(tensor, joined) for tensor in (query, key, value))
            out.append(dtme_kernels.expanded_attention(*qkv, *self._task_kv, attn_mask=mask(joined), **options))
        if rest:
            qkv = (part(tensor, rest) for tensor in (query, key, value))
            none = key.new_empty(len(rest), key.shape[1], 0, key.shape[-1])
            none_value = value.new_empty(len(rest), value.shape[1], 0, value.shape[-1])
            out.append(dtme_kernels.expanded_attention(*qkv, none, none_value, attn_mask=mask(rest), **options))
        if len(out) == 1:
            return out[0].flatten(0, 1)
        order = [*joined, *rest]
        return torch.cat(out)[[order.index(i) for i in range(num_streams)]].flatten(0, 1)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.seam == "transformers":  # unpickled where nothing was expanded yet
            seams.register_transformers()


class TaskBuffers(nn.Module):
    """Buffers by task, as ``nn.ParameterDict`` is for parameters."""

    def __init__(self, buffers: Mapping[str, Tensor]) -> None:
        super().__init__()
        for task, buffer in buffers.items():
            self.register_buffer(task, buffer)

    def __getitem__(self, task: str) -> Tensor:
        return self.get_buffer(task)
