"""Text from causal models and encoder-decoders, with and without a key-value cache."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import dtme
from dtme.blocks import find_blocks

from .situation import difference, situation

TASKS = ("a", "b")
NUM_TOKENS, NEW, VOCABULARY, PAD = 3, 6, 60, 0
WINDOW = 4

# --- hosts ------------------------------------------------------------------------------------------------------------

_LLAMA = {
    **dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48),
    **dict(head_dim=8, vocab_size=VOCABULARY, max_position_embeddings=64),
}
_GEMMA = {**_LLAMA, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_BART = {
    **dict(d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4),
    **dict(encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=VOCABULARY),
}
_WHISPER = {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 32, "suppress_tokens": None}


class Host(NamedTuple):
    """A model that generates."""

    name: str
    """Of its class, but for what it ends with."""
    kind: str
    """What its class's name ends with."""
    options: dict[str, Any]
    norm: str
    """The norm of a block's attention; empty where the attention reads the block's tokens themselves."""
    attention: str
    keys_values: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]
    """What the attention makes of (t, p) task tokens, (t, heads * d) each."""

    def build(self) -> Any:
        import transformers

        model_class = getattr(transformers, self.name + self.kind)
        config = model_class.config_class(**self.options, pad_token_id=PAD, eos_token_id=None)
        torch.manual_seed(0)
        model = model_class(config).double().eval()
        with torch.no_grad():  # weights large enough that every token tells
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.ndim < 2 else 0.3))
        model.generation_config.update(eos_token_id=None, pad_token_id=PAD, bos_token_id=1, decoder_start_token_id=2)
        return model

    def blocks(self, model: Any) -> list[str]:
        """Those of the decoder, where there is one, and an encoder's first."""
        names = list(find_blocks(model))
        first = next((name for name in names if "encoder" in name), None)
        return [name for name in names if "encoder" not in name or name == first]


def _projected(*names: str) -> Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]:
    return lambda attention, tokens: tuple(getattr(attention, name)(tokens) for name in names)  # type: ignore


