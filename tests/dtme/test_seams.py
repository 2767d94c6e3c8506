"""Ways into an attention: no state of a running forward, masks, weights, and what block arguments mean by library."""

import copy
import pickle
import threading
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dtme
from dtme.block.site import find_attention
from dtme.blocks import find_blocks
from dtme.seams import UNKNOWN, argument_axis, is_known, plain_attention
from tests.dtme.clients import CLIENTS, WIDTH, OwnBlock
from tests.dtme.test_clients import VISION, randomised, timm_model, transformers_model

TASKS = ("a", "b")
VIDEO = {**VISION, "num_frames": 2, "tubelet_size": 2}
# what hands its keywords on to its attention function, and what does not
MODELS = {
    "transformers ViT": (lambda: transformers_model("ViT", **VISION), True),
    "transformers CLIP vision": (lambda: transformers_model("CLIPVision", **VISION), True),
    "transformers VideoMAE": (lambda: transformers_model("VideoMAE", **VIDEO), False),
    "transformers SigLIP vision": (lambda: transformers_model("SiglipVision", **VISION), False),
    "transformers AIMv2 vision": (lambda: transformers_model("Aimv2Vision", **VISION), False),
    "timm ViT": (CLIENTS["timm ViT"], None),
    "own, generic": (CLIENTS["own, generic seam"], None),
}


def first_site(name):
    torch.manual_seed(0)
    backbone = MODELS[name][0]().double().eval()
    block_name, block = next(iter(find_blocks(backbone).items()))
    return find_attention(block_name, block, WIDTH), block


def scaled(factor, query, key, value, **options):
    return factor * F.scaled_dot_product_attention(query, key, value, **options)


def output(result):
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize("name", MODELS)
def test_threads_do_not_hear_each_others_inner_products(name):
    """Two threads are inside one attention at the same time, each with an inner product of its own."""
    site, _ = first_site(name)
    site.seam.install(partial(site.seam.run, F.scaled_dot_product_attention))
    x, barrier, results = torch.randn(2, 5, WIDTH).double(), threading.Barrier(2), {}

    def attend(factor, *args, **options):
        barrier.wait(10)
        out = scaled(factor, *args, **options)
        barrier.wait(10)
        return out

    def run(factor):
        results[factor] = output(site.seam.run(partial(attend, factor), x))

    threads = [threading.Thread(target=run, args=(factor,)) for factor in (1.0, 2.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for factor, got in results.items():
        want = output(site.seam.run(partial(scaled, factor), x))
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(results[1.0], results[2.0])
    site.seam.remove()


@pytest.mark.parametrize("name", MODELS)
def test_how_the_inner_product_travels_is_found_by_trying_and_compiles_in_one_graph(name):
    site, _ = first_site(name)
    assert getattr(site.seam, "_hands_on", None) == MODELS[name][1]
    site.seam.install(partial(site.seam.run, F.scaled_dot_product_attention))
    x, attend = torch.randn(2, 5, WIDTH).double(), partial(scaled, 2.0)
    want = output(site.seam.run(attend, x))
    torch.compiler.reset()
    got = output(torch.compile(partial(site.seam.run, attend), fullgraph=True, backend="eager")(x))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_expanded_copies_and_pickles_run_on(name):
    torch.manual_seed(0)
    backbone = MODELS[name][0]().double().eval()
    names = list(find_blocks(backbone))
    randomised(backbone, dtme.ExpansionPlan(TASKS, 2, {}, {names[0]: ("a",), names[1]: TASKS}))
    x = torch.randn(2, 5, WIDTH) if "own" in name else torch.randn(2, 3, 32, 32)
    x = x[:, :, :16, :16] if "timm" in name else x[:, None].repeat(1, 2, 1, 1, 1) if "VideoMAE" in name else x
    want = next(
        iter(dtme.split(backbone(x.double()), TASKS)["b"].values() if "transf" in name else [backbone(x.double())])
    )
    for other in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
        got = other(x.double())
        got = next(iter(dtme.split(got, TASKS)["b"].values())) if "transf" in name else got
        assert torch.equal(got, want)
    vars_before = {module: set(vars(module)) for module in backbone.modules()}
    backbone(x.double())
    assert all(set(vars(module)) == known for module, known in vars_before.items())


def test_nothing_is_left_behind_by_trying():
    """Random state, modes, buffers, hooks and attributes are as before, and nobody's hook was called after the norm."""
    backbone = transformers_model("ViT", **VISION).train()
    name, block = next(iter(find_blocks(backbone).items()))
    block.layernorm_before.eval()
    calls = []
    block.mlp.register_forward_hook(lambda *args: calls.append(args))
    seed, modes = torch.get_rng_state(), [m.training for m in block.modules()]
    attributes = [set(vars(m)) for m in block.modules()]
    find_attention(name, block, WIDTH)
    assert torch.equal(torch.get_rng_state(), seed) and [m.training for m in block.modules()] == modes
    assert [set(vars(m)) for m in block.modules()] == attributes and not calls
    assert block.attention.config is backbone.config


@pytest.mark.parametrize("name", ["transformers ViT", "timm ViT", "own, generic"])
def test_models_without_numbers_are_expanded_too(name):
    with torch.device("meta"):
        backbone = MODELS[name][0]()
    first = next(iter(find_blocks(backbone)))
    dtme.expand(backbone, dtme.ExpansionPlan(TASKS, 1, {first: TASKS}, {first: TASKS}))
    assert all(parameter.is_meta for parameter in backbone.get_submodule(first).dtme.parameters())


# --- nn.MultiheadAttention ------------------------------------------------------------------------------------------


class Multihead(nn.Module):
    """``use`` makes a block's output of what its nn.MultiheadAttention returns."""

    def __init__(self, use, **options):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(WIDTH), nn.MultiheadAttention(WIDTH, 3, batch_first=True, **options)
        self.mlp, self.use = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)), use

    def forward(self, x, attn_mask=None, key_padding_mask=None):
        h = self.norm1(x)
        x = x + self.use(*self.attn(h, h, h, attn_mask=attn_mask, key_padding_mask=key_padding_mask))
        return x + self.mlp(x)


