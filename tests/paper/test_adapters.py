"""Rivals of equal size: right gradients, a start as the plain model, and the size that was asked for."""

import copy
import json
import pickle
import warnings
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import BertConfig, BertModel, Dinov2Config, Dinov2Model, ViTConfig, ViTModel

import dtme
from benchmarks.paper.structures import ARMS, OfEqualSize
from dtme.rivals import BitFit, LoRA, NormAffine, Prompts
from dtme.rivals.adapters import width_of
from dtme.rivals.units import Kind, choose_units, spread
from dtme.rivals.versions import with_copies, with_low_rank
from tests.paper.small import NAMES, backward, batches, small_model, small_setting

RIVALS = {"LoRA": LoRA, "BitFit": BitFit, "norm affine": NormAffine, "prompts": Prompts}
VERSIONS = ("lora", "bitfit", "norm-affine", "recon")
NORM, QUERY, BIAS = "layers.2.layernorm_before.weight", "layers.1.attention.q_proj.weight", "layers.4.mlp.fc2.bias"


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


# --- a version per task -----------------------------------------------------------------------------------------------


def shaken(model):
    """``model`` with versions that are no longer where they started."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.versions.parameters():
        noise = torch.empty(parameter.shape).uniform_(-0.1, 0.1, generator=generator)
        parameter.data += noise.to(parameter)
    return model


def loss_of(prediction):
    return (prediction + 0.5).square().mean()


def by_copied_models(model, x):
    """Losses and gradients of a plain loop: one whole model per task, whose parameters are that task's values."""
    losses, of_parameter, of_value = {}, {}, {}
    for task in model.tasks:
        single = copy.deepcopy(model.model)
        for name, value in model.values(task).items():
            single.backbone.get_parameter(name).data.copy_(value)
        single.requires_grad_(True)
        losses[task] = loss_of(single(x)[task])
        losses[task].backward()
        for name, parameter in single.named_parameters():
            if parameter.grad is not None:
                of_value[task, name] = parameter.grad
                of_parameter[name] = of_parameter.get(name, 0) + parameter.grad
    return losses, of_parameter, of_value


@pytest.mark.parametrize("kind", ["copies", "low rank"])
def test_gradients_are_those_of_a_loop_over_copied_models(kind):
    exact = {"atol": 1e-12, "rtol": 1e-12}
    plain = small_model().double().eval()
    if kind == "copies":
        model = shaken(with_copies(plain, [NORM, QUERY, BIAS]))
    else:
        model = shaken(with_low_rank(plain, {QUERY: 2, "layers.5.mlp.fc1.weight": 1}, seed=0))
    x = batches()[0][0].double()
    want, of_parameter, of_value = by_copied_models(model, x)
    losses = {task: loss_of(prediction) for task, prediction in model(x).items()}
    torch.stack(list(losses.values())).sum().backward()
    for task in model.tasks:
        torch.testing.assert_close(losses[task], want[task], **exact)
        for name, version in zip(model.names, model.versions[task].values(), strict=True):
            grad = of_value[task, f"backbone.{name}"]
            if kind == "copies":
                torch.testing.assert_close(version.value.grad, grad, **exact)
            else:  # of W + B A: dB = dW Aᵀ, dA = Bᵀ dW
                torch.testing.assert_close(version.up.grad, grad @ version.down.T, **exact)
                torch.testing.assert_close(version.down.grad, version.up.T @ grad, **exact)
    for name, parameter in model.model.named_parameters():
        if name.removeprefix("backbone.") in model.retired:
            assert parameter.grad is None and not parameter.requires_grad
        else:
            torch.testing.assert_close(parameter.grad, of_parameter[name], **exact)
    assert bool(model.retired) == (kind == "copies")


@pytest.mark.parametrize("name", VERSIONS)
def test_rivals_start_as_the_plain_model_train_and_survive_a_pickle(name):
    x, _ = batches()[0]
    want = small_model().eval()(x)
    model, facts = ARMS[name].structure().apply(small_setting())
    json.dumps(facts, allow_nan=False)
    for task, prediction in model.eval()(x).items():
        assert torch.equal(prediction, want[task])
    backward(model.train())
    for parameter in [p for group in model.parameter_groups() for p in group["params"]]:
        assert parameter.requires_grad and parameter.grad is not None and parameter.grad.isfinite().all()
    again = pickle.loads(pickle.dumps(model)).eval()(x)
    also = copy.deepcopy(model).eval()(x)
    for task, prediction in model.eval()(x).items():
        assert torch.equal(again[task], prediction) and torch.equal(also[task], prediction)


