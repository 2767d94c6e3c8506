"""Four ways into a block's attention, so that task keys and values reach it without a token being concatenated.

Every seam answers the same two questions: which keys and values does this attention make of given tokens, and how does
it run with its inner product replaced? The attention keeps its own projections, norms and masks.

* ``TransformersSeam``: the library's attention interface, set on this one attention module.
* ``TimmSeam``: timm's common ``Attention``, written out.
* ``TorchSeam``: ``nn.MultiheadAttention`` (torchvision, ``nn.TransformerEncoder``), written out.
* ``GenericSeam``: any attention that calls ``scaled_dot_product_attention`` exactly once, caught while it does.
"""

import copy
import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

KeysValues = tuple[Tensor, Tensor]
"""(T, H, t, d) each: T streams, H heads, t task tokens of d channels."""
Attend = Callable[..., Tensor]
"""As ``scaled_dot_product_attention``: query, key, value (rows, H, N, d) → (rows, H, N, d)."""


class Projection(NamedTuple):
    """What is before the inner product of an attention that does nothing else there."""

    weight: Tensor
    """(3p, p): rows of query, key and value, heads within."""
    bias: Tensor | None
    num_heads: int
    scale: float
    finish: Callable[[Tensor], Any]
    """What the attention makes of its heads' merged output (rows, N, p)."""


class NotExpandable(ValueError):
    """A block that task tokens cannot be added to correctly; says why."""


