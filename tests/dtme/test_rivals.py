"""Rivals on the backbones of several libraries: the size that was asked for, where it goes, and what is refused."""

import copy
import warnings
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import BertConfig, BertModel, Dinov2Config, Dinov2Model, ViTConfig, ViTModel

import dtme
from dtme.rivals import BitFit, LoRA, NormAffine, Prompts
from dtme.rivals.adapters import width_of
from dtme.rivals.units import Kind, choose_units, spread
from dtme.rivals.versions import with_copies, with_low_rank
from tests.dtme.clients import CLIENTS, WIDTH, OwnTransformer, make_input

RIVALS = {"LoRA": LoRA, "BitFit": BitFit, "norm affine": NormAffine, "prompts": Prompts}


def text_model(dropout=0.5):
    """A BERT, post-norm, with dropout, and two tasks of a token each."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return dtme.MultiTaskModel(
        BertModel(config, add_pooling_layer=False), {"a": nn.Linear(16, 3), "b": nn.Linear(16, 2)}
    )


def test_in_training_with_dropout_too_it_starts_as_the_plain_model():
    plain = text_model()
    x = {"input_ids": torch.randint(50, (3, 7), generator=torch.Generator().manual_seed(0))}
    torch.manual_seed(5)
    want = plain(x)
    drawn = torch.get_rng_state()
    model = with_low_rank(plain, {"encoder.layer.0.attention.self.query.weight": 1}, seed=0)
    torch.manual_seed(5)
    for task, prediction in model(x).items():
        assert torch.equal(prediction, want[task])
    assert torch.equal(torch.get_rng_state(), drawn)  # so that arms of a seed go on with the same numbers


def test_what_a_version_per_task_cannot_be_right_for_is_refused():
    decoder = dtme.MultiTaskModel(nn.Linear(2, 2), decoder=lambda features: features, tasks=["a"])
    with pytest.raises(ValueError, match="no decoder"):
        with_copies(decoder, ["weight"])
    norm = dtme.MultiTaskModel(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), {"a": nn.Identity()})
    with pytest.raises(ValueError, match="'1' is a batch norm"):
        with_copies(norm, ["0.weight"])


BACKBONES = {
    "ViT-T": lambda: ViTModel(ViTConfig(hidden_size=192, num_attention_heads=3, intermediate_size=768)),
    "ViT-S": lambda: ViTModel(ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536)),
    "DINOv2-S": lambda: Dinov2Model(Dinov2Config(hidden_size=384, num_attention_heads=6)),
    "MiniLM": lambda: BertModel(BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536)),
}


def counted(backbone, num_tasks):
    """A model without values."""
    with torch.device("meta"):
        network = BACKBONES[backbone]()
        heads = {f"task{i}": nn.Linear(network.config.hidden_size, 1) for i in range(num_tasks)}
        return dtme.MultiTaskModel(network, heads)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_rivals_are_of_equal_size(backbone):
    for num_tasks, tokens in product((2, 4, 5, 11), (1, 6)):
        plain = counted(backbone, num_tasks)
        num_blocks, width = plain.backbone.config.num_hidden_layers, width_of(plain.backbone)
        budget = num_tasks * width * (2 + tokens) * (num_blocks // 2)
        for name in ("LoRA", "BitFit", "norm affine"):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                model, facts = RIVALS[name]().fit(copy.deepcopy(plain), budget, seed=0)
            added = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in plain.parameters())
            assert added == facts["added"] and facts["unmatched"] is None, name
            assert abs(added / budget - 1) < 0.02 and facts["deviation"] == added / budget - 1
        assert abs(Prompts().plan(plain, budget).added_parameters() / budget - 1) < 0.02


def blocks_of(chosen):
    return [int(name.split("layers.")[1].split(".")[0]) for name in chosen]


def test_units_are_spread_over_the_depth():
    plain = counted("ViT-T", 4)
    budget = 4 * 192 * 18
    _, facts = LoRA().fit(copy.deepcopy(plain), budget, 0)
    assert set(facts["chosen"].values()) == {1} and len(facts["chosen"]) == 9
    for part, count in (("q_proj", 5), ("v_proj", 4)):
        where = blocks_of(name for name in facts["chosen"] if part in name)
        assert len(where) == count and max(b - a for a, b in pairwise(where)) <= 3
    _, facts = BitFit().fit(copy.deepcopy(plain), budget, 0)
    assert not [name for name in facts["chosen"] if "k_proj" in name]
    assert {name.split("layers.")[1].split(".", 1)[1] for name in facts["chosen"]} == {
        "attention.q_proj.bias",
        "attention.v_proj.bias",
        "attention.o_proj.bias",
        "mlp.fc2.bias",
        "layernorm_before.bias",
        "layernorm_after.bias",
    }
    assert len(set(blocks_of(facts["chosen"]))) >= 10
    _, facts = NormAffine().fit(copy.deepcopy(plain), 4 * 192 * 9, 0)
    weights = [name for name in facts["chosen"] if name.endswith("weight")]
    assert len(facts["chosen"]) == 9 and len(weights) == 5  # four norms, and the weight of one more
    plan = Prompts().plan(plain, budget)
    assert plan.num_tokens == 2 and len(plan.expansion) == 9 and not plan.modulation


def test_lora_takes_higher_ranks_of_queries_and_values_and_then_other_layers():
    plain = counted("ViT-T", 2)
    _, facts = LoRA().fit(copy.deepcopy(plain), 2 * 192 * 2 * 36, 0)
    ranks = facts["chosen"]
    assert len(ranks) == 24 and sorted(ranks.values()) == [1] * 12 + [2] * 12
    assert {name.split(".")[-2] for name in ranks} == {"q_proj", "v_proj"}
    _, facts = LoRA().fit(copy.deepcopy(plain), 2 * 192 * 9, 0)  # queries and values come in even numbers of 192
    others = [name for name in facts["chosen"] if name.split(".")[-2] not in ("q_proj", "v_proj")]
    assert facts["added"] == 2 * 192 * 9 and len(facts["chosen"]) == 3 and "mlp" in others[0]


@pytest.mark.parametrize("name", ["BitFit", "norm affine"])
def test_a_budget_that_a_rival_cannot_reach_is_said_with_its_name(name):
    plain = counted("ViT-T", 4)
    with pytest.warns(UserWarning, match=f"^{name} has no choice .* of 1,000,000 parameters: .*-"):
        _, facts = RIVALS[name]().fit(plain, 1_000_000, 0)
    assert facts["unmatched"].startswith(name) and facts["deviation"] < -0.02


def torch_encoder():
    layer = nn.TransformerEncoderLayer(WIDTH, 3, 48, dropout=0.0, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)


FUSED = {"timm ViT": (CLIENTS["timm ViT"], "attn.qkv.weight"), "own": (OwnTransformer, "attn.qkv.weight")}
FUSED["torch"] = (torch_encoder, "self_attn.in_proj_weight")


@pytest.mark.parametrize("name", FUSED)
def test_hosts_with_one_fused_projection_and_no_config_have_every_rival(name):
    make, projection = FUSED[name]
    x = make_input("timm ViT").float() if name == "timm ViT" else torch.randn(3, 5, WIDTH)
    plain = dtme.MultiTaskModel(make(), {task: nn.Linear(WIDTH, 1) for task in "ab"}).eval()
    assert width_of(plain.backbone) == WIDTH
    want, budget = plain(x), 2 * WIDTH * 12
    for rival, kind in RIVALS.items():
        model, facts = kind().fit(copy.deepcopy(plain), budget, 0)
        added = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in plain.parameters())
        assert added == facts["added"] and abs(added / budget - 1) < 0.02, rival
        if rival != "prompts":
            assert all(torch.equal(found, want[task]) for task, found in model.eval()(x).items())
        torch.stack([found.square().mean() for found in model.train()(x).values()]).sum().backward()
        trained = [p for group in model.parameter_groups() for p in group["params"]]
        assert all(p.grad is not None for p in trained), rival
        if rival == "LoRA":
            assert any(chosen.endswith(projection) for chosen in facts["chosen"])


def test_unknown_layers_are_refused():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn, self.mlp = nn.Sequential(nn.Linear(8, 8)), nn.Linear(8, 8)

    unknown = dtme.MultiTaskModel(nn.Sequential(Block()), {"a": nn.Linear(8, 1)})
    with pytest.raises(ValueError, match=r"block '0' of Sequential has no linear layers of queries.*attn\.0"):
        LoRA().fit(unknown, 100, 0)
    with pytest.raises(ValueError, match="no block has a layer with weight and bias"):
        NormAffine().fit(unknown, 100, 0)


KINDS = st.tuples(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(1, 9), st.integers(1, 2))


@given(st.lists(KINDS, min_size=1, max_size=3), st.integers(1, 120))
def test_no_other_choice_is_nearer_to_the_budget_nor_takes_a_unit_too_often(shapes, budget):
    kinds = [
        Kind(
            tuple(tuple((f"{k}.{lane}.{i}",) for i in range(length)) for lane, length in enumerate(lengths)),
            cost,
            sum(lengths) * times,
        )
        for k, (lengths, cost, times) in enumerate(shapes)
    ]
    chosen = choose_units(kinds, budget)
    total = 0
    for name, times in chosen.items():
        _, cost, most = shapes[int(name.split(".")[0])]
        assert 1 <= times <= most
        total += times * cost
    every = product(*(range(kind.most + 1) for kind in kinds))
    nearest = min(abs(budget - sum(n * kind.cost for n, kind in zip(counts, kinds, strict=True))) for counts in every)
    assert abs(budget - total) == nearest


@given(st.integers(1, 40), st.data())
def test_spread_is_even(places, data):
    count = data.draw(st.integers(1, places))
    where = spread(count, places)
    assert len(set(where)) == count and min(where) >= 0 and max(where) < places
    gaps = [b - a for a, b in pairwise(where)]
    assert not gaps or max(gaps) - min(gaps) <= 1
