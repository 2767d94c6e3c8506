"""Small configurations of transformers' models, by generic overrides of whatever sizes a configuration has."""

from typing import Any

WIDTH, HEADS, DEPTH, VOCABULARY, IMAGE, PATCH = 32, 4, 3, 128, 32, 8

_NAMES: dict[int, str] = {
    WIDTH: (
        "hidden_size d_model n_embd dim emb_dim embed_dim decoder_hidden_size encoder_hidden_size projection_dim "
        "vision_embed_dim lm_hidden_size text_hidden_size out_hidden_size output_hidden_size encoder_hidden_dim "
        "image_text_hidden_size decoder_n_embd audio_hidden_size vision_hidden_size fusion_hidden_size input_dim "
        "output_dim pooler_output_size neck_dim shared_embedding_dim projector_hidden_size attention_dim "
        "moe_latent_size lru_width encoder_embed_dim decoder_hidden_dim fpn_hidden_size mask_dim "
        "feature_size_ mask_feature_size fpn_feature_size output_channels output_num_channels num_filters backbone_dim "
        "mm_hidden_size max_2d_hidden embedding_size pooler_hidden_size decoder_hidden_dim encoder_dim latent_dim "
        "d_latents memory_attention_hidden_size memory_encoder_hidden_size memory_fuser_embed_dim "
        "memory_encoder_output_channels mask_downsampler_embed_dim hidden_channels transformer_hidden_size"
    ),
    48: (
        "intermediate_size encoder_ffn_dim decoder_ffn_dim ffn_dim d_ff n_inner dim_feedforward mlp_dim "
        "decoder_intermediate_size moe_intermediate_size shared_expert_intermediate_size dense_intermediate_size "
        "intermediate_size_mlp feed_forward_size ffn_hidden_size shared_intermediate_size dff "
        "moe_shared_expert_intermediate_size expert_intermediate_size memory_fuser_intermediate_dim ffn_size "
        "encoder_intermediate_size vision_intermediate_size block_ff_dim projection_intermediate_size"
    ),
    HEADS: (
        "num_attention_heads n_head num_heads n_heads encoder_attention_heads decoder_attention_heads "
        "decoder_num_attention_heads encoder_num_attention_heads num_attention_heads_per_layer attention_heads "
        "vision_num_heads decoder_n_head index_n_heads linear_num_key_heads linear_num_value_heads mamba_num_heads "
        "num_self_attention_heads num_cross_attention_heads transformer_num_heads swa_num_attention_heads "
        "linear_num_heads num_linear_heads num_experts n_routed_experts num_local_experts moe_num_experts"
    ),
    2: (
        "num_key_value_heads decoder_num_key_value_heads encoder_num_key_value_heads num_kv_heads n_kv_heads "
        "num_experts_per_tok num_experts_per_token moe_topk swa_num_key_value_heads "
        "num_key_value_groups_ num_global_key_value_heads first_k_dense_replace"
    ),
    DEPTH: (
        "num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers num_decoder_layers depth "
        "num_encoder_layers decoder_num_layers encoder_num_layers vision_layers text_layers decoder_num_hidden_layers "
        "encoder_num_hidden_layers num_blocks memory_attention_num_layers memory_fuser_num_layers l_layers r_layers "
        "x_layers num_self_attends_per_block"
    ),
    8: ("head_dim d_kv attention_head_size v_head_dim kv_channels swa_head_dim global_head_dim linear_key_head_dim "
        "linear_value_head_dim attention_head_dim dim_head encoder_head_dim index_head_dim linear_head_dim"),
    16: ("kv_lora_rank q_lora_rank hidden_size_per_layer_input mamba_d_head mamba_head_dim state_size mamba_d_state "
         "ssm_state_size time_step_rank num_conv_pos_embedding_groups num_conv_pos_embeddings"),
    1: ("topk_group n_group num_expert_group num_nextn_predict_layers merger_times"),
}  # fmt: skip
SIZES: dict[str, int] = {name: value for value, names in _NAMES.items() for name in names.split()}
SIZES |= {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "n_ctx": 64,
    "max_seq_len": 64,
    "image_size": IMAGE,
    "img_size": IMAGE,
    "patch_size": PATCH,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "qk_head_dim": 8,
    "rotary_dim": 4,
    "max_source_positions": 16,
    "num_mel_bins": 16,
    "num_queries": 6,
    "num_query_tokens": 4,
    "sliding_window": 64,
    "vocab_size_per_layer_input": VOCABULARY,
    "window_size": 2,
    "max_2d_position_embeddings": 64,
    "num_frames": 2,
    "tubelet_size": 1,
    "num_detection_tokens": 4,
    "image_seq_length": 16,
    "mamba_n_heads": 4,
    "mamba_n_groups": 1,
    "n_groups": 1,
    "max_length": 32,
    "attention_window": 4,
    "index_topk": 8,
    "conv_depthwise_kernel_size": 3,
    "moe_k": 2,
    "mamba_d_ssm": 64,
}

