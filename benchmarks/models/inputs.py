"""Inputs for transformers' models, from the signature of their forward and their configuration."""

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .configs import IMAGE, VOCABULARY

LENGTH, DECODED, FRAMES = 10, 7, 2
Inputs = dict[str, Tensor]


def candidates(model: nn.Module, config: Any, dtype: torch.dtype) -> Iterator[Callable[[int], Inputs]]:
    """Ways to call ``model``, the likeliest first: each makes the inputs for so many rows."""
    known = set(inspect.signature(model.forward).parameters)
    main = getattr(model, "main_input_name", "input_ids")
    for length in (LENGTH, 16):
        for media, text in _combinations(known, main, config):
            yield partial(_make, known, config, length, media, text, dtype)


Media = dict[str, tuple[int, ...]]


def _combinations(known: set[str], main: str, config: Any) -> list[tuple[Media, bool]]:
    """Shapes, without their rows, of the floating inputs to try, and whether text goes with them."""
    has_text = "input_ids" in known
    media: list[Media] = []
    for name in ("pixel_values", "pixel_values_videos", "input_values", "input_features", "past_values", "waveform"):
        if name in known:
            media += [{name: shape} for shape in _shapes(name, config)]
    both = [(one, True) for one in media] if has_text else []
    alone = [(one, False) for one in media]
    text: list[tuple[Media, bool]] = [({}, has_text)]
    if _has_two_towers(config):
        return [*both, *text, *alone]
    if main in ("input_ids", "decoder_input_ids") and has_text:
        return [*text, *both, *alone]
    return [*alone, *both, *text]


def _has_two_towers(config: Any) -> bool:
    parts = set(getattr(config, "sub_configs", None) or {})
    other = parts & {"vision_config", "audio_config", "speech_config"}
    return "text_config" in parts and bool(other) and hasattr(config, "projection_dim")


def _shapes(name: str, config: Any) -> list[tuple[int, ...]]:
    vision = next((part for part in _parts(config, "vision") if hasattr(part, "image_size")), config)
    size = getattr(vision, "image_size", IMAGE) or IMAGE
    size = size.get("height", IMAGE) if isinstance(size, dict) else size
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = getattr(vision, "num_channels", None) or getattr(vision, "in_channels", None) or 3
    frames = getattr(vision, "num_frames", None) or getattr(vision, "frames_per_clip", None) or FRAMES
    image = (channels, height, width)
    audio = next(iter(_parts(config, "audio")), config)
    mel = next((getattr(audio, key) for key in _MEL if isinstance(getattr(audio, key, None), int)), 80)
    long = 2 * (getattr(audio, "max_source_positions", None) or 16)
    if name == "pixel_values":
        video = [(frames, *image)]
        images = [image, (channels, 64, 64), (channels, 224, 224)]
        return video + images if hasattr(vision, "num_frames") else images + video
    if name == "pixel_values_videos":
        return [(frames, *image), (channels, frames, height, width)]
    if name == "input_values":
        spectrum = (getattr(config, "max_length", 32), mel)
        return [spectrum, (600,)] if hasattr(config, "frequency_stride") else [(600,), (1, 640), (1600,), spectrum]
    if name == "input_features":
        return [(mel, long), (long, mel), (24, mel), (mel, 3000), (1, 64, mel), (1, 1001, 64)]
    if name == "past_values":
        past, width = getattr(config, "context_length", 32), getattr(config, "num_input_channels", 1)
        return [(past, width), (past,)]
    return [(1600,)]


_MEL = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "num_mel_channels", "n_mels",
        "input_dim", "input_feat_size")  # fmt: skip


def _parts(config: Any, kind: str) -> list[Any]:
    names = getattr(config, "sub_configs", None) or {}
    return [part for name in names if kind in name and (part := getattr(config, name, None)) is not None]


def _make(known: set[str], config: Any, length: int, media: Media, text: bool, dtype: torch.dtype, rows: int) -> Inputs:
    generator = torch.Generator().manual_seed(rows)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    def numbers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    made: Inputs = {name: normal(rows, *shape) for name, shape in media.items()}
    high = _vocabulary(config)
    if text:
        made["input_ids"] = numbers(6, high, rows, length)
        # the end token, from which CLIP pools
        made["input_ids"][:, -1] = 2
        if "attention_mask" in known:
            lengths = length - torch.arange(rows) % 4
            made["attention_mask"] = (torch.arange(length) < lengths[:, None]).long()
    if "bbox" in known and text:
        corner = numbers(0, 20, rows, length, 2)
        made["bbox"] = torch.cat([corner, corner + numbers(1, 20, rows, length, 2)], -1)
    if "visual_feats" in known:
        made |= {"visual_feats": normal(rows, 5, config.visual_feat_dim), "visual_pos": normal(rows, 5, 4)}
    if "visual_embeds" in known:
        made |= {"visual_embeds": normal(rows, 5, config.visual_embedding_dim)}
    if "decoder_input_ids" in known and getattr(config, "is_encoder_decoder", True):
        made["decoder_input_ids"] = numbers(6, high, rows, DECODED)
    return made | _unusual(known, config, media, rows, normal)


def _vocabulary(config: Any) -> int:
    """One more than the largest word that a text may have: special tokens lie beyond."""
    holders = [config, *_parts(config, "text"), *_parts(config, "encoder"), *_parts(config, "decoder")]
    sizes = [size for holder in holders if isinstance(size := getattr(holder, "vocab_size", None), int) and size > 8]
    return min(VOCABULARY - 40, *[size - 1 for size in sizes], VOCABULARY)


def _unusual(known: set[str], config: Any, media: Media, rows: int, normal: Callable[..., Tensor]) -> Inputs:
    """Inputs that only one kind of model has."""
    made: Inputs = {}
    if "states" in known:  # the decision transformer's
        made |= {"states": normal(rows, 4, config.state_dim), "actions": normal(rows, 4, config.act_dim)}
        made |= {"rewards": normal(rows, 4, 1), "returns_to_go": normal(rows, 4, 1)}
        made |= {"timesteps": torch.arange(4).expand(rows, 4), "attention_mask": torch.ones(rows, 4).long()}
    if "prompt_pixel_values" in known:  # SegGPT's example and its answer
        image = next(iter(media.values()), (3, IMAGE, IMAGE))
        made |= {"prompt_pixel_values": normal(rows, *image), "prompt_masks": normal(rows, *image)}
    if "query_embeds" in known:
        made |= {"query_embeds": normal(rows, 4, config.hidden_size)}
        made |= {"encoder_hidden_states": normal(rows, 5, getattr(config, "encoder_hidden_size", 0))}
    if "input_features_mask" in known and "input_features" in media:
        made |= {"input_features_mask": torch.ones(rows, max(media["input_features"])).long()}
    if "past_time_features" in known:
        past = config.context_length + max(config.lags_sequence)
        made |= {"past_values": normal(rows, past), "past_observed_mask": torch.ones(rows, past)}
        made |= {"past_time_features": normal(rows, past, config.num_time_features)}
        made |= {"future_values": normal(rows, config.prediction_length)}
        made |= {"future_time_features": normal(rows, config.prediction_length, config.num_time_features)}
    return made
