"""transformers: its attention interface, set on one attention module; Swin v2, which has none, is written out.

Tried on transformers 5.23 and 5.24. The library itself is never imported here; its classes are told by where they are
defined.
"""

from __future__ import annotations

import copy
import inspect
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..torch_private import num_hooks
from ..trees import tensors
from .base import (
    Attend,
    Copied,
    Library,
    NotExpandable,
    Projection,
    Seam,
    all_shared,
    class_of,
    is_plain_linear,
    names_in_forward,
)
from .catch import Catch
from .caught import Caught
from .generic import plain_attention
from .timm import continuous_bias, cosines, window_bias

_INNER = "dtme_attend"
"""The keyword that carries the inner product through an attention's own keywords to its attention function."""


class TransformersSeam(Seam):
    """The inner product travels with the call: in the keywords that most attentions hand on, or caught as it is called.

    Which of the two it is, ``_hands_on``, is found by trying when the seam is installed.
    """

    def __init__(self, block: str, attention: Any) -> None:
        super().__init__(block, attention)
        self._hands_on: bool | None = None

    def install(self, forward: Callable[..., Any]) -> None:
        super().install(forward)
        self._register()
        self._config = self.attention.config
        is_eager = (getattr(self._config, "_attn_implementation", None) or "eager") == "eager"
        self.attention.config = copy.deepcopy(self._config)  # setting one below would set its parts', too
        self.attention.config._dtme_is_eager = is_eager
        self.attention.config._attn_implementation = "dtme"
        self.attention.config._dtme_block = self.block

    def remove(self) -> None:
        super().remove()
        self.attention.config = self._config

    def run(self, attend: Attend, *args: Any, **kwargs: Any) -> Any:
        forward = type(self.attention).forward
        if self._hands_on is None:
            self._hands_on = self._arrives(*args, **kwargs)
        if self._hands_on:
            return forward(self.attention, *args, **{_INNER: attend}, **kwargs)
        with Catch(Caught(attend, next(tensors((args, kwargs))).shape[0], self.block)):
            return forward(self.attention, *args, **kwargs)

    def _arrives(self, *args: Any, **kwargs: Any) -> bool:
        """Whether a keyword that the attention does not know reaches the attention function."""
        arrived: list[bool] = []

        def attend(query: Tensor, *args: Any, **options: Any) -> Tensor:
            arrived.append(True)
            return query

        parameters = inspect.signature(type(self.attention).forward).parameters.values()
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return False
        try:
            type(self.attention).forward(self.attention, *args, **{_INNER: attend}, **kwargs)
        except TypeError:  # it hands its keywords to somebody who does not take this one
            return False
        return bool(arrived)

    def projection(self) -> Projection | None:
        attention = self.attention
        if class_of(attention) not in _PLAIN_ATTENTION or attention.is_causal:
            return None
        names = names_in_forward(attention)
        if not names or not names <= _PLAIN_NAMES or (attention.training and attention.attention_dropout):
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
        sys.modules["transformers"].AttentionInterface.register("dtme", _attention)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._register()  # a copy may be unpickled where nothing was expanded yet


# arguments of transformers' attention functions that do not change what is computed; a sliding window is in the mask
_HARMLESS = {
    *("output_hidden_states", "return_dict", "use_cache", "position_ids", "cache_position", "sliding_window"),
    *("output_router_logits", "logits_to_keep", "num_items_in_batch"),
}


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' contract: (rows, H, N, d) in; (rows, N, H, d) and the attention weights out.

    Eager attention gives its weights where somebody asks, or has hung a hook on it, by which transformers collects
    them: those of the block's own keys, which with those of the task keys sum to 1, and without dropout.

    Without a mask, causal queries that meet more keys are the first tokens of a static cache, whose other places are
    empty yet: query i sees keys j <= i. In all other cases in which a cache holds earlier tokens there is a mask, or
    one query.
    """
    is_eager = module.config._dtme_is_eager
    is_asked = (is_eager and options.pop("output_attentions", False)) or num_hooks(module)[1] > 0
    attend = options.pop(_INNER, None) or plain_attention
    given = [name for name, value in options.items() if value is not None and value is not False]
    if unknown := [name for name in given if name not in _HARMLESS]:
        raise NotExpandable(
            f"block {module.config._dtme_block!r} passes {unknown[0]!r} to its attention, which task tokens do not "
            "support"
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    # eager attention knows no other causality than its mask's
    causal = bool(causal) and attention_mask is None and query.shape[2] > 1 and not is_eager
    if position_bias is not None:
        attention_mask, causal = _biased(position_bias, attention_mask, causal, query, key), False
    how: dict[str, Any] = {"attn_mask": attention_mask, "is_causal": causal, "scale": scaling}
    how |= {name: value for name, value in (("softcap", softcap), ("sinks", s_aux)) if value is not None}
    output = attend(query, key, value, dropout_p=dropout, **how)
    weights = None
    if is_asked and is_eager:
        weights = attend(query, key, None, **how)
        weights = weights.to(query.dtype)
    return output.transpose(1, 2).contiguous(), weights


def _biased(bias: Tensor, mask: Tensor | None, is_causal: bool, query: Tensor, key: Tensor) -> Tensor:
    """An additive mask: the scores' bias by distance (1 or B, H, N, M), and what the mask hides."""
    if mask is None and is_causal:
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if mask is None or mask.dtype != torch.bool:
        return bias if mask is None else bias + mask
    return torch.where(mask, bias, torch.finfo(bias.dtype).min)


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