def test_prompts_train_and_differ_by_little_at_first():
    x, _ = batches()[0]
    want = small_model().eval()(x)
    model, facts = ARMS["prompts"].structure().apply(small_setting())
    json.dumps(facts, allow_nan=False)
    assert facts["plan"]["num_tokens"] == 4 and len(facts["plan"]["expansion"]) == 6 and not facts["plan"]["modulation"]
    for task, prediction in model.eval()(x).items():
        assert 0 < (prediction - want[task]).norm() < 0.5 * want[task].norm()
    backward(model.train())
    assert all(p.grad.any() for name, p in model.named_parameters() if ".dtme." in name)


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


def test_a_tasks_prediction_does_not_depend_on_which_are_asked_for():
    model = shaken(with_copies(small_model().eval(), [NORM, BIAS]))
    x, _ = batches()[0]
    everything = model(x)
    assert list(everything) == list(NAMES) == list(model.tasks)
    assert list(model(x, ["depth", "semseg"])) == ["depth", "semseg"]
    for task in NAMES:
        assert torch.equal(model(x, task)[task], everything[task])
    assert len({round(everything[task].std().item(), 6) for task in NAMES}) == 3
    with pytest.raises(ValueError, match="unknown task 'parts'"):
        model(x, "parts")


@pytest.mark.parametrize("name", VERSIONS)
def test_parameters_are_shared_or_a_tasks_or_retired(name):
    model, facts = ARMS[name].structure().apply(small_setting())
    shared, own = model.shared_parameters(), [p for task in model.tasks for p in model.task_parameters(task)]
    retired = [model.model.backbone.get_parameter(each) for each in model.retired]
    parts = [id(p) for p in (*shared, *own, *retired)]
    assert sorted(parts) == sorted(id(p) for p in model.parameters())
    assert sum(p.numel() for p in retired) == facts["retired"]
    base, added = model.parameter_groups(lr=0.5, weight_decay=0.25)
    assert (base["weight_decay"], added["weight_decay"], added["lr"]) == (0.25, 0, 0.5)
    assert sum(p.numel() for p in added["params"]) == facts["added"]
    trained = {id(p) for group in (base, added) for p in group["params"]}
    assert trained == {id(p) for p in (*shared, *own)}
    per_task = {sum(p.numel() for p in model.versions[task].parameters()) for task in model.tasks}
    assert per_task == {facts["added"] // len(NAMES)}


def test_training_moves_the_tasks_apart_and_leaves_what_is_retired():
    model = with_copies(small_model(), [NORM])
    before = model.model.backbone.get_parameter(NORM).clone()
    optimizer = torch.optim.Adam(model.parameter_groups(lr=1e-3))
    for batch in batches()[:2]:
        optimizer.zero_grad()
        backward(model, batch)
        optimizer.step()
    assert torch.equal(model.model.backbone.get_parameter(NORM), before)
    first, second, third = (model.values(task)[NORM] for task in model.tasks)
    assert not torch.equal(first, second) and not torch.equal(second, third)


def test_what_a_version_per_task_cannot_be_right_for_is_refused():
    decoder = dtme.MultiTaskModel(nn.Linear(2, 2), decoder=lambda features: features, tasks=["a"])
    with pytest.raises(ValueError, match="no decoder"):
        with_copies(decoder, ["weight"])
    norm = dtme.MultiTaskModel(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), {"a": nn.Identity()})
    with pytest.raises(ValueError, match="'1' is a batch norm"):
        with_copies(norm, ["0.weight"])


# --- sizes ------------------------------------------------------------------------------------------------------------

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


def test_no_size_and_unknown_layers_are_refused():
    with pytest.raises(ValueError, match="adds nothing"):
        OfEqualSize(LoRA).apply(small_setting(modulation=0, expansion=0))
    from timm.models.vision_transformer import Block

    fused = dtme.MultiTaskModel(nn.Sequential(Block(8, 2)), {"a": nn.Linear(8, 1)})
    for rival in (LoRA, BitFit):
        with pytest.raises(ValueError, match=r"block '0' of Sequential has no linear layers of queries.*attn\.qkv"):
            rival().fit(fused, 100, 0)


def test_the_budget_is_that_of_the_reference_plan():
    for options in ({}, {"num_tokens": 1}, {"modulation": 1.0, "expansion": 1 / 3}):
        made = small_setting(**options)
        _, facts = OfEqualSize(NormAffine).apply(small_setting(**options))
        plan, _ = ARMS["tm+te"].structure().plan(made)
        assert facts["budget"] == made.budget == plan.added_parameters()


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