class Seam(ABC):
    """One attention module, seen from its block ``block``."""

    def __init__(self, block: str, attention: Any) -> None:
        self.block, self.attention = block, attention
        self._required = required_parameters(attention.forward)
        self._rotary = "position_embeddings" in inspect.signature(attention.forward).parameters

    def install(self, forward: Callable[..., Any]) -> None:
        self.attention.forward = forward

    def remove(self) -> None:
        del self.attention.forward

    def keys_values(self, tokens: Tensor) -> KeysValues:
        """What the attention makes of (T, t, p) tokens."""
        caught: list[KeysValues] = []

        def catch(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
            caught.append((key, value))
            return query

        options: dict[str, Any] = dict.fromkeys(self._required)
        if self._rotary:  # cos and sin of tokens that have no position, whatever shape those of the others have
            still = tokens.new_ones(1, tokens.shape[1], 1)
            options["position_embeddings"] = still, torch.zeros_like(still)
        try:
            self.run(catch, tokens, **options)
        except (TypeError, RuntimeError) as error:
            raise NotExpandable(
                f"block {self.block!r}: its attention cannot run on task tokens alone: {error}"
            ) from error
        ((key, value),) = caught
        if key.shape[-2] != tokens.shape[1]:
            kinds = f"{key.shape[-2]} keys of {tokens.shape[1]} task tokens"
            raise NotExpandable(f"block {self.block!r}: its attention makes {kinds}")
        return key, value

    @abstractmethod
    def run(self, attend: Attend, *args: Any, **kwargs: Any) -> Any:
        """The attention's own forward, with ``attend`` for its inner product."""

    def projection(self) -> Projection | None:
        """Of an attention that projects, attends and projects back, and nothing else, now; of any other None."""
        return None


def required_parameters(forward: Callable[..., Any]) -> list[str]:
    """Parameters without a default, but for the first, which takes the tokens."""
    _, *others = inspect.signature(forward).parameters.values()
    return [o.name for o in others if o.default is o.empty and o.kind is o.POSITIONAL_OR_KEYWORD]


class TransformersSeam(Seam):
    def install(self, forward: Callable[..., Any]) -> None:
        super().install(forward)
        self._register()
        self._config = self.attention.config
        self.attention.config = copy.deepcopy(self._config)
        self.attention.config._attn_implementation = "dtme"

    def remove(self) -> None:
        super().remove()
        self.attention.config = self._config

    def run(self, attend: Attend, *args: Any, **kwargs: Any) -> Any:
        self.attend = attend
        try:
            return type(self.attention).forward(self.attention, *args, **kwargs)
        finally:
            del self.attend

    def projection(self) -> Projection | None:
        attention = self.attention
        if (type(attention).__module__, type(attention).__name__) not in _PLAIN_ATTENTION or attention.is_causal:
            return None
        code = getattr(inspect.unwrap(type(attention).forward), "__code__", None)
        if not (code and set(code.co_names) <= _PLAIN_NAMES) or (attention.training and attention.attention_dropout):
            return None
        linear = (attention.q_proj, attention.k_proj, attention.v_proj)
        if not all(is_plain_linear(x) and x.out_features == x.in_features for x in linear):
            return None
        biases = [x.bias for x in linear if x.bias is not None]
        if len(biases) not in (0, 3):
            return None
        weight, bias = torch.cat([x.weight for x in linear]), torch.cat(biases) if biases else None
        return Projection(weight, bias, attention.num_attention_heads, attention.scaling, self._finish)

    def _finish(self, attended: Tensor) -> tuple[Tensor, None]:
        return self.attention.o_proj(attended), None

    @staticmethod
    def _register() -> None:
        sys.modules["transformers"].AttentionInterface.register("dtme", _transformers_attention)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._register()  # a copy may be unpickled where nothing was expanded yet


# arguments of transformers' attention functions that do not change what is computed; a sliding window is in the mask
_HARMLESS = {"output_hidden_states", "return_dict", "use_cache", "position_ids", "cache_position", "sliding_window"}


def _transformers_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' contract: (rows, H, N, d) in; (rows, N, H, d) and the attention weights out."""
    seam = module.forward.__self__.seam
    given = [name for name, value in options.items() if value is not None and value is not False]
    if unknown := [name for name in given if name not in _HARMLESS]:
        raise NotExpandable(
            f"block {seam.block!r} passes {unknown[0]!r} to its attention, which task tokens do not support"
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and attention_mask is None and query.shape[2] > 1
    output = seam.attend(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, is_causal=causal, scale=scaling
    )
    return output.transpose(1, 2).contiguous(), None


# attentions that project, attend and project back, and all that the forward of one names, in case a release adds to it
_PLAIN_ATTENTION = {
    (f"transformers.models.{name.lower()}.modeling_{name.lower()}", f"{name.replace('_', '')}Attention")
    for name in ("ViT", "DeiT", "Dinov2", "Dinov2_With_Registers", "ViT_MAE", "ViT_MSN")
}
_PLAIN_NAMES = {
    *("shape", "head_dim", "view", "transpose", "reshape", "contiguous", "q_proj", "k_proj", "v_proj", "o_proj"),
    *("ALL_ATTENTION_FUNCTIONS", "get_interface", "config", "_attn_implementation", "eager_attention_forward"),
    *("training", "attention_dropout", "scaling"),
}

# where it stands, and where earlier releases have it
_TIMM = {("timm.layers.attention", "Attention"), ("timm.models.vision_transformer", "Attention")}


class TimmSeam(Seam):
    def keys_values(self, tokens: Tensor) -> KeysValues:
        return self._project(tokens)[1:]

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attention = self.attention
        qkv = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        return attention.q_norm(query), attention.k_norm(key), value

    def run(self, attend: Attend, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        attention = self.attention
        dropout = attention.attn_drop.p if attention.training else 0.0
        query, key, value = self._project(x)
        out = attend(
            query, key, value, attn_mask=attn_mask, dropout_p=dropout, is_causal=is_causal, scale=attention.scale
        )
        out = out.transpose(1, 2).flatten(2)
        out = attention.norm(out) if hasattr(attention, "norm") else out
        if getattr(attention, "gate", None) is not None:
            out = out * attention.gate(x).sigmoid()
        return attention.proj_drop(attention.proj(out))

    def projection(self) -> Projection | None:
        attention, qkv = self.attention, self.attention.qkv
        normed = (attention.q_norm, attention.k_norm, getattr(attention, "norm", nn.Identity()))
        plain = is_plain_linear(qkv) and all(type(x) is nn.Identity and not is_hooked(x) for x in normed)
        dropped = attention.training and attention.attn_drop.p
        if not plain or dropped or getattr(attention, "gate", None) or qkv.out_features != 3 * qkv.in_features:
            return None
        return Projection(qkv.weight, qkv.bias, attention.num_heads, attention.scale, self._finish)

    def _finish(self, attended: Tensor) -> Tensor:
        return self.attention.proj_drop(self.attention.proj(attended))


class TorchSeam(Seam):
    def keys_values(self, tokens: Tensor) -> KeysValues:
        return self._project(tokens)[1:]

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attention = self.attention
        qkv = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)
        query, key, value = qkv.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return query, key, value

    def run(
        self,
        attend: Attend,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        if need_weights or key is not query or value is not query:
            raise NotExpandable(f"block {self.block!r}: its attention must be self-attention that returns no weights")
        attention = self.attention
        mask = self._mask(len(query), key_padding_mask, attn_mask)
        dropout = attention.dropout if attention.training else 0.0
        out = attend(*self._project(query), attn_mask=mask, dropout_p=dropout)
        return attention.out_proj(out.transpose(1, 2).flatten(2)), None

    def _mask(self, rows: int, padding: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """torch's two masks, whose True means hidden, as one additive mask (1 or rows, 1 or H, 1 or N, S)."""
        dtype = self.attention.in_proj_weight.dtype
        padding, mask = (
            m if m is None or m.is_floating_point() else torch.zeros_like(m, dtype=dtype).masked_fill(m, -torch.inf)
            for m in (padding, mask)
        )
        if mask is not None:
            mask = mask[None, None] if mask.ndim == 2 else mask.unflatten(0, (-1, self.attention.num_heads))
        if padding is None:
            return mask
        padding = padding.repeat(rows // len(padding), 1)[:, None, None]  # built before the streams parted
        return padding if mask is None else padding + mask


class GenericSeam(Seam):
    def run(self, attend: Attend, *args: Any, **kwargs: Any) -> Any:
        calls = []

        def counted(*args: Any, **kwargs: Any) -> Tensor:
            calls.append(1)
            return attend(*args, **kwargs)

        with _Catch(counted):
            output = type(self.attention).forward(self.attention, *args, **kwargs)
        if len(calls) != 1:
            times = f"called scaled_dot_product_attention {len(calls)} times, not once"
            raise NotExpandable(f"block {self.block!r}: its attention {times}")
        return output


class _Catch(TorchFunctionMode):
    """Hands every call of ``scaled_dot_product_attention`` under it to ``attend``."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        run = self.attend if func is F.scaled_dot_product_attention else func
        return run(*args, **(kwargs or {}))


def seam_class(module: nn.Module) -> type[Seam] | None:
    """The seam that fits ``module`` itself (not a child of it), or None."""
    if "forward" in vars(module):
        return None  # somebody else has replaced it: nothing is known about what runs
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    names = getattr(code, "co_names", ())
    if "ALL_ATTENTION_FUNCTIONS" in names and hasattr(module, "config"):
        return TransformersSeam
    if (type(module).__module__, type(module).__name__) in _TIMM:
        return TimmSeam
    if type(module) is nn.MultiheadAttention and module._qkv_same_embed_dim and module.bias_k is None:
        return TorchSeam
    return GenericSeam if "scaled_dot_product_attention" in names else None


def is_plain_linear(module: Any) -> bool:
    """No subclass, nothing that hangs on it, no weight that is quantised or shared among devices."""
    own = type(module) is nn.Linear and "forward" not in vars(module) and not is_hooked(module)
    return own and type(module.weight) is nn.Parameter


def is_hooked(module: nn.Module, own_before: int = 0, own_after: int = 0) -> bool:
    """Whether somebody wants to see, or change, what goes in or comes out; not counting as many hooks of our own."""
    before, after = len(module._forward_pre_hooks), len(module._forward_hooks)
    return before > own_before or after > own_after or bool(module._backward_hooks or module._backward_pre_hooks)