class Swinv2Seam(Copied):
    """Windows, cosines for scores, and a bias by distance; task keys join every window, without a bias and unmasked."""

    def num_tokens(self) -> int:
        return math.prod(self.attention.window_size)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attention = self.attention
        projections = (attention.query, attention.key, attention.value)
        query, key, value = (
            project(x).unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2) for project in projections
        )
        return *cosines(query, key, attention.logit_scale), value

    def run(
        self,
        attend: Attend,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = False,
    ) -> tuple[Tensor]:
        if output_attentions:
            raise NotExpandable(f"block {self.block!r}: output_attentions=True is not supported beside task tokens")
        attention = self.attention
        table = attention.continuous_position_bias_mlp(attention.relative_coords_table)
        bias = continuous_bias(table, attention.relative_position_index, self.num_tokens())
        if attention_mask is not None:  # which the library adds twice
            bias = window_bias(bias, 2 * attention_mask, hidden_states.shape[0])
        dropout = attention.dropout.p if attention.training else 0.0
        out = attend(*self.project(hidden_states), attn_mask=bias, dropout_p=dropout, scale=1.0)
        return (out.transpose(1, 2).flatten(2),)


_SWIN, _SWIN_V2 = "transformers.models.swin.modeling_swin", "transformers.models.swinv2.modeling_swinv2"

_FROM_THE_END = {("transformers.models.mpt.modeling_mpt", "MptAttention")}
"""Attentions whose bias of a key is its distance to the last of all keys, rather than to the query. The softmax does
not mind, until keys join that have none: what they change would depend on how many tokens follow."""


def _seam(module: nn.Module) -> type[Seam] | str | None:
    if class_of(module) in _FROM_THE_END:
        return "its bias of a key is counted from the last token, and task tokens would count for less in longer text"
    if "ALL_ATTENTION_FUNCTIONS" in names_in_forward(module) and hasattr(module, "config"):
        implementation = getattr(module.config, "_attn_implementation", None) or "eager"
        if implementation not in ("eager", "sdpa"):
            return (
                f"it uses attn_implementation={implementation!r}, whose masks cannot be extended: load the model with "
                "attn_implementation='sdpa'"
            )
        return TransformersSeam
    return Swinv2Seam if class_of(module) == (_SWIN_V2, "Swinv2SelfAttention") else None


_MASK = {2: 0, 3: 0, 4: 0}  # (B, N), (B, N, N) or (B, 1 or H, N, N)
_ROTARY = {2: None, 3: 0}  # cosines and sines: (N, d) of a grid that all images share, or (B or 1, N, d)
_PLACES = {1: None, 2: 0}  # (N,), or (B or 1, N)
_BIAS = {4: 0}  # (B or 1, H, N, N)
_TOKENS = {3: 0}  # (B, N, p)
_SLOPES = {3: 0}  # (B * H, 1, N)

LIBRARY = Library(
    "transformers",
    _seam,
    arguments={
        **dict.fromkeys(("attention_mask", "encoder_attention_mask", "conv_attention_mask", "causal_mask"), _MASK),
        **dict.fromkeys(("position_embeddings", "encoder_position_embeddings"), _ROTARY),
        **dict.fromkeys(("position_ids", "encoder_position_ids", "cache_position"), _PLACES),
        **dict.fromkeys(("position_bias", "encoder_decoder_position_bias", "rel_pos", "rel_2d_pos"), _BIAS),
        **dict.fromkeys(("encoder_hidden_states", "per_layer_input", "object_queries"), _TOKENS),
        **dict.fromkeys(("spatial_position_embeddings", "object_queries_position_embeddings"), _TOKENS),
        "alibi": _SLOPES,
        # BEiT's table by distance, and sizes
        **all_shared("relative_position_bias", "input_dimensions", "resolution"),
    },
    norms={(_SWIN, "SwinLayer"): "layernorm_before", (_SWIN_V2, "Swinv2Layer"): None},
)