def thrown_away(out, weights):
    return out


def used(out, weights):
    return out * weights.amax(-1, keepdim=True)


def used_by_column(out, weights):
    return out + weights.sum(-2)[..., None]


@pytest.mark.parametrize("use", [used, used_by_column])
def test_blocks_that_use_attention_weights_are_refused(use):
    net = nn.Sequential(Multihead(thrown_away), Multihead(use)).double()
    with pytest.raises(ValueError, match=r"block '1'.*uses the weights"):
        dtme.expand(net, dtme.ExpansionPlan(TASKS, 1, {}, {"1": TASKS}, {"0": WIDTH, "1": WIDTH}))
    assert not [name for name, _ in net.named_parameters() if ".dtme." in name]


@pytest.mark.parametrize("average", [True, False])
def test_weights_that_are_asked_for_are_those_of_the_blocks_own_keys(average):
    torch.manual_seed(0)
    block = Multihead(thrown_away).double()
    site = find_attention("b", block, WIDTH)
    h = torch.randn(2, 5, WIDTH).double()
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
    options = {"attn_mask": mask, "average_attn_weights": average}
    got = site.seam.run(plain_attention, h, h, h, **options)
    for mine, torchs in zip(got, block.attn(h, h, h, **options), strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-10, atol=1e-10)
    assert site.seam.run(plain_attention, h, h, h, need_weights=False)[1] is None


@pytest.mark.parametrize("options", [{"add_zero_attn": True}, {"add_bias_kv": True}, {"kdim": 8}])
def test_multihead_attention_with_other_keys_is_refused(options):
    net = nn.Sequential(Multihead(thrown_away), Multihead(thrown_away, **options))
    with pytest.raises(
        ValueError, match=rf"block '1'.*{next(iter(options)) if 'kdim' not in options else 'kdim or vdim'}"
    ):
        dtme.expand(net, dtme.ExpansionPlan(TASKS, 1, {}, {"1": TASKS}))