Overrides = dict[str, Any]


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def smaller(name: str, value: Any, skip: frozenset[str]) -> Any:
    """A small value in place of the default ``value`` of the attribute ``name``; None keeps it."""
    if name in skip:
        return None
    if is_integer(value):
        if name in SIZES:
            return min(SIZES[name], value)
        if ("token_id" in name or "token_index" in name) and value >= VOCABULARY:
            return None  # set by special_tokens
        return None
    if isinstance(value, (list, tuple)) and value and all(is_integer(item) for item in value):
        return _smaller_list(name, list(value))
    return None


def _smaller_list(name: str, value: list[int]) -> list[int] | None:
    """Stages stay as many as they were; they get shallow and narrow."""
    if name in ("depths", "num_blocks", "layers", "depth", "blocks_per_stage"):
        return [1] * (len(value) - 1) + [2]
    if name in ("hidden_sizes", "embed_dims", "embed_dim", "channels", "neck_hidden_sizes", "embed_dim_per_stage"):
        return [16 * (i + 1) for i in range(len(value))]
    if name in ("image_size", "img_size"):
        return [IMAGE] * len(value)
    if name in ("conv_dim", "tdnn_dim"):
        return [WIDTH] * len(value)
    if name in ("num_attention_heads", "num_heads"):
        return [min(item, 2 ** min(i, 2)) for i, item in enumerate(value)]
    return None


def special_tokens(config: Any) -> Overrides:
    """Ids that lie outside the small vocabulary, moved to its end, all different."""
    found = [
        name
        for name, value in vars(config).items()
        if ("token_id" in name or "token_index" in name) and is_integer(value) and value >= VOCABULARY - 28
    ]
    return {name: VOCABULARY - 1 - i for i, name in enumerate(found)}


def small(
    config_class: type, skip: frozenset[str] = frozenset(), extra: Overrides | None = None, default: Any = None
) -> Any:
    """A small instance of ``config_class``.

    Args:
        skip: attributes that keep their defaults.
        extra: what this model needs besides; ``"text_config.depth"`` reaches into a part.
        default: an instance to start from.
    """
    default = config_class() if default is None else default
    extra = extra or {}
    changes: Overrides = {}
    parts = dict(getattr(config_class, "sub_configs", None) or {})
    for name, value in vars(default).items():
        if name.startswith("_") or name in parts or name in ("chunk_size_feed_forward",):
            continue
        if (new := smaller(name, value, skip)) is not None:
            changes[name] = new
    changes |= special_tokens(default)
    rope = getattr(default, "rope_parameters", None)
    if isinstance(rope, dict) and "mrope_section" in rope:
        half = int(4 * rope.get("partial_rotary_factor", 1.0))
        changes["rope_parameters"] = {**rope, "mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}
    if hasattr(default, "qk_rope_head_dim"):  # latent attention: rotary embeddings are as wide as that part alone
        changes |= {name: value for name, value in (("head_dim", 4), ("num_key_value_heads", HEADS)) if name in changes}
    for name in parts:
        part = getattr(default, name, None)
        if part is None or not hasattr(part, "to_dict"):
            continue
        within = {key.split(".", 1)[1]: value for key, value in extra.items() if key.startswith(name + ".")}
        changes[name] = small(type(part), skip, {**_kept(part), **within}, part).to_dict()
    own = {name: value for name, value in extra.items() if "." not in name}
    return config_class(**{**changes, **own})


def _kept(part: Any) -> Overrides:
    """What a part of a configuration sets that is not its class's default, a backbone's name for instance."""
    default = vars(type(part)())
    return {
        name: value
        for name, value in vars(part).items()
        if isinstance(value, (str, bool, float)) and not name.startswith("_") and value != default.get(name)
    }


def without_cache(config: Any) -> None:
    """Keys and values of earlier steps are not kept: nothing here generates."""
    for name in ("use_cache", "use_mems_eval"):
        if hasattr(config, name):
            setattr(config, name, False)
    for name in getattr(config, "sub_configs", None) or {}:
        if (part := getattr(config, name, None)) is not None and hasattr(part, "to_dict"):
            without_cache(part)
