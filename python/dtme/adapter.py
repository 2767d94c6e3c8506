"""What ``expand`` hangs on a block: its tasks' modulation and tokens, as the child module ``<block>.dtme``."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dtme_kernels

from .attention import Site, is_layer_norm
from .blocks import Arguments, find_tokens, replace_argument
from .seams import KeysValues, NotExpandable, Projection, Seam, is_hooked
from .streams import Layout, Streams, layout, recomputing, repeat_rows, sources, unfold
from .trees import map_tensors


class BlockAdapter(nn.Module):
    """Modulation, task tokens and stream bookkeeping of one block.

    Parameters are named ``weight.<task>`` (p,), ``bias.<task>`` (p,) and ``tokens.<task>`` (t, p): one for each task,
    so that an optimizer never moves those of a task that did not run. Everything hangs on bound methods, which deepcopy
    and pickle carry along; a block or an attention is held in something that is no module, or it would become a child.

    Args:
        name: the block's name, for messages.
        streams: the state all adapters of a backbone share.
        previous: the adapter of the block before, None for the first.
    """

    def __init__(self, name: str, block: nn.Module, streams: Streams, previous: "BlockAdapter | None") -> None:
        super().__init__()
        self.name, self.streams = name, streams
        self.previous = previous.name if previous else None
        # the tasks that have a stream of their own before and after this block's modules
        self.separated_before: frozenset[str] = frozenset() if previous is None else previous.separated_after
        self.separated_after: frozenset[str] = self.separated_before
        self.weight, self.bias, self.tokens = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        self.running_mean: TaskBuffers | None = None  # of the batch-norm modulator
        self.running_var: TaskBuffers | None = None
        self.task_key: Tensor | None  # constants of an exported task
        self.task_value: Tensor | None
        self.register_buffer("task_key", None)
        self.register_buffer("task_value", None)
        self.seam: Seam | None = None
        self._site: Site | None = None
        self._block = (block,)
        self._handles = [block.register_forward_pre_hook(self.enter, with_kwargs=True)]
        self._projecting = False
        self._is_last = False
        self.selected: tuple[str, ...] = ()  # of the forward that runs
        self._layout: Layout = ()
        self._half: FirstHalf | None = None  # on its way from the block's input to its attention
        self._replaced_norm = False

    # --- set up and taken down ------------------------------------------------------------------------------------

    def add_modulation(self, tasks: tuple[str, ...], like: Tensor, modulator: str) -> None:
        """W = 1, b = 0: the identity, until trained (batch norm normalises from the start: Table 11)."""
        for task in tasks:
            self.weight[task] = nn.Parameter(torch.ones_like(like))
            self.bias[task] = nn.Parameter(torch.zeros_like(like))
        if tasks and modulator == "batch_norm":
            wide = like.to(torch.promote_types(like.dtype, torch.float32))
            self.running_mean = TaskBuffers({task: torch.zeros_like(wide) for task in tasks})
            self.running_var = TaskBuffers({task: torch.ones_like(wide) for task in tasks})
        self.separated_after |= frozenset(tasks)

    def add_tokens(self, tasks: tuple[str, ...], num_tokens: int, like: Tensor, site: Site) -> None:
        """Normal with std 0.02, without a position."""
        for task in tasks:
            self.tokens[task] = nn.Parameter(torch.randn_like(like.expand(num_tokens, -1)) * 0.02)
        self._site, self.seam = site, site.seam
        # the block's own tokens reach the norm or, without one, the attention
        self._handles.append(
            (site.norm or self.seam.attention).register_forward_pre_hook(self.remember, with_kwargs=True)
        )
        self.seam.install(self.attention_forward)
        if site.is_pre_norm and is_layer_norm(site.norm) and "forward" not in vars(site.norm):
            site.norm.forward = self.norm_forward  # type: ignore[union-attr]
            self._replaced_norm = True
        self.separated_after |= frozenset(tasks)
        self._layout = ((tasks[0],),)
        with torch.no_grad():  # what cannot be projected is refused now rather than in the first forward
            self.task_keys_values()

    def close(self) -> None:
        """Make this the last block: in its output every selected task has rows of its own."""
        self._handles.append(self._block[0].register_forward_hook(self.leave))
        self._is_last = True

    def remove(self) -> None:
        """Leave the block as it was found."""
        for handle in self._handles:
            handle.remove()
        if self.seam is not None:
            self.seam.remove()
        if self._site is not None and self._replaced_norm:
            del self._site.norm.forward  # type: ignore[union-attr]
        del self._block[0].dtme

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_half": None}  # an interrupted forward's

    def fold(self, task: str) -> None:
        """Keep one task only, its task keys and values as constants: what ``export_task`` ships."""
        if task in self.tokens:
            self._layout = ((task,),)
            with torch.no_grad():
                self.task_key, self.task_value = (tensor.clone() for tensor in self.task_keys_values())
        self.tokens = nn.ParameterDict()
        modulated = task in self.weight
        for name in ("weight", "bias"):
            setattr(self, name, nn.ParameterDict({task: getattr(self, name)[task]} if modulated else {}))
        if self.running_mean is not None and self.running_var is not None:
            self.running_mean = TaskBuffers({task: self.running_mean[task]}) if modulated else None
            self.running_var = TaskBuffers({task: self.running_var[task]}) if modulated else None

    # --- the block's input: streams and modulation ----------------------------------------------------------------

    def enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """Split the streams that part here, modulate, and repeat what else comes by image (a mask, say)."""
        where, tokens = find_tokens(args, kwargs, self.name)
        self.selected = self.streams.current(tokens, self.name)
        before, after = layout(self.selected, self.separated_before), layout(self.selected, self.separated_after)
        self._layout = after
        batch = tokens.shape[0] // len(before)
        if not recomputing():
            self.streams.follow(self.name, self.previous)
            if self.previous is None:
                self.streams.num_rows = batch
        index = sources(before, after)
        modulated = any(stream[0] in self.weight for stream in after)
        self._half = None
        others = [value for value in (*args, *kwargs.values()) if value is not tokens]
        plain = tokens.ndim == 3 and not any(isinstance(value, Tensor) or value for value in others)
        if plain and (projection := self._projection()):
            changed = self.first_half(projection, tokens, index, len(before))
        else:
            changed = (self.modulate if modulated else repeat_rows)(tokens, index, len(before))

        def by_image(tensor: Tensor) -> Tensor:
            # built for B images before the streams parted; two-dimensional floats are positions, not images
            flat = tensor.ndim == 2 and not tensor.is_floating_point()
            if tensor is tokens or tensor.shape[:1] != (batch,) or not (tensor.ndim >= 3 or flat):
                return tensor
            if flat and tensor.shape == (batch, tokens.shape[1]) and batch == tokens.shape[1] > 1:
                got = f"a {tuple(tensor.shape)} {tensor.dtype} tensor"
                raise ValueError(
                    f"block {self.name!r} got {got} with as many images as tokens: "
                    "it may be by image or not; give it four dimensions or another batch size"
                )
            return repeat_rows(tensor, [0] * len(after), 1)

        if len(after) > 1:
            args = map_tensors(by_image, args)
            kwargs = {name: map_tensors(by_image, value) for name, value in kwargs.items()}
        self.streams.mark(changed, self.selected)
        return replace_argument(args, kwargs, where, changed)

    def modulate(self, tokens: Tensor, index: list[int], num_streams: int) -> Tensor:
        """(T_before * B, ..., p) → (T_after * B, ..., p); a stream without a map of its own keeps its bits."""
        if self.running_mean is not None:
            return self._batch_norm(repeat_rows(tokens, index, num_streams))
        streams, weight, bias = self._maps(tokens, index, num_streams)
        return dtme_kernels.modulate(streams, weight, bias).flatten(0, 1).view(-1, *tokens.shape[1:])

    def _maps(self, tokens: Tensor, index: list[int], num_streams: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, shared (B, N, p) or in streams (T, B, N, p), and every stream's map (T, p)."""
        one = (
            tokens.new_ones(tokens.shape[-1]) if not self.weight else torch.ones_like(next(iter(self.weight.values())))
        )
        names = [stream[0] for stream in self._layout]
        weight = torch.stack([self.weight.get(task, one) for task in names])
        bias = torch.stack([self.bias.get(task, torch.zeros_like(one)) for task in names])
        # whatever lies between the batch and the channels is one token axis
        if num_streams == 1:
            return tokens.flatten(1, -2), weight, bias
        return unfold(repeat_rows(tokens, index, num_streams).flatten(1, -2), len(index)), weight, bias

    # --- the first half of a plain block, at once -----------------------------------------------------------------

    def _projection(self) -> Projection | None:
        """What this forward's first half can be run with at once, where the block is a plain pre-norm one.

        That is: its norm is a layer norm of the block's own tokens, its attention nothing but projections, every stream
        has task tokens, and nobody is looking in between: a hook may want the gradients of all that the block does
        with its input, and transformers' checkpointing runs the block again from there.
        """
        site = self._site
        if site is None or not self._replaced_norm or self.running_mean is not None or self.task_key is not None:
            return None
        block = self._block[0]
        alone = not is_hooked(block, 1, own_after=self._is_last) and not getattr(block, "gradient_checkpointing", False)
        if not alone or len(self._joined()) < len(self._layout):
            return None
        norm: Any = site.norm
        watched = is_hooked(norm, 1) or is_hooked(site.seam.attention)
        return None if watched else site.seam.projection()

    def first_half(self, projection: Projection, tokens: Tensor, index: list[int], num_streams: int) -> Tensor:
        """The modulated tokens; what their norm and the attention will return waits until they are called."""
        assert self._site is not None
        norm: Any = self._site.norm
        streams, weight, bias = self._maps(tokens, index, num_streams)
        attended, modulated, normalized = dtme_kernels.modulate_concat_attention(
            streams,
            weight,
            bias,
            torch.stack([self.tokens[task] for task, *_ in self._layout]),
            norm_weight=norm.weight,
            norm_bias=norm.bias,
            qkv_weight=projection.weight,
            qkv_bias=projection.bias,
            num_heads=projection.num_heads,
            eps=norm.eps,
            scale=projection.scale,
            return_normalized=True,
        )
        modulated, normalized, attended = (x.flatten(0, 1) for x in (modulated, normalized, attended))
        self._half = FirstHalf(modulated, normalized, attended, projection.finish, context())
        return self._half.modulated

    def norm_forward(self, tokens: Tensor) -> Tensor:
        """Stands in for the forward of the norm before the attention, which may be done already."""
        assert self._site is not None
        norm: Any = self._site.norm
        half = self._half
        if half is not None and tokens is half.modulated and half.context == context():
            return half.normalized
        return type(norm).forward(norm, tokens)

    def _batch_norm(self, tokens: Tensor) -> Tensor:
        assert self.running_mean is not None and self.running_var is not None
        streams = list(unfold(tokens, len(self._layout)).unbind(0))
        for i, (task, *_) in enumerate(self._layout):
            if task in self.weight:
                running = self.running_mean[task], self.running_var[task]
                # statistics, and so everything, in the running ones' float32 or better
                rows, weight, bias = (x.to(running[0].dtype) for x in (streams[i], self.weight[task], self.bias[task]))
                rows = F.batch_norm(rows.flatten(0, -2), *running, weight, bias, self.training)
                streams[i] = rows.view(streams[i].shape).to(tokens.dtype)
        return torch.cat(streams)

    def remember(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find the streams again where checkpointing recomputes a block's forward, but not the hook before it."""
        if recomputing() and not self._projecting:
            tokens = find_tokens(args, kwargs, self.name)[1]
            self._layout = layout(self.streams.current(tokens, self.name), self.separated_after)

    def leave(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Tasks that still share a stream get a copy each: an output is task-major over all selected tasks."""
        self.streams.last = None
        if len(self._layout) == len(self.selected):
            return output
        index = sources(self._layout, tuple((task,) for task in self.selected))
        return map_tensors(lambda tensor: repeat_rows(tensor, index, len(self._layout)), output)

    # --- the block's attention: task keys and values --------------------------------------------------------------

    def attention_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the attention's own forward."""
        assert self.seam is not None
        half, self._half = self._half, None
        alone = not any(isinstance(value, Tensor) or value for value in (*args[1:], *kwargs.values()))
        if half is not None and alone and args and args[0] is half.normalized and half.context == context():
            return half.finish(half.attended)
        task_kv = self.task_keys_values() if self._joined() else None
        return self.seam.run(partial(self.attend, task_kv), *args, **kwargs)

    def _joined(self) -> list[int]:
        """Streams that have task tokens in this block."""
        return [i for i, (task, *_) in enumerate(self._layout) if task in self.tokens or self.task_key is not None]

    def task_keys_values(self) -> KeysValues:
        """Keys and values of the task tokens, (T, H, t, d) each: once per step, not once per image."""
        if self.task_key is not None and self.task_value is not None:
            return self.task_key, self.task_value
        assert self._site is not None
        tokens = torch.stack([self.tokens[self._layout[i][0]] for i in self._joined()])
        self._projecting = True
        try:
            normed = tokens if self._site.norm is None else self._site.norm(tokens)
            return self._site.seam.keys_values(normed)
        finally:
            self._projecting = False

    def attend(
        self,
        task_kv: KeysValues | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """``scaled_dot_product_attention`` over (T * B, H, N, d), every stream's task keys joined to its own."""
        num_streams, joined = len(self._layout), self._joined()
        if query.shape[-2] != key.shape[-2] or query.shape[0] % num_streams:
            raise NotExpandable(f"block {self.name!r}: its attention is not over its own tokens")
        if attn_mask is not None and attn_mask.ndim < 4:
            attn_mask = attn_mask[(None,) * (4 - attn_mask.ndim)]

        def part(tensor: Tensor, streams: list[int]) -> Tensor:
            if tensor.shape[0] == 1:  # a mask shared by all rows
                return tensor.unsqueeze(0)
            tensor = unfold(tensor, num_streams)
            return tensor if len(streams) == num_streams else tensor[streams]

        def run(streams: list[int], task_kv: KeysValues) -> Tensor:
            mask = None if attn_mask is None else part(attn_mask, streams)
            q, k, v = (part(tensor, streams) for tensor in (query, key, value))
            options = {"attn_mask": mask, "is_causal": is_causal, "dropout_p": dropout_p, "scale": scale}
            return dtme_kernels.expanded_attention(q, k, v, task_kv[0], task_kv[1], **options)  # type: ignore[arg-type]

        if task_kv is not None and len(joined) == num_streams:
            return run(joined, task_kv).flatten(0, 1)
        rest = [i for i in range(num_streams) if i not in joined]
        none = tuple(tensor.new_empty(len(rest), tensor.shape[1], 0, tensor.shape[-1]) for tensor in (key, value))
        plain = run(rest, none)  # type: ignore[arg-type]
        if task_kv is None:
            return plain.flatten(0, 1)
        order = [*joined, *rest]
        return torch.cat([run(joined, task_kv), plain])[[order.index(i) for i in range(num_streams)]].flatten(0, 1)


class FirstHalf(NamedTuple):
    """What a plain block's first half makes of its input, (T * B, N, p) each."""

    modulated: Tensor
    normalized: Tensor
    attended: Tensor
    finish: Callable[[Tensor], Any]
    """What the attention makes of ``attended``."""
    context: tuple[Any, ...]


def context() -> tuple[Any, ...]:
    """Whether gradients are wanted, and who saves tensors for them: what checkpointing a part of a block changes.

    A part that is run again must have been run, not found done.
    """
    if torch.compiler.is_compiling():
        return ()
    return torch.is_grad_enabled(), torch._C._autograd._top_saved_tensors_default_hooks(True)


class TaskBuffers(nn.Module):
    """Buffers by task, as ``nn.ParameterDict`` is for parameters."""

    def __init__(self, buffers: Mapping[str, Tensor]) -> None:
        super().__init__()
        for task, buffer in buffers.items():
            self.register_buffer(task, buffer)

    def __getitem__(self, task: str) -> Tensor:
        return self.get_buffer(task)
