"""Which modules are blocks, how wide they are, and plans that name something else."""

import pytest
import torch
from torch import nn

import dtme
from dtme.blocks import find_blocks, module_like
from tests.dtme.clients import CLIENTS, SDPA, WIDTH, OwnBlock, OwnTransformer
from tests.dtme.test_clients import VISION, timm_model, transformers_model

TASKS = ("a", "b")
SPEECH = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 48,
    "conv_dim": (8, 8),
    "conv_kernel": (4, 3),
    "conv_stride": (4, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: transformers_model("Hubert", **SPEECH), ["encoder.layers.0", "encoder.layers.1"]),
        (lambda: transformers_model("WavLM", **SPEECH), ["encoder.layers.0", "encoder.layers.1"]),
        (
            lambda: transformers_model("Swinv2", embed_dim=WIDTH, depths=[2], num_heads=[3], image_size=32),
            ["encoder.layers.0.blocks.0", "encoder.layers.0.blocks.1"],
        ),
        (
            lambda: transformers_model("DonutSwin", embed_dim=WIDTH, depths=[1, 1], num_heads=[3, 3], image_size=32),
            ["encoder.layers.0.blocks.0", "encoder.layers.1.blocks.0"],
        ),
        (lambda: transformers_model("SiglipVision", **VISION), ["encoder.layers.0", "encoder.layers.1"]),
        (
            lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 3, batch_first=True), 2),
            ["layers.0", "layers.1"],
        ),
    ],
    ids=["HuBERT", "WavLM", "Swin v2", "Donut", "SigLIP, whose pooling head attends too", "torch"],
)
def test_blocks_are_the_innermost_layers_that_attend(make, names):
    assert list(find_blocks(make())) == names


def test_the_blocks_of_pvt_v2_are_inside_its_stages():
    import transformers

    config = transformers.PvtV2Config(
        image_size=32,
        num_encoder_blocks=2,
        depths=[1, 2],
        hidden_sizes=[WIDTH, 48],
        num_attention_heads=[3, 3],
        sr_ratios=[2, 1],
        patch_sizes=[4, 2],
        strides=[4, 2],
        mlp_ratios=[2, 2],
    )
    blocks = find_blocks(transformers.PvtV2Model(config))
    assert [type(block).__name__ for block in blocks.values()] == ["PvtV2BlockLayer"] * 3


def test_a_layer_without_an_attention_is_no_block():
    with pytest.raises(ValueError, match="no transformer blocks were recognised"):
        find_blocks(transformers_model("FNet", hidden_size=WIDTH, num_hidden_layers=1, intermediate_size=48))


# --- plans ------------------------------------------------------------------------------------------------------------


def looks(model):
    modules = [
        (name, m.training, len(m._forward_pre_hooks), len(m._forward_hooks), sorted(vars(m)))
        for name, m in model.named_modules()
    ]
    return modules, [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]


WIDTHS = dict.fromkeys(("layers.0", "layers.1", "layers.2"), WIDTH)
WRONG_PLANS = {
    "the backbone": ("", {"modulation": {"": TASKS}}),
    "the backbone with its width": ("", {"modulation": {"": TASKS}, "num_features": {"": WIDTH}}),
    "a container": ("layers", {"expansion": {"layers": TASKS}}),
    "a container with its width": ("layers", {"modulation": {"layers": TASKS}, "num_features": {"layers": WIDTH}}),
    "a container beside blocks": ("layers", {"modulation": {"layers.0": TASKS, "layers": TASKS}}),
    "a part": ("layers.0.mlp", {"modulation": {"layers.0.mlp": TASKS}}),
    "a part with a width": (
        "layers.0.attn",
        {"modulation": {"layers.0.attn": TASKS}, "num_features": {"layers.0.attn": WIDTH}},
    ),
    "a part beside blocks": ("layers.1.mlp", {"modulation": {"layers.1": TASKS, "layers.1.mlp": TASKS}}),
    "a part of a part": ("layers.0.mlp.0", {"expansion": {"layers.0.mlp.0": TASKS}}),
    "a part beside all widths": ("layers.1.mlp", {"modulation": {"layers.1.mlp": TASKS}, "num_features": WIDTHS}),
    "a width left out": ("layers.1", {"modulation": {"layers.1": TASKS}, "num_features": {"layers.0": WIDTH}}),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG_PLANS)