def test_masks_by_image_and_head_and_shared_ones():
    torch.manual_seed(0)
    block = Multihead(thrown_away).double()
    site = find_attention("b", block, WIDTH)
    h, padding = torch.randn(4, 5, WIDTH).double(), torch.arange(5) >= torch.tensor([[5], [3], [4], [5]])
    for mask in (torch.randn(5, 5).double(), torch.randn(12, 5, 5).double(), torch.rand(12, 5, 5) > 0.8):
        mask = mask & ~torch.eye(5, dtype=torch.bool) if mask.dtype == torch.bool else mask
        both = {"attn_mask": mask, "key_padding_mask": padding if mask.dtype == torch.bool else padding.double() * -1e9}
        for given in (both, {"attn_mask": mask}):
            want = block.attn(h, h, h, need_weights=False, **given)[0]
            got = site.seam.run(F.scaled_dot_product_attention, h, h, h, need_weights=False, **given)[0]
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("masks", [{"key_padding_mask": (2, 5)}, {"attn_mask": (6, 5, 5)}, {"attn_mask": (3, 5, 5)}])
def test_masks_of_other_rows_are_refused_rather_than_repeated(masks):
    site = find_attention("b", Multihead(thrown_away), WIDTH)
    h, masks = torch.randn(4, 5, WIDTH), {name: torch.zeros(shape) for name, shape in masks.items()}
    with pytest.raises(ValueError, match=rf"block 'b': its attention has 4 rows.*{next(iter(masks))}"):
        site.seam.run(F.scaled_dot_product_attention, h, h, h, **masks)


# --- what reaches the attention -------------------------------------------------------------------------------------


class Attention(nn.Module):
    """One inner product, with something about the keys that ``change`` adds."""

    def __init__(self, change):
        super().__init__()
        self.qkv, self.out, self.change = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), change

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 3, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k, v, mask = self.change(q, k, v)
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


def unchanged(q, k, v):
    return q, k, v, None


def distance_bias(q, k, v):
    place = torch.arange(q.shape[2], dtype=q.dtype)
    return q, k, v, -(place[:, None] - place).abs()


def rotated_by_place(q, k, v):
    place = torch.arange(q.shape[2], dtype=q.dtype)[:, None]
    turn = lambda x: x * place.cos() + torch.cat([-x[..., 4:], x[..., :4]], -1) * place.sin()  # noqa: E731
    return turn(q), turn(k), v, None


def centred_keys(q, k, v):
    return q, k - k.mean(2, keepdim=True), v, None


class MixedAfter(OwnBlock):
    """A convolution along the tokens behind the attention, as in speech encoders."""

    def __init__(self):
        super().__init__(Attention(unchanged))
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x):
        x = super().forward(x)
        return x + self.conv(x.transpose(1, 2)).transpose(1, 2)


