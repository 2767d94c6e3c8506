"""Small real transformers, and the naive way to expand them: concatenate, run, drop."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dtme
from dtme.blocks import find_blocks

WIDTH, TASKS = 24, ("semseg", "depth", "normals")


def _hf_vit() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    return ViTModel(ViTConfig(**_HF, image_size=16, patch_size=8), add_pooling_layer=False)


def _dinov2() -> nn.Module:
    from transformers import Dinov2Config, Dinov2Model

    return Dinov2Model(
        Dinov2Config(
            hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=3, mlp_ratio=2, image_size=16, patch_size=8
        )
    )


def _bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        **_HF, vocab_size=40, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=16
    )
    return BertModel(config, add_pooling_layer=False)


def _timm_vit(**options: Any) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=16, patch_size=8, embed_dim=WIDTH, depth=3, num_heads=3, mlp_ratio=2, num_classes=0, **options
    )


def _timm_rich() -> nn.Module:
    return _timm_vit(qk_norm=True, init_values=0.3, reg_tokens=2)


_HF = {"hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 48}
CLIENTS: dict[str, Callable[[], nn.Module]] = {
    "transformers ViT": _hf_vit,
    "transformers DINOv2": _dinov2,
    "transformers BERT": _bert,
    "timm ViT": _timm_vit,
    "timm ViT, qk-norm, LayerScale, registers": _timm_rich,
}


class SDPA(nn.Module):
    """An attention of somebody's own, with one call of scaled_dot_product_attention."""

    def __init__(self, width: int = WIDTH, num_heads: int = 3) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows, num_tokens, width = x.shape
        qkv = self.qkv(x).view(rows, num_tokens, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))


class OwnBlock(nn.Module):
    """A plain pre-norm block whose attention the caller chooses."""

    def __init__(self, attn: nn.Module, width: int = WIDTH) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), attn
        self.norm2, self.mlp = (
            nn.LayerNorm(width),
            nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class OwnTransformer(nn.Module):
    """Somebody's own: tokens in, tokens out."""

    def __init__(self, depth: int = 3, attention: Callable[[], nn.Module] = SDPA) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(OwnBlock(attention()) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Two(nn.Module):
    """One transformer after the other, which may be expanded by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = OwnTransformer(2), OwnTransformer(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.right(self.left(x))


CLIENTS["own, generic seam"] = OwnTransformer


def make_input(name: str, rows: int = 3, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    if "BERT" in name:
        ids = torch.randint(1, 40, (rows, 7), generator=generator)
        lengths = torch.tensor([7, 4, 5, 3, 6][:rows])
        return {"input_ids": ids, "attention_mask": (torch.arange(7) < lengths[:, None]).long()}
    shape = (rows, 5, WIDTH) if "own" in name else (rows, 3, 16, 16)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@contextmanager
def concatenated(backbone: nn.Module, added: dict[str, Tensor], task: str) -> Iterator[None]:
    """The definition of an expanded block: modulate its input, append the task's tokens, run it, drop them."""
    handles = []
    for name, block in backbone.named_modules():
        weight, bias, tokens = (added.get(f"{name}.dtme.{kind}.{task}") for kind in ("weight", "bias", "tokens"))
        if weight is None and tokens is None:
            continue
        count = 0 if tokens is None else len(tokens)

        def enter(block, args, kwargs, weight=weight, bias=bias, tokens=tokens, count=count):
            x, *rest = args
            x = x if weight is None else x * weight + bias
            x = x if tokens is None else torch.cat([x, tokens.expand(len(x), -1, -1)], 1)
            rest = [_pad_mask(value, count) for value in rest]
            return (x, *rest), {key: _pad_mask(value, count) for key, value in kwargs.items()}

        def leave(block, args, output, count=count):
            return output[:, : output.shape[1] - count] if count else output

        handles += [block.register_forward_pre_hook(enter, with_kwargs=True), block.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _pad_mask(value: Any, count: int) -> Any:
    """A (B, 1, N, N) mask with `count` more rows and columns, visible to everybody."""
    if not isinstance(value, Tensor) or value.ndim != 4:
        return value
    return F.pad(value, (0, count, 0, count), value=True if value.dtype == torch.bool else 0.0)


def mixed_plan(model: dtme.MultiTaskModel) -> dtme.ExpansionPlan:
    """Streams part at different blocks, and not every task has every module."""
    first, second, third = find_blocks(model.backbone)
    modulation = {first: ("depth",), second: TASKS}
    return dtme.ExpansionPlan(TASKS, 2, modulation, {second: TASKS, third: ("depth", "normals")})


def same_predictions(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[task], b[task]) for task in a)
