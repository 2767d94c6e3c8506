"""torchvision's transformers and torch's own encoder layers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .subject import Subject, randomise

WIDTH, HEADS = 32, 4


def _layer(**options: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(WIDTH, HEADS, 48, 0.0, batch_first=True, **options)


def _encoder(**options: Any) -> nn.Module:
    return nn.TransformerEncoder(_layer(**options), 3, enable_nested_tensor=False)


class Padded(nn.Module):
    """torch's encoder with a padding mask."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = _encoder()

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.encoder(x, src_key_padding_mask=padding)


class Causal(nn.Module):
    """torch's encoder with a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = _encoder(norm_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        return self.encoder(x, mask=mask, is_causal=True)


class Decoder(nn.Module):
    """torch's decoder, which reads a memory."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 48, 0.0, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, 3)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.decoder(x, memory)


class EncoderDecoder(nn.Module):
    """torch's whole transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Transformer(WIDTH, HEADS, 2, 2, 48, 0.0, batch_first=True)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.transformer(memory, x)


def _vit() -> nn.Module:
    from torchvision.models.vision_transformer import VisionTransformer

    return VisionTransformer(32, 8, 3, HEADS, WIDTH, 48, num_classes=WIDTH)


def _swin(version: int) -> nn.Module:
    from torchvision.models import swin_transformer as swin

    block, merging = {
        1: (swin.SwinTransformerBlock, swin.PatchMerging),
        2: (swin.SwinTransformerBlockV2, swin.PatchMergingV2),
    }[version]
    return swin.SwinTransformer(
        [4, 4], 16, [2, 2], [2, 4], [2, 2], 2.0, stochastic_depth_prob=0.0, num_classes=8, block=block,
        downsample_layer=merging,
    )  # fmt: skip


def _maxvit() -> nn.Module:
    from torchvision.models.maxvit import MaxVit

    return MaxVit((64, 64), 16, 2, [16, 32], [1, 1], 8, 0.0, num_classes=8)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "torch/TransformerEncoder": _encoder,
    "torch/TransformerEncoder, norm first": lambda: _encoder(norm_first=True),
    "torch/TransformerEncoder, gelu, no bias": lambda: _encoder(activation="gelu", bias=False),
    "torch/TransformerEncoder, padding mask": Padded,
    "torch/TransformerEncoder, causal": Causal,
    "torch/TransformerEncoder, sequence first": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(WIDTH, HEADS, 48, 0.0), 3, enable_nested_tensor=False
    ),
    "torch/TransformerEncoderLayer, three of them": lambda: nn.Sequential(_layer(), _layer(), _layer()),
    "torch/TransformerDecoder": Decoder,
    "torch/Transformer": EncoderDecoder,
    "torchvision/vit": _vit,
    "torchvision/swin": lambda: _swin(1),
    "torchvision/swin_v2": lambda: _swin(2),
    "torchvision/maxvit": _maxvit,
}


def names() -> list[str]:
    return list(MODELS)


def build(name: str) -> Subject:
    torch.manual_seed(0)
    model = MODELS[name]().eval().double()
    randomise(model)
    return Subject(name, model, lambda rows: _inputs(name, rows), HEADS)


def _inputs(name: str, rows: int) -> Any:
    generator = torch.Generator().manual_seed(rows)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    if name.startswith("torchvision/"):
        side = {"torchvision/maxvit": 64}.get(name, 32)
        return normal(rows, 3, side, side)
    if name in ("torch/TransformerDecoder", "torch/Transformer"):
        return {"x": normal(rows, 7, WIDTH), "memory": normal(rows, 10, WIDTH)}
    if "padding mask" in name:
        return {"x": normal(rows, 7, WIDTH), "padding": torch.arange(7) >= (7 - torch.arange(rows)[:, None] % 4)}
    return normal(rows, 7, WIDTH)
