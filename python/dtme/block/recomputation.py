"""Find a block's run again where activation checkpointing runs the block, or a part of it, during the backward pass.

The forward is over then, and the backward pass may be in another thread. What is left of it is the tensor that entered
the checkpointed part: it, or a view of its memory, enters again. So every tensor on its way into a block, its norm or
its attention is remembered by where it lies, for as long as its memory is held by somebody.
"""

import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..streams import Run
from ..torch_private import graph_task, saved_tensors_hooks

Key = tuple[int, int, tuple[int, ...]]

_known: dict[Key, tuple[StorageWeakRef, Run | None]] = {}
_lock = threading.Lock()
_PURGE_EVERY = 512
_inserted = 0


class _Last(threading.local):
    """The run that was found last in this thread, and in which backward pass."""

    graph: int = -1
    adapter: int = 0
    run: Run | None = None


_last = _Last()


def remember(adapter: nn.Module, tokens: Tensor, run: Run) -> None:
    """``tokens`` enter a block, or a part of it, in ``run``. Two different runs on one tensor make it ambiguous."""
    global _inserted
    if run.forward.probes or not _may_run_again(adapter.training):
        if _known and _is_plain(tokens):  # what was known of this tensor is no longer its last run
            with _lock:
                _known.pop(_key(adapter, tokens), None)
        return
    if not _is_plain(tokens):
        return
    key = _key(adapter, tokens)
    with _lock:
        _inserted += 1
        if _inserted % _PURGE_EVERY == 0:
            for dead in [key for key, (storage, _) in _known.items() if storage.expired()]:
                del _known[dead]
        storage, known = _known.get(key, (None, run))
        if storage is None or storage.expired() or _same(known, run):
            _known[key] = StorageWeakRef(tokens.untyped_storage()), run
        else:
            _known[key] = storage, None


def _may_run_again(training: bool) -> bool:
    """Whether this may be in a checkpointed part: one kind saves tensors in its own way, the other none at all."""
    if torch.is_inference_mode_enabled():
        return False
    return saved_tensors_hooks() is not None if torch.is_grad_enabled() else training


def recall(adapter: Any, tokens: Tensor) -> Run | None:
    """The run that ``tokens`` entered, if it is known for certain: by their memory, or as the one behind the last."""
    run = None
    if _is_plain(tokens):
        with _lock:
            storage, run = _known.get(_key(adapter, tokens), (None, None))
        if storage is not None and storage.expired():
            run = None
    if run is None and _last.graph == graph_task() and _last.run is not None:
        behind = _last.run.next
        run = behind if behind is not None and behind.block == adapter.name else None
    if run is not None:
        _last.graph, _last.adapter, _last.run = graph_task(), id(adapter), run
    return run


def last_run(adapter: object) -> Run | None:
    """The run that was found last, if it is one of ``adapter`` and of this backward pass: a part of a block goes on."""
    return _last.run if _last.graph == graph_task() and _last.adapter == id(adapter) else None


def _same(a: Run | None, b: Run) -> bool:
    return (
        a is not None and a.before == b.before and a.after == b.after and a.forward.task_index is b.forward.task_index
    )


def _is_plain(tokens: Tensor) -> bool:
    return tokens.layout == torch.strided and not tokens.is_meta and type(tokens) in (Tensor, nn.Parameter)


def _key(adapter: object, tokens: Tensor) -> Key:
    return id(adapter), tokens.data_ptr(), tuple(tokens.shape)
