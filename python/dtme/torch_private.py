"""Every private name of torch that this package uses, with what it is used for: one place to look after an upgrade."""

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch._C._dynamo.eval_frame as _frames
from torch import nn
from torch.nn.utils.spectral_norm import SpectralNorm


def graph_task() -> int:
    """A number for the backward pass that runs in this thread now, -1 outside of one."""
    return torch._C._current_graph_task_id()


def recomputing() -> bool:
    """Whether this forward runs inside a backward pass, as activation checkpointing does."""
    return not torch.compiler.is_compiling() and graph_task() != -1


def saved_tensors_hooks() -> Any:
    """Who saves tensors for the backward pass in this thread: another object inside of a checkpointed part."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def is_compiled(module: nn.Module) -> bool:
    """Whether ``module.compile()`` was called, or it is what ``torch.compile(module)`` returns."""
    return module._compiled_call_impl is not None or "_orig_mod" in module._modules


def stay_eager(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let ``torch.compile`` begin not at ``function`` but at what it calls; inlined, it is traced as any other.

    ``torch.compiler.disable`` would break the graph of whoever compiles more than ``function``.
    """
    strategy = _frames._FrameExecStrategy(_frames._FrameAction.SKIP, _frames._FrameAction.DEFAULT)
    _frames.set_code_exec_strategy(function.__code__, strategy)
    return function


@stay_eager
def calls_compiler() -> bool:
    """Whether the functions that are called from here are handed to ``torch.compile``."""
    return callable(_frames.get_eval_frame_callback())


@stay_eager
def eagerly(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``, nothing of which ``torch.compile`` sees; not for traced code."""
    callback = _frames.set_eval_frame(None)
    try:
        return function(*args)
    finally:
        _frames.set_eval_frame(callback)


def takes_statistics(module: nn.Module) -> bool:
    """Whether ``module`` computes with statistics of the batch that it is given, as it is now."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or not module.track_running_stats)


def iterates(module: nn.Module) -> bool:
    """Whether ``module`` is a spectral norm, old or new, that takes a step of its power iteration whenever it runs."""
    hooks = module._forward_pre_hooks.values()
    is_spectral_norm = isinstance(module, nn.utils.parametrizations._SpectralNorm)
    return module.training and (is_spectral_norm or any(isinstance(hook, SpectralNorm) for hook in hooks))


def num_hooks(module: nn.Module) -> tuple[int, int, bool]:
    """Forward hooks before and after ``module``, and whether it has any backward hook."""
    backward = bool(module._backward_hooks or module._backward_pre_hooks)
    return len(module._forward_pre_hooks), len(module._forward_hooks), backward


def fsdp_mesh(module: nn.Module) -> Any:
    """The mesh of processes among which FSDP2 shares what ``module``, or a part of it, holds; None where none does.

    It is asked in the middle of a forward, when parameters are gathered and do not tell.
    """
    for part in fsdp_modules(module):
        state = part._get_fsdp_state()  # type: ignore[operator]
        groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # torch 2.10 has one
        for group in groups:
            if group is not None:
                return group.mesh_info.mesh
    return None


def fsdp_modules(module: nn.Module) -> list[nn.Module]:
    """Those that ``fully_shard`` was called with."""
    loaded = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(loaded, "FSDPModule", None)
    return [] if kind is None else [part for part in module.modules() if isinstance(part, kind)]


def is_outside_fsdp(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was called with ``module``, and its forward does not run now."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    if kind is None or not isinstance(module, kind):
        return False
    return bool(module._get_fsdp_state()._training_state.name != "FORWARD")


def class_before_fsdp(module: nn.Module) -> type[nn.Module]:
    """Of one that ``fully_shard`` was called with."""
    cls = type(module)
    return cls.__mro__[getattr(cls, "_orig_cls_mro_index", 2)]


def is_of_fsdp(hook: Any) -> bool:
    """Whether FSDP2 hung ``hook`` on a module."""
    while hook is not None:
        names = type(getattr(hook, "__self__", None)).__name__, getattr(hook, "__qualname__", "").split(".")[0]
        if any(name in ("FSDPState", "FSDPParamGroup", "FSDPParam") for name in names):
            return True
        hook = getattr(hook, "__wrapped__", None) or getattr(
            hook, "hook", None
        )  # copies of wrapped ones have that alone
    return False


def is_note_of_fsdp(attribute: str) -> bool:
    """Whether FSDP2 keeps its state under this attribute of a module."""
    from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY

    return attribute in (REGISTRY_KEY, STATE_KEY, "_is_fsdp_managed_module", "_fsdp_use_orig_params")


def ddp_in_forward() -> Any:
    """The DistributedDataParallel whose forward runs now; None where none does."""
    return nn.parallel.DistributedDataParallel._get_active_ddp_module()


def has_reduced(ddp: Any) -> bool:
    """Whether a DistributedDataParallel has averaged all gradients of the last backward pass."""
    try:
        ddp.reducer._check_reducer_finalized()
    except RuntimeError:
        return False
    return True


def after_backward(function: Callable[[], Any]) -> None:
    """Call ``function`` at the end of the backward pass that runs in this thread now."""
    torch.autograd.Variable._execution_engine.queue_callback(function)
