"""Task tokens in window attention: against window attention written out anew, with the task keys concatenated."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dtme
from dtme.blocks import find_blocks
from tests.dtme.test_clients import randomised, timm_model, transformers_model

TASKS, WIDTH, HEADS = ("a", "b"), 24, 3
SMALL = {"embed_dim": WIDTH, "num_heads": [HEADS], "depths": [2], "window_size": 4, "image_size": 24, "patch_size": 2}
TIMM = {"embed_dim": WIDTH, "num_heads": (HEADS,), "depths": (2,), "num_classes": 0, "img_size": 24, "patch_size": 2}
# twelve tokens a side: nine windows of four, shifted in every second block; fourteen a side have to be padded
MODELS = {
    "timm Swin": lambda side=24: timm_model(
        "swin_tiny_patch4_window7_224", **{**TIMM, "img_size": side}, window_size=4, qkv_bias=True
    ),
    "timm Swin v2": lambda side=24: timm_model("swinv2_tiny_window8_256", **{**TIMM, "img_size": side}, window_size=4),
    "transformers Swin": lambda side=24: transformers_model("Swin", **{**SMALL, "image_size": side}),
    "transformers Donut": lambda side=24: transformers_model("DonutSwin", **{**SMALL, "image_size": side}),
    "transformers Swin v2": lambda side=24: transformers_model("Swinv2", **{**SMALL, "image_size": side}),
}


def parts(block):
    """Of any of the four: norms, projections, bias (H, N, N) with its gradient, scale of the scores, mlp."""
    attention = getattr(block, "attn", None) or block.attention
    attention = getattr(attention, "self", attention)
    if hasattr(attention, "qkv"):
        weights, biases = attention.qkv.weight.chunk(3), attention.qkv.bias
        if getattr(attention, "q_bias", None) is not None:
            biases = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
        biases = biases.chunk(3)
    else:
        names = ("query", "key", "value") if hasattr(attention, "query") else ("q_proj", "k_proj", "v_proj")
        weights, biases = zip(*((getattr(attention, n).weight, getattr(attention, n).bias) for n in names), strict=True)
    table = getattr(attention, "relative_position_bias_table", None)
    index = getattr(attention, "relative_position_index", None)
    if index is None:
        table = attention.relative_position_bias.relative_position_bias_table
        index = attention.relative_position_bias.relative_position_index
    network = getattr(attention, "cpb_mlp", None) or getattr(attention, "continuous_position_bias_mlp", None)
    if network is not None:
        table = 16 * torch.sigmoid(network(attention.relative_coords_table).view(-1, HEADS))
    bias = table[index.reshape(-1)].view(16, 16, HEADS).permute(2, 0, 1)
    return weights, biases, bias, getattr(attention, "logit_scale", None)


def window_attention(block, windows, mask, task):
    """(images, W, N, p), mask (W, N, N) or None and normalised task tokens (t, p) → (images, W, N, p), heads merged."""
    weights, biases, bias, logit_scale = parts(block)
    heads = [
        F.linear(windows, w, b).unflatten(-1, (HEADS, -1)).transpose(2, 3) for w, b in zip(weights, biases, strict=True)
    ]
    key, value = (
        torch.cat(
            [mine, F.linear(task, w, b).unflatten(-1, (HEADS, -1)).transpose(0, 1).expand(*mine.shape[:2], -1, -1, -1)],
            3,
        )
        for mine, w, b in zip(heads[1:], weights[1:], biases[1:], strict=True)
    )
    if logit_scale is None:
        scores = heads[0] @ key.mT / math.sqrt(WIDTH // HEADS)
    else:
        scores = F.normalize(heads[0], dim=-1) @ F.normalize(key, dim=-1).mT
        scores = scores * logit_scale.clamp(max=math.log(100)).exp()
    scores = scores + F.pad(bias, (0, len(task)))
    if mask is not None:
        scores = scores + F.pad(mask, (0, len(task)))[:, None]
    return (scores.softmax(-1) @ value).transpose(2, 3).flatten(3)


def shifted_mask(side, shift):
    """Minus a hundred between positions that the shift has brought together, (W, N, N)."""
    region = torch.zeros(side, dtype=torch.float64)
    region[side - 4 : side - shift], region[side - shift :] = 1, 2
    region = (3 * region[:, None] + region).unflatten(0, (-1, 4)).unflatten(2, (-1, 4)).transpose(1, 2).reshape(-1, 16)
    return -100.0 * (region[:, None] != region[:, :, None]).double()


def reference(block, x, task, shift):
    """The block on (B, S, S, p) with task tokens (t, p) in every window."""
    post_norm = parts(block)[3] is not None
    norm1 = getattr(block, "norm1", None) or block.layernorm_before
    norm2 = getattr(block, "norm2", None) or block.layernorm_after
    attention = getattr(block, "attn", None) or block.attention
    project = getattr(attention, "proj", None) or getattr(attention, "o_proj", None) or attention.output.dense
    mlp = getattr(block, "mlp", None) or nn.Sequential(block.intermediate, block.output)
    y, task = (x, task) if post_norm else (norm1(x), norm1(task))
    side = x.shape[1]
    padded = math.ceil(side / 4) * 4
    # timm shifts before it pads, transformers the other way round: the same where nothing is padded
    timm = hasattr(block, "attn")
    y = y.roll((-shift, -shift), (1, 2)) if timm else y
    y = F.pad(y, (0, 0, 0, padded - side, 0, padded - side))
    y = y if timm else y.roll((-shift, -shift), (1, 2))
    windows = y.unflatten(1, (-1, 4)).unflatten(3, (-1, 4)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    windows = project(window_attention(block, windows, shifted_mask(padded, shift) if shift else None, task))
    y = (
        windows.unflatten(2, (4, 4))
        .unflatten(1, (padded // 4, padded // 4))
        .transpose(2, 3)
        .flatten(3, 4)
        .flatten(1, 2)
    )
    y = y[:, :side, :side].roll((shift, shift), (1, 2)) if timm else y.roll((shift, shift), (1, 2))[:, :side, :side]
    x = x + (norm1(y) if post_norm else y)
    return x + (norm2(mlp(x)) if post_norm else mlp(norm2(x)))


@pytest.mark.parametrize("side", [24, 28], ids=["fits", "padded"])
@pytest.mark.parametrize("name", MODELS)
def test_task_tokens_join_every_window_in_outputs_and_all_gradients(name, side):
    torch.manual_seed(0)
    backbone = MODELS[name](side).double().eval()
    for parameter in backbone.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    first, second = find_blocks(backbone)
    blocks = [backbone.get_submodule(first), backbone.get_submodule(second)]
    plan = dtme.ExpansionPlan(TASKS, 3, {second: ("b",)}, {first: ("a",), second: TASKS})
    added = randomised(backbone, plan)
    n = side // 2
    x = torch.randn(2, n, n, WIDTH, dtype=torch.float64)
    flat = not name.startswith("timm")

    def run(block, x):
        out = block(x.flatten(1, 2), (n, n)) if flat else block(x)
        out = out[0] if isinstance(out, tuple) else out
        return out.unflatten(1, (n, n)) if flat else out

    parameters = {k: p for k, p in backbone.named_parameters() if any(k.startswith(f"{b}.") for b in (first, second))}
    outputs = []
    for task in TASKS:
        with dtme.tasks(backbone, task):
            outputs.append(run(blocks[1], run(blocks[0], x)))
    out = torch.cat(outputs)
    weight = torch.randn(out.shape, dtype=torch.float64)
    names = [k for k in parameters if ".dtme." not in k]
    keys = list(added)
    got = torch.autograd.grad((out * weight).sum(), [parameters[k] for k in [*names, *keys]], allow_unused=True)

    dtme.collapse(backbone)
    added = {k: p.clone().requires_grad_() for k, p in added.items()}
    wants = []
    for task in TASKS:
        none = x.new_empty(0, WIDTH)
        y = reference(blocks[0], x, added.get(f"{first}.dtme.tokens.{task}", none), 0)
        if f"{second}.dtme.weight.{task}" in added:
            y = y * added[f"{second}.dtme.weight.{task}"] + added[f"{second}.dtme.bias.{task}"]
        wants.append(reference(blocks[1], y, added[f"{second}.dtme.tokens.{task}"], 2))
    want = torch.cat(wants)
    torch.testing.assert_close(out, want, rtol=1e-10, atol=1e-10)
    targets = [backbone.get_parameter(k) for k in names] + [added[k] for k in keys]
    want_grads = torch.autograd.grad((want * weight).sum(), targets, allow_unused=True)
    for key, mine, theirs in zip([*names, *keys], got, want_grads, strict=True):
        if theirs is None:
            assert mine is None, key
        else:
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", MODELS)
def test_window_models_run_each_task_alone_as_among_all(name):
    torch.manual_seed(0)
    backbone = MODELS[name]().double().eval()
    first, second = find_blocks(backbone)
    model = dtme.MultiTaskModel(backbone, {task: nn.Identity() for task in TASKS})
    randomised(model, dtme.ExpansionPlan(TASKS, 3, {first: ("b",)}, {first: ("a",), second: TASKS}))
    x = torch.randn(2, 3, 24, 24, dtype=torch.float64)
    together = model(x)
    for task in TASKS:
        torch.testing.assert_close(model(x, task)[task], together[task], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(model.export_task(task)(x), together[task], rtol=1e-10, atol=1e-10)


def test_window_attention_of_another_release_is_refused(monkeypatch):
    from timm.models.swin_transformer import WindowAttention

    forward = WindowAttention.forward
    monkeypatch.setattr(WindowAttention, "forward", lambda self, x, mask=None: 1.01 * forward(self, x, mask))
    backbone = MODELS["timm Swin"]().eval()
    first = next(iter(find_blocks(backbone)))
    with pytest.raises(
        ValueError, match=rf"'{first}'.*WindowAttention does not compute what that of the known releases"
    ):
        dtme.expand(backbone, dtme.ExpansionPlan(TASKS, 1, {}, {first: TASKS}))