def _gemma3(attention: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    key = attention.k_norm(attention.k_proj(tokens).unflatten(-1, (-1, attention.head_dim))).flatten(-2)
    return key, attention.v_proj(tokens)


def _gpt2(attention: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    return attention.c_attn(tokens).chunk(3, -1)[1:]


_SELF = ("input_layernorm", "self_attn", _projected("k_proj", "v_proj"))
LLAMA = Host("Llama", "ForCausalLM", _LLAMA, *_SELF)
MISTRAL = Host("Mistral", "ForCausalLM", {**_LLAMA, "sliding_window": WINDOW}, *_SELF)
GPT2 = Host(
    "GPT2",
    "LMHeadModel",
    dict(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=64),
    "ln_1",
    "attn",
    _gpt2,
)
BART = Host("Bart", "ForConditionalGeneration", _BART, "", "self_attn", _projected("k_proj", "v_proj"))
T5 = Host(
    "T5",
    "ForConditionalGeneration",
    dict(d_model=32, num_layers=2, num_decoder_layers=2, num_heads=4, d_kv=8, d_ff=48, vocab_size=VOCABULARY),
    "layer.0.layer_norm",
    "layer.0.SelfAttention",
    _projected("k", "v"),
)
WHISPER = Host(
    "Whisper", "ForConditionalGeneration", _BART | _WHISPER, "self_attn_layer_norm", "self_attn", BART.keys_values
)
HOSTS = (
    LLAMA,
    GPT2,
    Host("Qwen2", "ForCausalLM", {k: v for k, v in _LLAMA.items() if k != "head_dim"}, *_SELF),
    MISTRAL,
    Host("Gemma2", "ForCausalLM", {**_GEMMA, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0}, *_SELF),
    Host("Gemma3", "ForCausalLM", _GEMMA, "input_layernorm", "self_attn", _gemma3),
    BART,
    T5,
    WHISPER,
)

# --- a plain model that attends to task tokens ------------------------------------------------------------------------


class _Added(NamedTuple):
    """What one block has of one task."""

    weight: Tensor | None
    bias: Tensor | None
    key: Tensor | None
    """(H, t, d)."""
    value: Tensor | None


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention by its definition, over the keys that are given and those of ``module._oracle``."""
    added, rows, num_keys = getattr(module, "_oracle", None), len(key), key.shape[-2]
    if added is not None and added.key is not None:
        key = torch.cat([key, added.key.expand(rows, -1, -1, -1)], -2)
        value = torch.cat([value, added.value.expand(rows, -1, -1, -1)], -2)
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    for bias in (position_bias, attention_mask):
        if bias is not None:
            scores = scores + nn.functional.pad(
                bias.expand(*bias.shape[:-1], num_keys), (0, scores.shape[-1] - num_keys)
            )
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


def oracle(host: Host, model: Any, task: str) -> Any:
    """A plain model that runs as the expanded ``model`` does for ``task``: modulation by hooks, keys side by side."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register("oracle", _attend)
    AttentionMaskInterface.register("oracle", eager_mask)
    added = {name: parameter.detach() for name, parameter in model.named_parameters() if ".dtme." in name}
    plain = dtme.collapse(copy.deepcopy(model))
    for name in host.blocks(plain):
        block = plain.get_submodule(name)
        weight, bias, tokens = (added.get(f"{name}.dtme.{kind}.{task}") for kind in ("weight", "bias", "tokens"))
        key = value = None
        attention = block.get_submodule(host.attention)
        if tokens is not None:
            tokens = block.get_submodule(host.norm)(tokens) if host.norm else tokens
            heads = getattr(attention, "num_key_value_heads", None) or getattr(
                attention.config, "num_key_value_heads", 4
            )
            key, value = (x.unflatten(-1, (heads, -1)).movedim(-2, 0) for x in host.keys_values(attention, tokens))
        attention._oracle = _Added(weight, bias, key, value)
        if weight is not None:
            block.register_forward_pre_hook(_modulated(weight, bias), with_kwargs=True)
    plain.set_attn_implementation("oracle")
    return plain


def _modulated(weight: Tensor, bias: Tensor | None) -> Callable[..., Any]:
    def hook(block: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (args[0] * weight + bias, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] * weight + bias}

    return hook


# --- what is generated ------------------------------------------------------------------------------------------------


def expanded(host: Host) -> Any:
    """A model whose blocks have task tokens of one task or both, and modulate before and after."""
    model = host.build()
    blocks = host.blocks(model)
    expansion = dict.fromkeys(blocks[:-1], TASKS) | {blocks[-1]: TASKS[:1]}
    dtme.expand(model, dtme.ExpansionPlan(TASKS, NUM_TOKENS, {blocks[-1]: TASKS, blocks[0]: TASKS[:1]}, expansion))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".dtme." in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def prompts(host: Host, *, padded: bool) -> dict[str, Tensor]:
    """Two prompts, the second shorter where they are ``padded``: on the left, or for an encoder on the right."""
    generator = torch.Generator().manual_seed(3)
    if host.name == "Whisper":
        sound = torch.randn(2, 8, 20, generator=generator, dtype=torch.float64)
        return {"input_features": sound, "attention_mask": torch.ones(2, 20, dtype=torch.long)}
    ids = torch.randint(3, VOCABULARY, (2, 7), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, slice(-2, None) if host.kind == "ForConditionalGeneration" else slice(2)] = 0
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


@contextmanager
def watched(model: Any) -> Iterator[list[Tensor]]:
    """The scores (rows, vocabulary) of every step, as precise as they are computed."""
    scores: list[Tensor] = []
    handle = model.get_output_embeddings().register_forward_hook(lambda _, args, out: scores.append(out[:, -1]))
    try:
        yield scores
    finally:
        handle.remove()


def text(model: Any, inputs: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Tokens, and the scores of every step."""
    torch.manual_seed(5)
    fixed = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    with watched(model) as scores:
        sequences = model.generate(**inputs, **(fixed | options))
    return {"sequences": sequences, "scores": torch.stack(scores)}


def differ(found: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """How far scores are off; infinite where other tokens were generated."""
    if not torch.equal(found["sequences"], want["sequences"]):
        return float("inf")
    return difference(found["scores"], want["scores"])


WAYS: tuple[tuple[str, bool, dict[str, Any]], ...] = (
    *(("a", padded, way) for padded in (False, True) for way in ({}, {"num_beams": 3})),
    ("b", True, {}),
    ("a", False, {"do_sample": True, "top_k": 8}),
)
"""Tasks, whether prompts are padded, and options of ``generate``."""
NO_CACHE: dict[str, Any] = {"use_cache": False}
DYNAMIC, STATIC = {"cache_implementation": "dynamic"}, {"cache_implementation": "static"}
ROUNDED = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}


def measure(host: Host, caches: tuple[dict[str, Any], ...], want: dict[str, Any] = NO_CACHE, ways: Any = WAYS) -> float:
    """The worst of ``ways`` and ``caches``.

    Args:
        caches: options of ``generate``.
        want: those that the oracle generates with.
    """
    model, worst = expanded(host), 0.0
    plain = {task: oracle(host, model, task) for task in TASKS}
    for task, padded, way in ways:
        inputs = prompts(host, padded=padded)
        known = text(plain[task], inputs, **way, **want)
        for cache in caches:
            with dtme.tasks(model, task):
                worst = max(worst, differ(text(model, inputs, **way, **cache), known))
    return worst


def assisted(host: Host) -> float:
    """Several tokens at a time are read and some of them taken back: found in the prompt, or guessed by a model."""
    model, worst = expanded(host), 0.0
    inputs = {name: tensor[:1] for name, tensor in prompts(host, padded=False).items()}
    inputs = {name: torch.cat([tensor, tensor], 1) for name, tensor in inputs.items()}  # so that something is found
    guesses = host.build()
    fixed = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    known = oracle(host, model, "a").generate(**inputs, **fixed, **NO_CACHE)
    for way in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": guesses}):
        with dtme.tasks(model, "a"):
            found = model.generate(**inputs, **fixed, **way)
        pairs = zip((found.sequences, *found.logits), (known.sequences, *known.logits), strict=True)
        worst = max(worst, *(difference(one, other) for one, other in pairs))
    return worst


def continued(host: Host) -> float:
    """A prompt read in parts, its cache copied, and two texts that go on from there; every step's scores."""
    from transformers import DynamicCache, StaticCache

    model, worst = expanded(host), 0.0
    inputs = prompts(host, padded=True)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for task in TASKS:
        plain = oracle(host, model, task)
        for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=ids.shape[1])):
            for first, last in ((0, 3), (3, 5), (5, 7)):
                kept = copy.deepcopy(cache) if last == 7 else None
                for reading in (cache, kept) if kept is not None else (cache,):
                    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, first:last]
                    with torch.no_grad(), dtme.tasks(model, task):
                        found = model(
                            input_ids=ids[:, first:last],
                            attention_mask=mask[:, :last],
                            position_ids=positions,
                            cache=reading,
                            use_cache=True,
                        ).logits
                    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, :last]
                    with torch.no_grad():
                        want = plain(ids[:, :last], attention_mask=mask[:, :last], position_ids=positions).logits
                    seen = mask[:, first:last].bool()
                    worst = max(worst, difference(found[seen], want[:, first:last][seen]))
    return worst


AGAINST = "a plain model without a cache, whose attention is written out over task keys too"


def _rows() -> None:
    for host in HOSTS:
        row = situation(
            "generate",
            f"{host.name}; no, dynamic and static cache; padded prompts, beams, sampling",
            against=AGAINST,
            limit=1e-10,
            needs=("transformers",),
        )
        row(partial(measure, host, (NO_CACHE, DYNAMIC, STATIC)))
    for host in (LLAMA, MISTRAL):
        row = situation(
            "generate", f"{host.name}; prompt lookup, assistant", against=AGAINST, limit=1e-5, needs=("transformers",)
        )
        row(partial(assisted, host))
        row = situation(
            "generate",
            f"{host.name}; a prompt in parts, a copied cache",
            against=AGAINST,
            limit=1e-10,
            needs=("transformers",),
        )
        row(partial(continued, host))
    row = situation(
        "generate",
        "Llama; a cache of eight bits",
        against="the plain model whose attention is written out over task keys too, with such a cache",
        limit=1e-10,
        needs=("transformers",),
    )
    row(partial(measure, LLAMA, (ROUNDED,), ROUNDED, WAYS[:1]))


_rows()
