"""One small member, or several, of every module of timm that holds an attention; no pretrained weights."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .subject import NotBuilt, Subject, randomise

Options = dict[str, Any]
_VIT: Options = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4}
_HEADS: Options = {"embed_dim": 32, "depth": 3, "num_heads": 4}
_STAGE_HEADS = (2, 4, 4, 4)
_SWIN: Options = {"img_size": 64, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}

MODELS: dict[str, tuple[str, Options]] = {
    "vision_transformer": ("vit_tiny_patch16_224", _VIT),
    "vision_transformer, registers": ("vit_small_patch14_reg4_dinov2", _VIT),
    "vision_transformer, SigLIP": ("vit_base_patch16_siglip_224", _VIT),
    "vision_transformer, qk-norm": ("vit_tiny_patch16_224", {**_VIT, "qk_norm": True, "init_values": 0.1}),
    "vision_transformer, CLIP": ("vit_base_patch16_clip_224", _VIT),
    "vision_transformer, post-norm": ("vit_relpos_base_patch16_clsgap_224", _VIT),
    "vision_transformer, parallel blocks": ("vit_small_patch16_18x2_224", _VIT),
    "vision_transformer, parallel scaling": ("vit_base_patch32_plus_256", _VIT),
    "vision_transformer, no class token": ("vit_base_patch16_gap_224", _VIT),
    "vision_transformer, AIMv2": ("aimv2_large_patch14_224", _VIT),
    "vision_transformer, test": ("test_vit", {"img_size": 64}),
    "vision_transformer_hybrid": ("vit_tiny_r_s16_p8_224", {**_HEADS, "img_size": 64}),
    "vision_transformer_relpos": ("vit_relpos_small_patch16_224", _VIT),
    "vision_transformer_relpos, test": ("test_vit_relpos", {"img_size": 64}),
    "vision_transformer_sam": (
        "samvit_base_patch16",
        {**_VIT, "img_size": 64, "window_size": 4, "global_attn_indexes": (2,), "neck_chans": 16},
    ),
    "deit": ("deit_tiny_patch16_224", _VIT),
    "deit, distilled": ("deit_tiny_distilled_patch16_224", _VIT),
    "deit, DeiT-3": ("deit3_small_patch16_224", _VIT),
    "beit": ("beit_base_patch16_224", _VIT),
    "beit, BEiT v2": ("beitv2_base_patch16_224", _VIT),
    "eva": ("eva02_tiny_patch14_224", _VIT),
    "eva, EVA": ("eva_large_patch14_196", _VIT),
    "eva, DINOv3": ("vit_tiny_patch16_dinov3_qkvb", _VIT),
    "eva, RoPE": ("vit_small_patch16_rope_224", _VIT),
    "eva, mixed RoPE": ("vit_small_patch16_rope_mixed_224", _VIT),
    "eva, RoPE ViT-reg": ("vit_mediumd_patch16_rope_reg1_gap_256", _VIT),
    "eva, perception encoder": ("vit_pe_core_tiny_patch16_384", _VIT),
    "naflexvit": ("naflexvit_base_patch16_gap", _VIT),
    "gemma4_vit": (
        "gemma4_vit_167m_enc",
        {**_VIT, "img_size": 96, "head_dim": 8, "num_kv_heads": 2, "intermediate_size": 48},
    ),
    "qwen3_vit": ("qwen3_vit_88m", {**_VIT, "img_size": 64}),
    "deepseek_vit": ("deepseek_vit_412m", {**_VIT, "img_size": 64}),
    "cait": ("cait_xxs24_224", {**_VIT, "depth": 2}),
    "coat": ("coat_tiny", {"img_size": 64}),
    "coat, lite": ("coat_lite_tiny", {"img_size": 64}),
    "convit": (
        "convit_tiny",
        {"img_size": 32, "patch_size": 8, "embed_dim": 8, "depth": 4, "num_heads": 4, "local_up_to_layer": 2},
    ),
    "crossvit": ("crossvit_tiny_240", {}),
    "csatv2": ("csatv2", {}),
    "davit": ("davit_tiny", {"embed_dims": (16, 32), "depths": (1, 1), "num_heads": (2, 4)}),
    "edgenext": ("edgenext_xx_small", {}),
    "efficientformer": ("efficientformer_l1", {"img_size": 64}),
    "efficientformer_v2": ("efficientformerv2_s0", {"img_size": 64}),
    "efficientvit_mit": ("efficientvit_b0", {}),
    "efficientvit_msra": ("efficientvit_m0", {}),
    "fastvit": ("fastvit_sa12", {}),
    "gcvit": ("gcvit_xxtiny", {"img_size": 64}),
    "hiera": ("hiera_tiny_224", {"img_size": 64, "embed_dim": 16, "stages": (1, 1, 1, 1)}),
    "hieradet_sam2": ("sam2_hiera_tiny", {"embed_dim": 16, "stages": (1, 1, 2, 1)}),
    "cpubone": ("cpubone_nano", {}),
    "lowformer": ("lowformer_b0", {}),
    "levit": ("levit_128s", {}),
    "levit, convolutions": ("levit_conv_128s", {}),
    "maxxvit, CoAtNet": ("test_coatnet", {"img_size": 64}),
    "maxxvit, MaxViT": ("maxvit_pico_rw_256", {"img_size": 64}),
    "maxxvit, MaxxViT": ("maxxvit_rmlp_nano_rw_256", {"img_size": 64}),
    "maxxvit, tf": ("maxvit_tiny_tf_224", {"img_size": 64}),
    "maxxvit, test": ("test_maxvit", {"img_size": 64}),
    "metaformer": ("caformer_s18", {}),
    "mobilenetv3": ("mobilenetv4_hybrid_medium_075", {}),
    "mobilenetv5": ("mobilenetv5_300m_enc", {}),
    "mobilevit": ("mobilevit_xxs", {}),
    "mobilevit, v2": ("mobilevitv2_050", {}),
    "mvitv2": ("mvitv2_tiny", {"img_size": 64}),
    "nest": ("nest_tiny", {"img_size": 64}),
    "nextvit": ("nextvit_small", {}),
    "pit": ("pit_ti_224", {"img_size": 64, "depth": (1, 1, 1)}),
    "pit, distilled": ("pit_ti_distilled_224", {"img_size": 64, "depth": (1, 1, 1)}),
    "pvt_v2": ("pvt_v2_b0", {"depths": (1, 1, 1, 1)}),
    "pvt_v2, linear": ("pvt_v2_b2_li", {"depths": (1, 1, 1, 1)}),
    "shvit": ("shvit_s1", {}),
    "swiftformer": ("swiftformer_xs", {"img_size": 64}),
    "swin_transformer": ("swin_tiny_patch4_window7_224", _SWIN),
    "swin_transformer, S3": ("swin_s3_tiny_224", {**_SWIN, "window_size": (4, 4)}),
    "swin_transformer_v2": ("swinv2_tiny_window8_256", _SWIN),
    "swin_transformer_v2_cr": ("swinv2_cr_tiny_224", _SWIN),
    "tiny_vit": (
        "tiny_vit_5m_224",
        {
            "embed_dims": (16, 32, 48, 64),
            "depths": (1, 1, 2, 1),
            "window_sizes": (2, 2, 2, 2),
            "num_heads": (2, 2, 4, 4),
        },
    ),
    "tnt": (
        "tnt_s_patch16_224",
        {"img_size": 64, "embed_dim": 32, "inner_dim": 8, "depth": 3, "num_heads_inner": 2, "num_heads_outer": 4},
    ),
    "twins, SVT": (
        "twins_svt_small",
        {
            "img_size": 64,
            "embed_dims": (16, 32, 48, 64),
            "depths": (1, 1, 2, 1),
            "num_heads": _STAGE_HEADS,
            "wss": (2, 2, 2, 2),
        },
    ),
    "twins, PCPVT": (
        "twins_pcpvt_small",
        {"img_size": 64, "embed_dims": (16, 32, 48, 64), "depths": (1, 1, 2, 1), "num_heads": _STAGE_HEADS},
    ),
    "visformer": ("visformer_tiny", {"img_size": 64, "depth": (1, 1, 1)}),
    "vitamin": ("vitamin_small_224", {"img_size": 64}),
    "volo": ("volo_d1_224", {"img_size": 64}),
    "xcit": ("xcit_nano_12_p8_224", {**_HEADS, "img_size": 64}),
    "byoanet, BoTNet": ("botnet26t_256", {"img_size": 64}),
    "byoanet, HaloNet": ("halonet_h1", {}),
    "byobnet, BAT": ("bat_resnext26ts", {}),
}


def names() -> list[str]:
    return [f"timm/{name}" for name in MODELS]


def build(name: str) -> Subject:
    """Raises NotBuilt where timm does not have the model, or it runs at none of the sizes that are tried."""
    import timm

    variant, options = MODELS[name.split("/", 1)[1]]
    problem: Exception | None = None
    for side in (options.get("img_size", 64), 128, 256, 224):
        own = {**options, "img_size": side} if "img_size" in options else options
        try:
            torch.manual_seed(0)
            model = timm.create_model(variant, pretrained=False, num_classes=8, **own).eval()
            randomise(model)
        except Exception as error:
            problem = problem or error
            continue
        for dtype in (torch.float64, torch.float32):
            subject = Subject(name, model.to(dtype), partial(_image, side, dtype), 4, dtype)
            try:
                with torch.no_grad():
                    if subject.call(subject.backbone, subject.inputs(2)):
                        return subject
            except Exception as error:
                problem = problem or error
    raise NotBuilt(f"{type(problem).__name__}: {problem}"[:300])


def _image(side: int, dtype: torch.dtype, rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, 3, side, side, generator=generator, dtype=torch.float64).to(dtype)
