"""What ``expand`` hangs on a block: its tasks' modulation and tokens, as the child module ``<block>.dtme``."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import dtme_kernels

from ..blocks import Arguments, channels_last, find_tokens, replace_argument
from ..caches import with_cache
from ..choices import chosen_for_part
from ..expanded import Expansion
from ..layouts import Layout, apart, repeat_rows, together, unfold
from ..pickles import Stamped
from ..seams import KeysValues
from ..sharded import refuse_sequence_parallel
from ..streams import Forward, Run, hide, running, show
from ..torch_private import recomputing
from ..trees import map_tensors
from . import feeds, recomputation
from .arguments import follow
from .attention import JoinedStreams, OwnTokens, attend, attend_concatenated
from .first_half import FirstHalf, PlainNorm
from .probe import probe
from .site import Site
from .statistics import check_statistics
from .task_buffers import TaskBuffers, batch_norm
from .watch import Watched, check_whole, watch

ADDED = ".dtme."
"""What the name of every added parameter holds, and no other name."""


def is_added(name: str) -> bool:
    """Whether ``expand`` added the parameter of this name."""
    return ADDED in name


class BlockAdapter(Stamped, nn.Module):
    """Modulation and task tokens of one block; a block without either keeps the streams of earlier ones apart.

    Parameters are named ``weight.<owner>`` (p,), ``bias.<owner>`` (p,), ``tokens.<owner>`` (t, p) and, where not all
    that tokens change takes effect, ``gate.<owner>`` (), the share that does: one for each task or group, so that an
    optimizer never moves those of a task that did not run. Everything hangs on bound methods, which deepcopy and pickle
    carry along; a block or an attention is held in no module, or it would become a child. A forward leaves nothing
    here: its state is the ``Forward`` of the thread that runs it.

    Args:
        name: the block's name, for messages.
        expansion: what all adapters of one ``expand`` share.
        num_features: p, where the block has modules of its own.
    """

    def __init__(self, name: str, block: nn.Module, expansion: Expansion, num_features: int | None = None) -> None:
        super().__init__()
        self.is_dtme_adapter = True
        self.name, self.expansion, self.num_features = name, expansion, num_features
        self.own_tasks: dict[str, str] = {}
        """Who owns the modules of each task that this block treats in a way of its own: the task, or its group."""
        self.weight, self.bias = nn.ParameterDict(), nn.ParameterDict()
        self.tokens, self.gate = nn.ParameterDict(), nn.ParameterDict()
        self.running_mean: TaskBuffers | None = None  # of the batch-norm modulator
        self.running_var: TaskBuffers | None = None
        self.site: Site | None = None
        self.plain_norm: PlainNorm | None = None
        self._block = (block,)
        self._watched: list[Watched] = []
        self._handles = [
            block.register_forward_pre_hook(self.enter, with_kwargs=True),
            block.register_forward_hook(self.leave, always_call=True),
        ]

    # --- set up and taken down ------------------------------------------------------------------------------------

    def add_modulation(self, tasks: tuple[str, ...], like: Tensor, modulator: str) -> None:
        """W = 1, b = 0: the identity, until trained (batch norm normalises from the start: Table 11)."""
        for owner in (owners := self._own(tasks)):
            self.weight[owner] = nn.Parameter(torch.ones_like(like))
            self.bias[owner] = nn.Parameter(torch.zeros_like(like))
        if tasks and modulator == "batch_norm":
            wide = like.to(torch.promote_types(like.dtype, torch.float32))
            self.running_mean = TaskBuffers({owner: torch.zeros_like(wide) for owner in owners})
            self.running_var = TaskBuffers({owner: torch.ones_like(wide) for owner in owners})

    def add_tokens(self, tasks: tuple[str, ...], num_tokens: int, like: Tensor, site: Site) -> None:
        """Without a position; ``handover.draw_tokens`` gives them their values."""
        for owner in self._own(tasks):
            self.tokens[owner] = nn.Parameter(torch.zeros_like(like.expand(num_tokens, -1)))
        self.site = site
        # the block's own tokens reach the norm or, without one, the attention
        entrance = site.norm or site.seam.attention
        self._handles.append(entrance.register_forward_pre_hook(self.remember, with_kwargs=True))
        if site.norm is not None:
            self._handles.append(site.norm.register_forward_hook(self.note_norm))
        site.seam.install(self.attention_forward)
        self.plain_norm = PlainNorm.of(site)
        if self.plain_norm is not None:
            self.plain_norm.norm.forward = self.norm_forward
        self._watched = watch(self._block[0], {"attention": site.seam.attention, "norm of the attention": site.norm})
        site.seam.check_hooks()  # refused now, not in the first forward

    def _own(self, tasks: tuple[str, ...]) -> tuple[str, ...]:
        """The owners of the modules that ``tasks`` get here, each once."""
        self.own_tasks |= {task: self.expansion.owner_of[task] for task in tasks}
        return tuple(dict.fromkeys([self.own_tasks[task] for task in tasks]))

    def _owners(self, layout: Layout) -> list[str]:
        """For every stream, who owns the modules that its tasks have here; "" where they have none."""
        return [self.own_tasks.get(task, "") for task, *_ in layout.streams]

    def remove(self) -> None:
        """Leave the block as it was found."""
        for handle in self._handles:
            handle.remove()
        if self.site is not None:
            self.site.seam.remove()
        if self.plain_norm is not None:
            del self.plain_norm.norm.forward
        if self._block[0]._modules.get("dtme") is self:
            del self._block[0].dtme

    # --- which run this is ----------------------------------------------------------------------------------------

    def _enter(self, tokens: Tensor) -> Run:
        """The run of this block that begins with ``tokens``."""
        if recomputing():
            if (run := recomputation.recall(self, tokens)) is None:
                raise self._lost()
            self._open(run)
            return run
        forward = running(self.expansion)
        if forward is not None and forward.closes_at is not None:
            hide(forward)  # the block that should have closed it was interrupted
            forward = running(self.expansion)
        forward = forward or self._called_alone()
        run = forward.run_block(forward.key(self.expansion, self.name), self.name, tokens, self.own_tasks)
        self._keep(tokens, run)
        return run

    def _called_alone(self) -> Forward:
        """The forward of a block that somebody calls by itself; it ends with the block."""
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break()  # the forward that runs is not known to the compiler: go on without it
        # a block without modules of its own does the same for all tasks
        names = chosen_for_part(self.expansion, self.name) if self.own_tasks else self.expansion.tasks[:1]
        forward = Forward((self.expansion,))
        forward.start(together(names))
        forward.learns = True
        forward.closes_at = self.name
        show(forward)
        return forward

    def _open(self, run: Run) -> None:
        """A forward around a block that checkpointing runs again."""
        forward = Forward((self.expansion,))
        forward.start(run.after)
        forward.runs[self.name] = run  # the only expansion of this forward
        forward.closes_at = self.name
        show(forward)

    def _run_in_progress(self) -> Run | None:
        forward = running(self.expansion)
        return None if forward is None else forward.runs.get(forward.key(self.expansion, self.name))

    def _run_with(self, tokens: Tensor | None) -> Run:
        """The run of this block that is in progress, whose attention reads ``tokens``."""
        run = self._run_in_progress()
        if run is None and recomputing():
            run = (None if tokens is None else recomputation.recall(self, tokens)) or recomputation.last_run(self)
        if run is None:
            raise self._lost()
        if tokens is not None and not recomputing():
            self._keep(tokens, run)
        return run

    def _lost(self) -> RuntimeError:
        return RuntimeError(
            f"block {self.name!r}, or a part of it, is run by itself, or again by activation checkpointing on other "
            "tensors than before: which tasks it is for is not known. Call the whole block, and checkpoint whole "
            "blocks; where one tensor goes in for different tasks before the backward pass, give each call a copy"
        )

    def _keep(self, tokens: Tensor, run: Run) -> None:
        if not torch.compiler.is_compiling():
            recomputation.remember(self, tokens, run)

    # --- the block's input: streams and modulation ----------------------------------------------------------------

    def enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """Split the streams that part here, modulate, and repeat what else comes by image (a mask, say)."""
        where, tokens = find_tokens(args, kwargs, self.name)
        last = tokens if self.num_features is None else channels_last(block, self.name, tokens, self.num_features)
        is_whole = block is self._block[0] and block._modules.get("dtme") is self
        check_whole(self.name, is_whole, (self.weight, self.bias, self.tokens, self.gate), self._watched)
        if self.own_tasks and not torch.compiler.is_compiling():
            refuse_sequence_parallel(self.name, block)
        run = self._enter(tokens)
        others = [value for value in (*args, *kwargs.values()) if value is not tokens]
        plain = tokens.ndim == 3 and not any(isinstance(value, Tensor) or value for value in others)
        modulated = any(x in self.weight for x in self._owners(run.after)) or run.forward.task_index is not None
        if plain and (half := self._first_half(run, tokens)) is not None:
            run.half, changed = half, half.modulated
        else:
            run.half = None
            changed = self.modulate(run, last) if modulated and self.weight else run.repeat(last)
            changed = changed if last is tokens else changed.movedim(-1, 1)
        if not recomputing() and self.site is not None:
            self._keep(changed, run)
            feeds.note(run, changed, self.training)
        if run.after.num_streams > 1 and not run.after.by_row:
            args, kwargs = follow(block, run, tokens.shape[0], where, args, kwargs)
        return replace_argument(args, kwargs, where, changed)

    def modulate(self, run: Run, tokens: Tensor) -> Tensor:
        """(T_before * B, ..., p) → (T_after * B, ..., p); a stream without a map of its own keeps its bits."""
        if self.running_mean is not None and not run.forward.probes:
            return self._batch_norm(run.after, run.repeat(tokens))
        streams, weight, bias = self._maps(run, tokens)
        return dtme_kernels.modulate(streams, weight, bias).flatten(0, 1).view(-1, *tokens.shape[1:])

    def _maps(self, run: Run, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, shared (B, N, p) or in streams (T, B, N, p), and every stream's map (T, p)."""
        one = zero = None
        if run.forward.task_index is not None or any(x not in self.weight for x in self._owners(run.after)):
            some = next(iter(self.weight.values()), None)
            one = tokens.new_ones(tokens.shape[-1]) if some is None else torch.ones_like(some)
            zero = torch.zeros_like(one)
        weight, bias = self._of_streams(run, self.weight, one), self._of_streams(run, self.bias, zero)
        # whatever lies between the batch and the channels is one token axis
        if run.before.num_streams == 1:
            return tokens.flatten(1, -2), weight, bias
        return unfold(run.repeat(tokens).flatten(1, -2), run.after.num_streams), weight, bias

    def _of_streams(self, run: Run, parameters: nn.ParameterDict, default: Tensor | None = None) -> Tensor:
        """A row for every stream: its owner's parameter; without a ``default``, only of streams that have one."""
        index = run.forward.task_index
        owners = self._owners(run.after) if index is None else self.expansion.owners
        owners = [owner for owner in owners if default is not None or owner in parameters]
        take = partial(probe, self.name) if run.forward.probes else nn.ParameterDict.get
        found: list[Any] = [take(parameters, owner, default) for owner in owners]
        rows = torch.stack(found) if len(found) > 1 else found[0].unsqueeze(0)  # a view, for steps of one token
        return rows if index is None else rows.index_select(0, index)

    def _normalised_together(self, layout: Layout) -> list[tuple[str, list[int]]]:
        """Owners of maps, and the streams whose statistics are taken together: all rows of a task, as alone."""
        owners = self._owners(layout)
        parts: dict[Any, list[int]] = {}
        for i, tasks in enumerate(layout.streams):
            parts.setdefault(tasks if layout.by_row else i, []).append(i)
        return [(owners[some[0]], some) for some in parts.values() if owners[some[0]] in self.weight]

    def _batch_norm(self, layout: Layout, tokens: Tensor) -> Tensor:
        assert self.running_mean is not None and self.running_var is not None
        streams = list(unfold(tokens, layout.num_streams).unbind(0))
        for owner, some in self._normalised_together(layout):
            running = self.running_mean[owner], self.running_var[owner]
            rows = torch.stack([streams[i] for i in some]) if len(some) > 1 else streams[some[0]][None]
            found = batch_norm(rows, self.weight[owner], self.bias[owner], *running, self.training)
            for i, stream in zip(some, found.unbind(0), strict=True):
                streams[i] = stream
        return torch.cat(streams)

    # --- the first half of a plain block, at once -----------------------------------------------------------------

    def _first_half(self, run: Run, tokens: Tensor) -> FirstHalf | None:
        """The first half of a plain pre-norm block where it can be run at once: every stream has task tokens."""
        if self.plain_norm is None or self.running_mean is not None:
            return None
        if self._joined(run) != list(range(run.after.num_streams)) or self._gates(run):
            return None
        if run.forward.task_index is not None and len(self.tokens) < len(self.expansion.owners):
            return None
        projection = self.plain_norm.projection(self._block[0])
        if projection is None:
            return None
        return self.plain_norm.run(projection, *self._maps(run, tokens), self._of_streams(run, self.tokens))

    def norm_forward(self, tokens: Tensor) -> Tensor:
        """Stands in for the forward of the norm before the attention, which may be done already."""
        assert self.plain_norm is not None
        run = self._run_in_progress()
        if run is not None and run.half is not None and run.half.is_of(tokens):
            return run.half.normalized
        return type(self.plain_norm.norm).forward(self.plain_norm.norm, tokens)

    # --- the block's attention: task keys and values --------------------------------------------------------------

    def attention_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the attention's own forward."""
        assert self.site is not None
        run = self._run_with(next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None))
        if self.site.is_direct:
            feeds.check(self.name, run, (*args, *kwargs.values()), self.training)
        half, run.half = run.half, None
        alone = not any(isinstance(value, Tensor) or value for value in (*args[1:], *kwargs.values()))
        if half is not None and alone and args and half.is_of_norm(args[0]):
            return half.finish(half.attended)
        return self.site.seam.run(self._attend(run, args, kwargs), *args, **kwargs)

    def note_norm(self, module: nn.Module, args: Any, output: Any) -> None:
        """What the norm before the attention has just put out."""
        run = None if torch.compiler.is_compiling() else self._run_in_progress()
        if run is not None and isinstance(output, Tensor):
            feeds.note(run, output, self.training)

    def _attend(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert self.site is not None
        seam = self.site.seam
        own = OwnTokens(self.name, seam.is_square, seam.cached_sizes(args, kwargs))
        joined = self._joined(run)
        key = (self.name, *self._owners(run.after))
        cached = None if run.forward.probes else own.cached  # a copy of a cache remembers the real ones
        task_kv = with_cache(cached, key, partial(self.task_keys_values, run)) if joined else None
        owners, index = self.expansion.owners, run.forward.task_index
        if index is not None and len(self.tokens) < len(owners) and task_kv is not None:
            has = torch.tensor([owner in self.tokens for owner in owners], device=index.device)
            return partial(attend_concatenated, has.index_select(0, index), task_kv, self._gates(run).get(0), own)
        rows = None if run.forward.num_rows is None else run.forward.num_rows * run.after.num_streams
        streams = JoinedStreams(self.name, run.after.num_streams, joined, task_kv, self._gates(run))
        return partial(attend, streams, rows, own)

    def _gates(self, run: Run) -> dict[int, Tensor]:
        """() each, of streams whose task tokens have one."""
        if not self.gate:
            return {}
        gates = self._of_streams(run, self.gate, torch.ones_like(next(iter(self.gate.values()))))
        any_task = run.forward.task_index is not None
        return {i: gates[i] for i, owner in enumerate(self._owners(run.after)) if any_task or owner in self.gate}

    def _joined(self, run: Run) -> list[int]:
        """Streams that have task tokens in this block."""
        if run.forward.task_index is not None:
            return [0] if self.tokens else []
        return [i for i, owner in enumerate(self._owners(run.after)) if owner in self.tokens]

    def task_keys_values(self, run: Run) -> KeysValues:
        """Keys and values of the task tokens, (T, H, t, d) each: once per step, not once per image."""
        if run.forward.task_index is not None:
            some = next(iter(self.tokens.values()))
            return self.project(self._of_streams(run, self.tokens, torch.zeros_like(some)))
        return self.project(self._of_streams(run, self.tokens))

    def project(self, tokens: Tensor) -> KeysValues:
        assert self.site is not None
        norm, attention = self.site.norm, self.site.seam.attention
        check_statistics(self.name, [attention] if norm is None else [norm, attention], self.site.learning)
        return self.site.seam.keys_values(tokens if norm is None else norm(tokens))

    def remember(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The block's tokens reach its norm: a part from here on may be run again without the hook before the block."""
        if torch.compiler.is_compiling():
            return
        try:
            tokens = find_tokens(args, kwargs, self.name)[1]
        except ValueError:  # called with something else than the block's tokens
            return
        if recomputing():
            recomputation.recall(self, tokens)
            return
        run = self._run_in_progress()
        if run is not None:
            self._keep(tokens, run)

    # --- the block's output ---------------------------------------------------------------------------------------

    def leave(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """End the forward of a block that was called by itself; its output is task-major over all its tasks."""
        if torch.compiler.is_compiling():
            return None
        forward = running(self.expansion)
        if forward is None or forward.closes_at != self.name:
            return None
        hide(forward)
        if output is None or recomputing():
            return None
        index = apart(forward.layout.tasks).sources(forward.layout)
        return map_tensors(lambda tensor: repeat_rows(tensor, index, forward.layout.num_streams), output)
