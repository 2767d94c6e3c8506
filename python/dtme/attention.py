"""Three ways into a block's attention, so that task keys and values reach it without a token being concatenated.

Each seam answers the same two questions: which keys and values does this attention make of given tokens, and how is it
run with more of them? The attention keeps its own projections, norms and masks; only its inner product is replaced.

* ``transformers``: the library's attention interface, set on the one attention module.
* ``timm``: the common ``Attention`` of timm, written out.
* ``generic``: any attention that calls ``scaled_dot_product_attention`` exactly once, caught while it does.
"""

import copy
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .blocks import find_tokens

KeysValues = tuple[Tensor, Tensor]
"""(T, H, t, d) each: T streams, H heads, t task tokens of d channels."""
Attend = Callable[..., Tensor]
"""query, key, value (rows, H, N, d), attn_mask, is_causal, dropout_p, scale → (rows, H, N, d)."""

Site = tuple[nn.Module, nn.Module | None, str]
"""A block's attention, the norm that feeds it (None: it reads the block's tokens), and its seam."""


class NotExpandable(ValueError):
    """A block that task tokens cannot be added to correctly; says why."""


def seam_of(module: nn.Module) -> str | None:
    """The seam that fits ``module`` itself (not a child of it), or None."""
    if "forward" in vars(module):
        return None  # somebody else has replaced it: nothing is known about what runs
    forward = inspect.unwrap(type(module).forward)
    names = getattr(getattr(forward, "__code__", None), "co_names", ())
    if "ALL_ATTENTION_FUNCTIONS" in names and hasattr(module, "config"):
        return "transformers"
    if type(module).__module__.startswith("timm.") and type(module).__name__ == "Attention" and hasattr(module, "qkv"):
        return "timm"
    return "generic" if "scaled_dot_product_attention" in names else None


def four_dimensional(mask: Tensor) -> Tensor:
    """An attention mask broadcast from the right, (..., N, S), as (1 or rows, 1 or H, N, S)."""
    return mask[(None,) * (4 - mask.ndim)] if mask.ndim < 4 else mask


class _Reached(Exception):
    """Stops a probing call once the attention's input is known."""


def find_attention(name: str, block: nn.Module, num_features: int) -> Site:
    """The one attention of ``block`` and what feeds it.

    The block is called on zeros up to its attention. Whatever tensor arrives there must be the very tokens that went in, or
    the very output of one of the block's modules: anything in between could not be repeated for the task tokens.
    """
    found = [(module, seam) for module in block.modules() if (seam := seam_of(module))]
    if len(found) != 1:
        kinds = ", ".join(type(module).__name__ for module, _ in found) or "none"
        raise NotExpandable(
            f"block {name!r} ({type(block).__name__}) must hold one attention that task tokens can join, found {kinds}"
        )
    attention, seam = found[0]
    _check_implementation(name, attention, seam)
    parameter = next(p for p in block.parameters() if p.is_floating_point())
    tokens = torch.zeros(1, 2, num_features, dtype=parameter.dtype, device=parameter.device)
    outputs: dict[int, nn.Module] = {}
    arrived: list[Tensor] = []

    def remember(module: nn.Module, args: Any, output: Any) -> None:
        outputs[id(output)] = module
        kept.append(output)  # or its id could be given to another tensor

    def reach(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arrived.append(find_tokens(args, kwargs, name)[1])
        raise _Reached

    kept: list[Any] = []
    training = {module: module.training for module in block.modules()}
    hooks = [module.register_forward_hook(remember) for module in block.modules() if module is not attention]
    hooks.append(attention.register_forward_pre_hook(reach, with_kwargs=True))
    try:
        block.eval()
        with torch.no_grad():
            block(tokens)
    except _Reached:
        pass
    except Exception as error:
        raise NotExpandable(
            f"block {name!r} ({type(block).__name__}) could not be called on tokens alone: {error}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training.items():
            module.training = mode
    if not arrived:
        raise NotExpandable(f"block {name!r} ({type(block).__name__}) never called its attention")
    if arrived[0] is not tokens and id(arrived[0]) not in outputs:
        raise NotExpandable(
            f"block {name!r} ({type(block).__name__}): its attention does not read the block's (normalised) tokens directly"
        )
    return attention, outputs.get(id(arrived[0])) if arrived[0] is not tokens else None, seam


def _check_implementation(name: str, attention: nn.Module, seam: str) -> None:
    implementation = getattr(getattr(attention, "config", None), "_attn_implementation", None) or "eager"
    if seam == "transformers" and implementation not in ("eager", "sdpa"):
        raise NotExpandable(
            f"block {name!r} uses attn_implementation={implementation!r}, whose masks cannot be extended: load the model with attn_implementation='sdpa'"
        )


# --- transformers -------------------------------------------------------------------------------------------------


def install_transformers(attention: nn.Module) -> Any:
    """Point this one module at our attention function; returns its former config."""
    register_transformers()
    config = attention.config
    attention.config = copy.deepcopy(config)
    attention.config._attn_implementation = "dtme"
    return config


def register_transformers() -> None:
    sys.modules["transformers"].AttentionInterface.register("dtme", _transformers_attention)


# arguments of transformers' attention functions that change nothing in what is computed here
_HARMLESS = {"output_attentions", "output_hidden_states", "return_dict", "use_cache", "position_ids", "cache_position"}


def _transformers_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' contract: (rows, H, N, d) in, (rows, N, H, d) and the attention weights out."""
    attend: Attend = module.forward.__self__.attend  # type: ignore[union-attr]
    if unknown := [name for name, value in options.items() if value is not None and name not in _HARMLESS]:
        raise NotExpandable(
            f"{type(module).__name__} passes {unknown[0]!r} to its attention, which task tokens do not support"
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and attention_mask is None and query.shape[2] > 1
    output = attend(query, key, value, attn_mask=attention_mask, dropout_p=dropout, is_causal=causal, scale=scaling)
    return output.transpose(1, 2).contiguous(), None


def without_position(value: Any, num_tokens: int) -> Any:
    """The rotation (cos, sin) of every token → that of tokens without a position: none."""
    cos, sin = value
    shape = (*([1] * (cos.ndim - 2)), num_tokens, cos.shape[-1])
    return cos.new_ones(shape), sin.new_zeros(shape)


# --- timm ---------------------------------------------------------------------------------------------------------


def run_timm(
    attend: Attend, module: nn.Module, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """The forward of timm's ``Attention`` with its inner product given."""
    query, key, value = project_timm(module, x)
    dropout = module.attn_drop.p if module.training else 0.0
    out = attend(query, key, value, attn_mask=attn_mask, dropout_p=dropout, is_causal=is_causal, scale=module.scale)
    out = out.transpose(1, 2).flatten(2)
    out = module.norm(out) if hasattr(module, "norm") else out
    if getattr(module, "gate", None) is not None:
        out = out * module.gate(x).sigmoid()
    return module.proj_drop(module.proj(out))


def project_timm(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, N, p) → query, key, value (rows, H, N, d)."""
    query, key, value = module.qkv(x).unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return module.q_norm(query), module.k_norm(key), value


# --- generic ------------------------------------------------------------------------------------------------------


class CatchAttention(TorchFunctionMode):
    """Hands every call of ``scaled_dot_product_attention`` under it to ``attend``."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        run = self.attend if func is F.scaled_dot_product_attention else func
        return run(*args, **(kwargs or {}))
