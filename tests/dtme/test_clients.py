"""Transformers beyond those of the other tests: right where they are taken, refused by name where they are not."""

import pytest
import torch
from torch import nn

import dtme
from dtme.blocks import find_blocks
from tests.dtme.clients import CLIENTS, WIDTH, concatenated

HF = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48}
VISION = {**HF, "image_size": 32, "patch_size": 8}
TEXT = {**HF, "vocab_size": 50, "pad_token_id": 1}
TIMM = {"img_size": 32, "embed_dim": WIDTH, "depth": 2, "num_heads": 3}


def transformers_model(name, **config):
    import transformers

    model = getattr(transformers, name + "Model")
    return model(model.config_class(**config))


def timm_model(name, **options):
    import timm

    return timm.create_model(name, **options)


CASES = {
    "transformers CLIP vision": lambda: transformers_model("CLIPVision", **VISION),
    "transformers SigLIP vision": lambda: transformers_model("SiglipVision", **VISION),
    "transformers DeiT": lambda: transformers_model("DeiT", **VISION),
    "transformers BEiT": lambda: transformers_model("Beit", **VISION),
    "transformers RoBERTa": lambda: transformers_model("Roberta", **TEXT),
    "transformers DistilBERT": lambda: transformers_model(
        "DistilBert", dim=WIDTH, n_layers=2, n_heads=3, hidden_dim=48, vocab_size=50
    ),
    "timm DeiT-3": lambda: timm_model("deit3_small_patch16_224", **TIMM),
    "timm SigLIP": lambda: timm_model("vit_base_patch16_siglip_224", **TIMM),
}


