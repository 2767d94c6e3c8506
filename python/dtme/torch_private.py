"""Every private name of torch that this package uses, with what it is used for: one place to look after an upgrade."""

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