@pytest.mark.parametrize("recognised", [True, False])
def test_plans_that_name_no_block_are_refused(kind, recognised):
    model = OwnTransformer()
    name, fields = WRONG_PLANS[kind]
    if not recognised:  # nothing but the plan tells what the blocks are
        if kind in ("a container", "a part", "a part of a part", "a container with its width", "a part with a width"):
            pytest.skip("may be what its owner calls a block")
        for layer in model.layers:
            layer.mixer = layer._modules.pop("attn")
    before = looks(model)
    with pytest.raises(ValueError, match=repr(name)):
        dtme.expand(model, dtme.ExpansionPlan(TASKS, 1, **fields))
    assert looks(model) == before


@pytest.mark.parametrize("name", ["norm", "pos_drop", "patch_embed", "patch_embed.proj"])
@pytest.mark.parametrize("width", [True, False])
def test_modules_beside_the_blocks_are_refused(name, width):
    vit = CLIENTS["timm ViT"]()
    before = looks(vit)
    if name == "patch_embed" and width:
        pytest.skip("with a width it may be what its owner calls a block")
    with pytest.raises(ValueError, match=repr(name)):
        dtme.expand(vit, dtme.ExpansionPlan(TASKS, 1, {name: TASKS}, {}, {name: WIDTH} if width else {}))
    assert looks(vit) == before


class Unrecognised(nn.Module):
    """A block with an attention that is written out, under names that nobody knows."""

    def __init__(self):
        super().__init__()
        self.first, self.mix, self.last = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        h = self.first(x)
        return x + self.last((h @ self.mix(h).mT).softmax(-1) @ h)


@pytest.mark.parametrize("by_hand", [True, False])
def test_blocks_that_only_their_owner_knows_can_be_modulated(by_hand):
    torch.manual_seed(0)
    backbone = nn.Sequential(Unrecognised(), Unrecognised())
    x = torch.randn(4, 5, WIDTH)
    model = dtme.MultiTaskModel(backbone, {task: nn.Linear(WIDTH, 1) for task in TASKS})
    if by_hand:
        plan = dtme.ExpansionPlan(TASKS, 1, {"0": TASKS})
    else:
        data = [(x, {task: torch.randn(4, 5, 1) for task in TASKS})]
        losses = dict.fromkeys(TASKS, nn.functional.mse_loss)
        plan = dtme.analyze(model, data, losses, blocks=["0", "1"], progress=False).plan(modulation=0.5, expansion=0)
        assert set(plan.num_features) == {"0", "1"}
    before = model(x)
    dtme.expand(model, plan)
    for task, prediction in model(x).items():
        torch.testing.assert_close(prediction, before[task])
    dtme.collapse(model)


class TwoParts(nn.Module):
    """A backbone and a decoder, each with blocks that are recognised; the decoder's take a list."""

    class Decoder(OwnBlock):
        def forward(self, maps):
            return super().forward(torch.cat(maps, 1)).chunk(len(maps), 1)

    def __init__(self):
        super().__init__()
        self.backbone, self.decoder = OwnTransformer(), nn.ModuleList([self.Decoder(SDPA())])
        self.heads = nn.ModuleDict({task: nn.Linear(WIDTH, 1) for task in TASKS})

    def forward(self, x):
        y = self.backbone(x)
        (maps,) = [decode([y, 2 * y]) for decode in self.decoder]
        return {task: head(z) for (task, head), z in zip(self.heads.items(), maps, strict=True)}


def test_blocks_of_a_list_that_was_not_analysed_are_left_alone():
    torch.manual_seed(0)
    net, data = TwoParts(), [torch.randn(4, 5, WIDTH)]

    def step(model, x):
        return {task: y.square().mean() for task, y in model(x).items()}

    before = net(data[0])
    report = dtme.analyze(net, data, step, blocks=["backbone.layers.0", "backbone.layers.1"], progress=False)
    dtme.expand(net, report.plan(modulation=0.5, expansion=0))
    assert {name.rpartition(".")[0] for name, _ in net.named_modules() if name.endswith(".dtme")} <= {
        "backbone.layers.0",
        "backbone.layers.1",
        "backbone.layers.2",
    }
    for task in TASKS:
        with dtme.tasks(net, task):
            torch.testing.assert_close(net(data[0])[task], before[task])