def make_input(name):
    torch.manual_seed(1)
    if "BERT" in name or "Llama" in name:
        return {"input_ids": torch.randint(2, 50, (2, 7)), "attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3])}
    return torch.randn(2, 3, 32, 32, dtype=torch.float64)


def two_tasks(backbone):
    torch.manual_seed(0)
    return dtme.MultiTaskModel(backbone.double().eval(), {"a": nn.Identity(), "b": nn.Identity()})


def randomised(model, plan):
    dtme.expand(model, plan)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".dtme." in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return {name.removeprefix("backbone."): p.detach() for name, p in model.named_parameters() if ".dtme." in name}


@pytest.mark.parametrize("name", CASES)
def test_equals_concatenation(name):
    model, x = two_tasks(CASES[name]()), make_input(name)
    first, second = find_blocks(model.backbone)
    added = randomised(
        model, dtme.ExpansionPlan(("a", "b"), 2, {first: ("a", "b")}, {first: ("a",), second: ("a", "b")})
    )
    out = model(x)
    dtme.collapse(model)
    for task in ("a", "b"):
        with concatenated(model.backbone, added, task):
            want = model(x)[task]
        torch.testing.assert_close(out[task], want, rtol=1e-10, atol=1e-10)


def test_llama_equals_a_prefix_in_its_key_value_cache():
    """GQA, rotary positions, causal and padding masks: task tokens are a prefix without a position."""
    from transformers import DynamicCache

    config = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = two_tasks(transformers_model("Llama", **config, intermediate_size=48, vocab_size=50))
    x, llama = make_input("Llama"), model.backbone
    first, second = find_blocks(llama)
    added = randomised(model, dtme.ExpansionPlan(("a", "b"), 3, {}, dict.fromkeys((first, second), ("a", "b"))))
    out = model(x)
    dtme.collapse(model)
    for task in ("a", "b"):
        cache = DynamicCache(config=llama.config)
        for d, layer in enumerate(llama.layers):
            tokens = layer.input_layernorm(added[f"layers.{d}.dtme.tokens.{task}"].expand(2, -1, -1))
            attention = layer.self_attn
            key, value = (
                p(tokens).unflatten(-1, (2, -1)).transpose(1, 2) for p in (attention.k_proj, attention.v_proj)
            )
            cache.update(key, value, d)
        mask = torch.cat([torch.ones(2, 3, dtype=torch.long), x["attention_mask"]], 1)
        positions = torch.arange(7).expand(2, -1)
        want = llama(
            x["input_ids"], attention_mask=mask, position_ids=positions, past_key_values=cache
        ).last_hidden_state
        real = x["attention_mask"].bool()
        torch.testing.assert_close(out[task][real], want[real], rtol=1e-9, atol=1e-9)


def test_task_tokens_are_refused_by_name_but_modulation_works():
    sizes = {"img_size": 28, "embed_dim": WIDTH, "depths": (2,), "num_heads": (3,), "window_size": 7}
    backbone = timm_model("swinv2_cr_tiny_224", **sizes, num_classes=0).double().eval()
    model = two_tasks(backbone)
    first = next(iter(find_blocks(backbone)))
    with pytest.raises(ValueError, match="SwinTransformerV2CrBlock") as error:
        dtme.expand(model, dtme.ExpansionPlan(("a", "b"), 1, {}, {first: ("a",)}))
    assert first in str(error.value)
    x = torch.randn(2, 3, 28, 28).double()
    before = model(x)
    added = randomised(model, dtme.ExpansionPlan(("a", "b"), 1, {first: ("a",)}))
    out = model(x)
    torch.testing.assert_close(out["b"], before["b"], rtol=1e-12, atol=1e-12)
    dtme.collapse(model)
    with concatenated(backbone, added, "a"):
        torch.testing.assert_close(out["a"], model(x)["a"], rtol=1e-10, atol=1e-10)


def test_flash_attention_masks_are_refused_at_once():
    model = two_tasks(transformers_model("ViT", **VISION))
    model.backbone.config._attn_implementation_internal = "flash_attention_2"
    first = next(iter(find_blocks(model.backbone)))
    with pytest.raises(ValueError, match=rf"{first}.*attn_implementation='flash_attention_2'.*'sdpa'"):
        dtme.expand(model, dtme.ExpansionPlan(("a", "b"), 1, {}, {first: ("a",)}))


def test_attention_arguments_nobody_knows_are_refused():
    model = two_tasks(transformers_model("Llama", **HF, vocab_size=50))
    first = next(iter(find_blocks(model.backbone)))
    dtme.expand(model, dtme.ExpansionPlan(("a", "b"), 1, {}, {first: ("a",)}))
    ids = make_input("Llama")["input_ids"]
    with dtme.tasks(model, "a"):
        model.backbone(ids, num_items_in_batch=3, output_router_logits=True)  # which are not about attention
        with pytest.raises(ValueError, match=rf"'{first}' passes 'relative_places'"):
            model.backbone(ids, relative_places=ids)


@pytest.mark.parametrize("name", ["Mistral", "Qwen3"])
def test_decoders_whose_attention_has_required_arguments(name):
    config = {**HF, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "vocab_size": 50}
    model = two_tasks(transformers_model(name, **config))
    first, second = find_blocks(model.backbone)
    x = make_input("Llama")
    randomised(model, dtme.ExpansionPlan(("a", "b"), 2, {first: ("a", "b")}, {second: ("a", "b")}))
    together = model(x)
    for task in ("a", "b"):
        torch.testing.assert_close(model(x, task)[task], together[task], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(model.export_task(task)(x), together[task], rtol=1e-10, atol=1e-10)


def test_dinov3_equals_prepending_and_exports():
    """Appended tokens would shift its rotary positions; prepended ones have none."""
    config = {**VISION, "num_attention_heads": 2}
    model, x = two_tasks(transformers_model("DINOv3ViT", **config)), make_input("DINOv3")
    first, second = find_blocks(model.backbone)
    added = randomised(model, dtme.ExpansionPlan(("a", "b"), 2, {}, {first: ("a",), second: ("a", "b")}))
    out, single = model(x), model.export_task("a")
    torch.testing.assert_close(single(x), out["a"], rtol=1e-10, atol=1e-10)
    dtme.collapse(model)
    handles = []
    for name, block in ((first, None), (second, None)):
        block = model.backbone.get_submodule(name)
        tokens = added[f"{name}.dtme.tokens.a"]

        def enter(block, args, tokens=tokens):
            return (torch.cat([tokens.expand(len(args[0]), -1, -1), args[0]], 1), *args[1:])

        handles += [
            block.register_forward_pre_hook(enter),
            block.register_forward_hook(lambda block, args, output: output[:, 2:]),
        ]
    torch.testing.assert_close(out["a"], model(x)["a"], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["ViT", "Bert"])
def test_eager_attention_gives_the_weights_of_the_shared_keys(name):
    """To a float32 softmax, which eager attention takes in float64 as well."""
    make = VISION if name == "ViT" else TEXT
    model = two_tasks(transformers_model(name, **make, attn_implementation="eager"))
    names, tasks = list(find_blocks(model.backbone)), ("a", "b")
    x = (
        {"pixel_values": torch.randn(2, 3, 32, 32).double()}
        if name == "ViT"
        else {"input_ids": torch.ones(2, 5).long()}
    )
    added = randomised(model, dtme.ExpansionPlan(tasks, 2, {}, {names[0]: ("a",), names[1]: tasks}))
    with dtme.tasks(model.backbone, tasks):
        weights = model.backbone(**x, output_attentions=True).attentions
    dtme.collapse(model)
    for i, task in enumerate(tasks):
        with concatenated(model.backbone, added, task):
            want = model.backbone(**x, output_attentions=True).attentions
        assert len(weights) == len(want)
        for mine, theirs in zip(weights, want, strict=True):
            rows, n = len(theirs), mine.shape[-1]
            torch.testing.assert_close(mine[i * rows : (i + 1) * rows], theirs[..., :n, :n], rtol=0, atol=1e-6)


def test_weights_are_refused_rather_than_lost_where_attention_is_not_eager():
    model = two_tasks(transformers_model("ViT", **VISION, attn_implementation="sdpa"))
    first = next(iter(find_blocks(model.backbone)))
    dtme.expand(model, dtme.ExpansionPlan(("a", "b"), 1, {}, {first: ("a", "b")}))
    with pytest.raises(ValueError, match="output_attentions"):
        model.backbone(make_input("ViT"), output_attentions=True)


@pytest.mark.parametrize("train_mode", [False, True])
def test_analysis_sees_through_timms_own_checkpointing(train_mode):

    model = two_tasks(CLIENTS["timm ViT"]())
    loader = [(torch.randn(3, 3, 16, 16).double(), {task: torch.randn(3, 5, WIDTH).double() for task in "ab"})]
    losses = {"a": nn.functional.mse_loss, "b": nn.functional.l1_loss}
    want = dtme.analyze(model, loader, losses, train_mode=train_mode, progress=False)
    model.backbone.set_grad_checkpointing(True)
    got = dtme.analyze(model, loader, losses, train_mode=train_mode, progress=False)
    assert torch.equal(got.range_counts, want.range_counts) and torch.equal(got.null_counts, want.null_counts)
    assert not loader[0][0].requires_grad


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("masks", ["none", "padding", "causal and padding"])
def test_torchs_own_encoder_equals_concatenation(norm_first, masks):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 3, 48, 0.0, batch_first=True, norm_first=norm_first)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().eval()
    x, hidden = torch.randn(3, 5, WIDTH).double(), torch.arange(5) >= torch.tensor([[5], [3], [4]])
    options = {} if masks == "none" else {"src_key_padding_mask": hidden}
    if "causal" in masks:
        options["mask"] = torch.ones(5, 5, dtype=torch.bool).triu(1)
    names, tasks = ("layers.0", "layers.1"), ("a", "b")
    added = randomised(encoder, dtme.ExpansionPlan(tasks, 2, {names[0]: tasks}, {names[0]: ("a",), names[1]: tasks}))
    out = dtme.split(encoder(x, **options), tasks)
    dtme.collapse(encoder)
    longer = {"src_key_padding_mask": nn.functional.pad(hidden, (0, 2))} if options else {}
    if "mask" in options:
        longer["src_mask"] = nn.functional.pad(options["mask"], (0, 2, 0, 2))
    for task in tasks:
        y = x
        for name, block in zip(names, encoder.layers, strict=True):
            w, b, tokens = (added.get(f"{name}.dtme.{kind}.{task}") for kind in ("weight", "bias", "tokens"))
            y = y if w is None else y * w + b
            if tokens is None:
                short = {"src_key_padding_mask": options.get("src_key_padding_mask"), "src_mask": options.get("mask")}
                y = block(y, **short)
            else:
                y = block(torch.cat([y, tokens.expand(3, -1, -1)], 1), **longer)[:, :5]
        torch.testing.assert_close(out[task], y, rtol=1e-10, atol=1e-10)


def test_torchvisions_vit_equals_concatenation():
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    vit = torchvision.models.VisionTransformer(32, 8, 2, 3, WIDTH, 48, num_classes=4).double().eval()
    blocks = list(find_blocks(vit))
    tasks, x = ("a", "b"), torch.randn(2, 3, 32, 32).double()
    added = randomised(vit, dtme.ExpansionPlan(tasks, 2, {blocks[0]: tasks}, {blocks[0]: ("a",), blocks[1]: tasks}))
    out = dtme.split(vit(x), tasks)
    dtme.collapse(vit)
    for task in tasks:
        with concatenated(vit, added, task):
            torch.testing.assert_close(out[task], vit(x), rtol=1e-10, atol=1e-10)
