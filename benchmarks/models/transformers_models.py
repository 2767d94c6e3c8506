"""Every model type that transformers' AutoModel knows, built small."""

from typing import Any

import torch
from torch import nn

from . import configs, inputs
from .subject import NotBuilt, Subject, randomise

LARGEST = 40_000_000
"""Parameters above which a model does not count as small."""

_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
EXTRA: dict[str, dict[str, Any]] = {
    **{name: {"image_size": 64, "depths": [1, 2, 1]} for name in ("swin", "swinv2", "donut-swin", "maskformer-swin")},
    "autoformer": {"prediction_length": 4, "context_length": 16},
    "informer": {"prediction_length": 4, "context_length": 16},
    "time_series_transformer": {"prediction_length": 4, "context_length": 16},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "esm": {
        "vocab_size": configs.VOCABULARY,
        "pad_token_id": 1,
        "mask_token_id": 3,
        "position_embedding_type": "rotary",
    },
    "esmc": {"num_key_value_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "ministral": {"head_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "nemotron": {"head_dim": 8},
    "reformer": {"axial_pos_embds": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "full_attention"]},
    "xlnet": {"d_head": 8},
    **{name: {"text_config.rope_parameters": _ROPE} for name in ("glm46v", "glm4v", "glm_image", "glm_ocr", "glmga")},
    **{name: {"rope_parameters": _ROPE} for name in ("glm4v_text", "glm_image_text", "glm_ocr_text")},
}
"""What single configurations need besides the generic sizes."""


def names() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    return [f"transformers/{name}" for name in MODEL_MAPPING_NAMES]


ATTEMPTS: tuple[frozenset[str], ...] = (
    frozenset(),
    frozenset({"head_dim"}),
    frozenset({"num_key_value_heads"}),
    frozenset({"image_size", "patch_size"}),
    frozenset({"hidden_size", "intermediate_size"}),
)
"""Sizes that keep their defaults, in one attempt after the other."""
HOPELESS = ("ImportError", "NotFoundError", "NotImplementedError", "forward() missing", "parameters with every size")
"""What no other size mends."""


def build(name: str) -> Subject:
    """A small model of the type, and inputs that it takes.

    Raises:
        NotBuilt: no configuration or no input was found in a few attempts; says why.
    """
    problem: NotBuilt | None = None
    for skip in ATTEMPTS:
        try:
            model, config = _model(name.split("/", 1)[1], skip)
            return _with_inputs(name, model, config)
        except NotBuilt as error:
            problem = problem or error
            if any(words in str(error) for words in HOPELESS):
                break
    raise problem or NotBuilt("nothing was tried")


def _with_inputs(name: str, model: nn.Module, config: Any) -> Subject:
    randomise(model)
    problem: Exception | None = None
    for dtype in (torch.float64, torch.float32):
        model = model.to(dtype)
        for make in inputs.candidates(model, config, dtype):
            subject = Subject(name, model, make, _heads(config), dtype)
            try:
                with torch.no_grad():
                    outputs = subject.call(model, make(3))
            except Exception as error:
                problem = problem or error
                continue
            if _is_per_row(outputs):
                return subject
            problem = problem or NotBuilt("no output of it has one row per input row")
    text = " ".join(str(problem).split())
    raise NotBuilt(f"no input was found that it takes: {type(problem).__name__}: {text}"[:300])


def _is_per_row(outputs: list[torch.Tensor]) -> bool:
    return bool(outputs) and all(tensor.ndim and len(tensor) == 3 for tensor in outputs)


def _model(model_type: str, skip: frozenset[str]) -> tuple[nn.Module, Any]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    try:
        config_class = CONFIG_MAPPING[model_type]
        config = configs.small(config_class, skip, EXTRA.get(model_type))
        configs.without_cache(config)
        model_class = MODEL_MAPPING[config_class]
        model_class = model_class[0] if isinstance(model_class, tuple) else model_class
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in model_class(config).parameters())
        if size > LARGEST:
            raise NotBuilt(f"{size:,} parameters with every size that is known made small")
        torch.manual_seed(0)
        return model_class(config).eval(), config
    except NotBuilt:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        raise NotBuilt(f"no small configuration was found: {type(error).__name__}: {text}"[:300]) from error


def _heads(config: Any) -> int:
    for holder in (config, *(getattr(config, part, None) for part in getattr(config, "sub_configs", None) or {})):
        try:
            heads = getattr(holder, "num_attention_heads", None)
        except Exception:  # it differs from layer to layer
            continue
        if isinstance(heads, int):
            return heads
    return configs.HEADS