REFUSED = {
    "a bias by distance": (lambda: OwnBlock(Attention(distance_bias)), "would not compute what it does"),
    "rotary positions": (
        lambda: OwnBlock(Attention(rotated_by_place)),
        "keys and values of a token that depend on where it is",
    ),
    "centred keys": (lambda: OwnBlock(Attention(centred_keys)), "would not compute what it does"),
    "a convolution behind": (MixedAfter, "would not compute what it does"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_what_would_not_equal_concatenation_is_refused_by_name(kind, dtype):
    torch.manual_seed(0)
    make, match = REFUSED[kind]
    net = nn.Sequential(OwnBlock(Attention(unchanged)), make()).to(dtype)
    plan = dtme.ExpansionPlan(TASKS, 1, {"0": TASKS}, {"0": TASKS, "1": TASKS}, {"0": WIDTH, "1": WIDTH})
    with pytest.raises(ValueError, match=rf"block '1'.*{match}"):
        dtme.expand(net, plan)
    dtme.expand(net, dtme.ExpansionPlan(TASKS, 1, {"0": TASKS, "1": TASKS}, {"0": TASKS}, plan.num_features))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_rounding_is_no_reason_to_refuse(dtype, scale):
    for seed in range(5):
        torch.manual_seed(seed)
        block = OwnBlock(Attention(unchanged))
        for parameter in block.parameters():
            parameter.data.mul_(scale)
        find_attention("b", block.to(dtype), WIDTH)


# --- arguments ------------------------------------------------------------------------------------------------------


def test_what_arguments_mean():
    layer = nn.TransformerEncoderLayer(WIDTH, 3, 48, batch_first=True)
    bert = next(iter(find_blocks(CLIENTS["transformers BERT"]()).values()))
    vit = next(iter(find_blocks(CLIENTS["timm ViT"]()).values()))
    eva = next(iter(find_blocks(timm_model("eva02_tiny_patch14_224", embed_dim=WIDTH, depth=1, num_heads=3)).values()))
    square, heads, flat = torch.zeros(5, 5), torch.zeros(6, 5, 5), torch.zeros(2, 5)
    expected = [
        (layer, "src_mask", square, None),
        (layer, 1, heads, 0),
        (layer, 2, flat, 0),
        (layer, "src_key_padding_mask", flat, 0),
        (bert, "attention_mask", torch.zeros(2, 1, 5, 5), 0),
        (bert, 1, torch.zeros(2, 1, 5, 5), 0),
        (bert, "position_embeddings", torch.zeros(5, 8), None),
        (bert, "something", square, UNKNOWN),
        (vit, "attn_mask", square, None),
        (vit, 1, torch.zeros(2, 1, 5, 5), 0),
        (vit, 9, square, UNKNOWN),
        (eva, "rope", torch.zeros(5, 8), None),
        (eva, 1, torch.zeros(2, 1, 5, 8), 0),
        (OwnBlock(nn.Identity()), "mask", square, UNKNOWN),
    ]
    for block, name, tensor, axis in expected:
        assert argument_axis(block, name, tensor) is axis or argument_axis(block, name, tensor) == axis, name
    assert is_known(layer) and is_known(bert) and not is_known(OwnBlock(nn.Identity()))

    class Overridden(nn.TransformerEncoderLayer):
        def forward(self, src, src_mask=None):
            return src

    assert argument_axis(Overridden(WIDTH, 3, batch_first=True), 1, square) is UNKNOWN


@pytest.mark.parametrize("name", ["Llama", "Ernie4_5", "StableLm", "Persimmon"])
def test_rotary_attentions_take_task_tokens_without_a_position(name):
    """Whole or partial rotations, and cosines that the model halves; compiled in one graph."""
    torch.manual_seed(0)
    config = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 3}
    config |= {"vocab_size": 50, "intermediate_size": 48, "head_dim": 8} if name == "Ernie4_5" else {"vocab_size": 50}
    backbone = transformers_model(
        name, **config, **({} if "intermediate_size" in config else {"intermediate_size": 48})
    )
    model = dtme.MultiTaskModel(backbone.double().eval(), {task: nn.Identity() for task in TASKS})
    first, second = find_blocks(backbone)
    randomised(model, dtme.ExpansionPlan(TASKS, 2, {}, {first: ("a",), second: TASKS}))
    x = {"input_ids": torch.randint(2, 50, (2, 7)), "attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3])}
    together = model(x)
    for task in TASKS:
        torch.testing.assert_close(model(x, task)[task], together[task], rtol=1e-9, atol=1e-9)
    site, tokens = backbone.get_submodule(first).dtme.site, torch.randn(1, 2, WIDTH).double()
    key, value = site.seam.keys_values(tokens)
    torch.compiler.reset()
    compiled = torch.compile(site.seam.keys_values, fullgraph=True, backend="eager")
    for got, want in zip(compiled(tokens), (key, value), strict=True):
        torch.testing.assert_close(got, want)
    attention = site.seam.attention
    if hasattr(attention, "k_proj"):
        torch.testing.assert_close(key, attention.k_proj(tokens).unflatten(-1, (3, -1)).transpose(1, 2))