# --- widths and parameters --------------------------------------------------------------------------------------------


class BiasFirst(Unrecognised):
    """Its first linear layer is of its position bias."""

    def __init__(self):
        super().__init__()
        layers = {"bias": nn.Linear(2, 3), **self._modules}
        self._modules.clear()
        self._modules.update(layers)


def test_the_first_linear_layer_is_not_the_width():
    for make in (BiasFirst, lambda: next(iter(find_blocks(transformers_model("Qwen3", **QWEN)).values()))):
        net = nn.Sequential(make())
        dtme.expand(net, dtme.ExpansionPlan(TASKS, 1, {"0": TASKS}))
        assert net[0].dtme.weight["a"].shape == (WIDTH,)


QWEN = {
    **{"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"head_dim": 6, "intermediate_size": 48, "vocab_size": 50},
}


def test_a_measured_width_beats_what_layers_suggest_unless_all_disagree():
    swin = timm_model(
        "swinv2_tiny_window8_256", img_size=32, embed_dim=WIDTH, depths=(1,), num_heads=(3,), window_size=4
    )
    name = next(iter(find_blocks(swin)))
    dtme.expand(swin, dtme.ExpansionPlan(TASKS, 1, {name: TASKS}, {}, {name: WIDTH}))
    assert swin.get_submodule(name).dtme.weight["a"].shape == (WIDTH,)
    dtme.collapse(swin)
    with pytest.raises(ValueError, match=rf"32 channels at block '{name}', which has {WIDTH}"):
        dtme.expand(swin, dtme.ExpansionPlan(TASKS, 1, {name: TASKS}, {}, {name: 32}))


class Packed(torch.Tensor):
    """A weight as quantisers have them: a subclass that calls itself floating and can make no other tensor."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.new_zeros, torch.zeros_like, torch.ones_like, torch.Tensor.new_empty):
            raise NotImplementedError(f"{func.__name__} of a packed weight")
        return super().__torch_function__(func, types, args, kwargs)


def packed(weight):
    return nn.Parameter(weight.detach().as_subclass(Packed), requires_grad=False)


def eight_bit(weight):
    return nn.Parameter(weight.detach().to(torch.float8_e4m3fn), requires_grad=False)


def integer(weight):
    return nn.Parameter(weight.detach().to(torch.int8), requires_grad=False)


@pytest.mark.parametrize("quantise", [packed, eight_bit, integer])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_added_parameters_are_plain_whatever_the_weights_are(quantise, dtype):
    backbone = transformers_model("ViT", **VISION).to(dtype)
    name, block = next(iter(find_blocks(backbone).items()))
    for module in block.modules():
        if isinstance(module, nn.Linear):
            module.weight = quantise(module.weight)
    dtme.expand(backbone, dtme.ExpansionPlan(TASKS, 1, {name: TASKS}))
    for parameter in block.dtme.parameters():
        assert type(parameter) is nn.Parameter and parameter.dtype == dtype and parameter.requires_grad


def test_task_tokens_beside_weights_that_are_subclasses_equal_those_beside_plain_ones():
    torch.manual_seed(0)
    vit, x = transformers_model("ViT", **VISION).eval(), torch.randn(2, 17, WIDTH)
    name, block = next(iter(find_blocks(vit).items()))
    plan, outs = dtme.ExpansionPlan(TASKS, 2, {name: TASKS}, {name: TASKS}), []
    for _ in range(2):
        torch.manual_seed(1)
        dtme.expand(vit, plan)
        for parameter in block.dtme.parameters():
            parameter.data.add_(torch.randn_like(parameter))
        with dtme.tasks(vit, TASKS):
            outs.append(block(x))
        outs[-1].square().sum().backward()
        assert all(parameter.grad is not None for parameter in block.dtme.parameters())
        dtme.collapse(vit)
        for module in block.modules():
            if isinstance(module, nn.Linear):
                module.weight = packed(module.weight)
    torch.testing.assert_close(outs[1].as_subclass(torch.Tensor), outs[0])


def test_what_a_block_computes_in():
    assert module_like(nn.Sequential()).dtype == torch.get_default_dtype()
    mixed = nn.Sequential(nn.Linear(2, 2, dtype=torch.bfloat16), nn.LayerNorm(2))
    assert module_like(mixed).dtype == torch.bfloat16 and type(module_like(mixed)) is torch.Tensor
