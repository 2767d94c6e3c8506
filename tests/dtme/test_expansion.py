"""Expanding: against concatenating task tokens before a block and dropping them after it, and back again."""

import copy

import pytest
import torch
from torch import nn

import dtme
from dtme.blocks import find_blocks
from tests.dtme.clients import CLIENTS, TASKS


def some_plan(model, num_tokens=2, partial=False):
    """Modulation in blocks 0 and 1, tokens in 1 and 2; partial leaves tasks out, so that streams stay shared."""
    first, second, third = find_blocks(model.backbone)
    if partial:
        return dtme.ExpansionPlan(
            TASKS,
            num_tokens,
            {second: ("depth",), third: ("semseg", "depth")},
            {second: ("depth",), third: ("normals",)},
        )
    return dtme.ExpansionPlan(TASKS, num_tokens, {first: TASKS, second: TASKS}, {second: TASKS, third: TASKS})


def added_parameters(model):
    return {name.removeprefix("backbone."): p for name, p in model.named_parameters() if ".dtme." in name}


@pytest.mark.parametrize("partial", [False, True], ids=["all tasks", "some tasks"])
@pytest.mark.parametrize("client", CLIENTS)
def test_equals_concatenation_in_outputs_and_all_gradients(build, randomise, naive, client, partial):
    plain, x = build(client)
    expanded = dtme.expand(copy.deepcopy(plain), some_plan(plain, partial=partial))
    randomise(expanded)
    out = expanded(x)
    sum(
        (prediction * torch.linspace(-1, 1, prediction.numel()).view_as(prediction)).sum()
        for prediction in out.values()
    ).backward()

    added = {name: p.detach().clone().requires_grad_() for name, p in added_parameters(expanded).items()}
    for task in TASKS:
        want = naive(plain, added, task, x)
        torch.testing.assert_close(out[task], want, rtol=1e-10, atol=1e-10)
        (want * torch.linspace(-1, 1, want.numel()).view_as(want)).sum().backward()
    for name, parameter in plain.named_parameters():
        got = expanded.get_parameter(name).grad
        assert (got is None) == (parameter.grad is None), name
        if got is not None:
            torch.testing.assert_close(got, parameter.grad, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    for name, parameter in added.items():
        torch.testing.assert_close(expanded.backbone.get_parameter(name).grad, parameter.grad, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("chosen", [("depth",), ("normals", "semseg")])
def test_chosen_tasks_predict_what_they_do_among_all(build, randomise, client, chosen):
    model, x = build(client)
    dtme.expand(model, some_plan(model, partial=True))
    randomise(model)
    everything, some = model(x), model(x, chosen)
    assert list(some) == list(chosen)
    for task in chosen:
        torch.testing.assert_close(some[task], everything[task], rtol=1e-12, atol=1e-12)
    assert torch.equal(model(x, "depth")["depth"], model(x, ["depth"])["depth"])


@pytest.mark.parametrize("client", CLIENTS)
def test_affine_plan_starts_as_the_identity(build, client):
    model, x = build(client)
    before = model(x)
    blocks = tuple(find_blocks(model.backbone))
    dtme.expand(model, dtme.ExpansionPlan(TASKS, 1, {blocks[0]: TASKS, blocks[2]: TASKS}))
    for task, prediction in model(x, TASKS).items():
        torch.testing.assert_close(prediction, before[task], rtol=1e-12, atol=1e-12)
    for task in TASKS:  # alone, no batch is folded and nothing at all may change
        assert torch.equal(model(x, task)[task], before[task])


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("freeze", [False, True])
def test_collapse_restores_bit_for_bit(build, randomise, client, freeze):
    model, x = build(client)
    before, keys = model(x), list(model.state_dict())
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    dtme.expand(model, some_plan(model), freeze_backbone=freeze)
    randomise(model)
    assert not torch.equal(model(x)["depth"], before["depth"])
    assert dtme.collapse(model) is model
    assert list(model.state_dict()) == keys and all(p.requires_grad for p in model.parameters())
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()} == hooks
    after = model(x)
    assert all(torch.equal(before[task], after[task]) for task in before)
    dtme.expand(model, some_plan(model))  # and it can be expanded again


def test_names_shapes_and_start_of_what_is_added(build):
    model, _ = build()
    base = list(model.state_dict())
    block = list(find_blocks(model.backbone))[1]
    torch.manual_seed(0)
    dtme.expand(model, dtme.ExpansionPlan(TASKS, 400, {block: TASKS}, {block: ("depth",)}))
    added = {name: p for name, p in model.named_parameters() if name not in base}
    want = {f"backbone.{block}.dtme.{kind}.{task}": (24,) for kind in ("weight", "bias") for task in TASKS}
    want[f"backbone.{block}.dtme.tokens.depth"] = (400, 24)
    assert {name: tuple(p.shape) for name, p in added.items()} == want
    for name, parameter in added.items():
        assert parameter.dtype == torch.float64
        if "tokens" in name:
            assert abs(parameter.std().item() - 0.02) < 1e-3 and abs(parameter.mean().item()) < 1e-3
        else:
            assert (parameter == (1 if "weight" in name else 0)).all()


def test_freeze_backbone_trains_heads_and_expansion_only(build):
    model, x = build()
    dtme.expand(model, some_plan(model), freeze_backbone=True)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".dtme." in name or name.startswith("heads.")}
    sum(p.sum() for p in model(x).values()).backward()
    assert all(model.get_parameter(name).grad is not None for name in trained)


def test_batch_norm_modulator_normalises_each_stream_by_its_own_statistics(build):
    model, x = build("own, generic seam")
    block = next(iter(find_blocks(model.backbone)))
    dtme.expand(model, dtme.ExpansionPlan(TASKS, 1, {block: ("depth", "semseg")}), modulator="batch_norm")
    model.train()
    seen = {}
    model.backbone.layers[0].norm1.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    model(x)
    rows = seen["x"].unflatten(0, (3, -1))
    mean, std = x.mean((0, 1)), x.std((0, 1), correction=0)
    for stream, task in enumerate(TASKS):
        want = x if task == "normals" else (x - mean) / (std**2 + 1e-5).sqrt()
        torch.testing.assert_close(rows[stream], want, rtol=1e-9, atol=1e-9)
    running = model.backbone.get_buffer(f"{block}.dtme.running_mean.depth")
    torch.testing.assert_close(running.double(), 0.1 * mean, rtol=1e-5, atol=1e-6)


def test_backbone_called_directly_gives_a_task_major_batch(build, randomise):
    model, x = build("timm ViT")
    dtme.expand(model, some_plan(model, partial=True))
    randomise(model)
    want = model(x, ["normals", "semseg"])
    with dtme.tasks(model.backbone, ["normals", "semseg"]) as names:
        output = model.backbone.forward_features(x)
    assert names == ("normals", "semseg") and output.shape[0] == 2 * x.shape[0]
    parts = dtme.split(output, names)
    for task in names:
        torch.testing.assert_close(model.heads[task](parts[task]), want[task])
    assert model.backbone.forward_features(x).shape[0] == 3 * x.shape[0]  # and all tasks outside


def test_tasks_that_are_never_adapted_share_one_stream(build):
    """Running all three computes as many rows as there are different histories, block by block."""
    model, x = build("own, generic seam")
    rows = []
    for block in model.backbone.layers:
        block.mlp.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[0] // len(x)))
    dtme.expand(model, dtme.ExpansionPlan(TASKS, 1, {"layers.1": ("depth",)}, {"layers.2": ("depth", "normals")}))
    model(x)  # the first call compares
    rows.clear()
    model(x)
    assert rows == [1, 2, 3]
    rows.clear()
    model(x, "semseg")
    assert rows == [1, 1, 1]


def test_task_keys_are_computed_once_per_step_and_not_per_image(build):
    model, _ = build("transformers ViT")
    dtme.expand(model, some_plan(model, num_tokens=2))
    rows = []
    for name, module in model.backbone.named_modules():
        if name.endswith("k_proj"):
            module.register_forward_pre_hook(lambda module, args: rows.append(tuple(args[0].shape[:2])))
    model(torch.randn(5, 3, 16, 16, dtype=torch.float64))  # the first call compares
    rows.clear()
    model(torch.randn(5, 3, 16, 16, dtype=torch.float64))
    assert rows == [(15, 5), (3, 2), (15, 5), (3, 2), (15, 5)]


# --- refusals ---------------------------------------------------------------------------------------------------------


class TwoCalls(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(24, 24)

    def forward(self, x):
        y = self.proj(x).unsqueeze(1)
        y = nn.functional.scaled_dot_product_attention(y, y, y)
        return nn.functional.scaled_dot_product_attention(y, y, y).squeeze(1)


class NoCall(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(24, 24)

    def forward(self, x):
        return self.proj(x).mean(1, keepdim=True).expand_as(x)


def unchanged_after(model, error, match, call):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    modes = [m.training for m in model.modules()]
    with pytest.raises(error, match=match):
        call()
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert modes == [m.training for m in model.modules()]
    assert not hasattr(getattr(model, "backbone", model), "_dtme")


@pytest.mark.parametrize(
    ("plan", "match"),
    [
        (dtme.ExpansionPlan(TASKS, 1, {"layers.9": TASKS}), "block 'layers.9', which OwnTransformer does not have"),
        (dtme.ExpansionPlan(("semseg", "pose"), 1, {"layers.0": ("pose",)}), "unknown task 'pose'"),
        (
            dtme.ExpansionPlan(TASKS, 1, {"layers.0": TASKS}, {}, {"layers.0": 32}),
            "32 channels at block 'layers.0', which has 24",
        ),
    ],
)
def test_plan_for_another_model_is_refused(build, plan, match):
    model, _ = build("own, generic seam")
    unchanged_after(model, ValueError, match, lambda: dtme.expand(model, plan))


def test_attention_that_cannot_take_tokens_is_refused_by_name(build):
    model, _ = build("own, generic seam")
    model.backbone.layers[1].attn = NoCall().double()
    plan = dtme.ExpansionPlan(TASKS, 1, {"layers.0": TASKS}, {"layers.0": TASKS, "layers.1": TASKS})
    ways_out = r"block 'layers.1'.*found none.*dtme\.attention"
    unchanged_after(model, ValueError, ways_out, lambda: dtme.expand(model, plan))


def test_two_inner_products_are_refused(build):
    model, _ = build("own, generic seam")
    model.backbone.layers[1].attn = TwoCalls().double()
    plan = dtme.ExpansionPlan(TASKS, 1, {"layers.0": TASKS}, {"layers.0": TASKS, "layers.1": TASKS})
    unchanged_after(model, ValueError, r"block 'layers.1'.* 2 times", lambda: dtme.expand(model, plan))


def test_expanding_twice_or_after_a_wrapper_is_refused(build):
    model, _ = build("own, generic seam")
    plan = dtme.ExpansionPlan(TASKS, 1, {"layers.0": TASKS})
    with pytest.raises(RuntimeError, match="not expanded"):
        dtme.collapse(model)
    with pytest.raises(RuntimeError, match="not expanded"):
        dtme.tasks(model.backbone, "depth")
    for wrapped in (torch.compile(model), torch.compile(model.backbone)):
        with pytest.raises(RuntimeError, match=r"torch.compile|OptimizedModule"):
            dtme.expand(wrapped, plan)
    inside = copy.deepcopy(model)
    inside.backbone.layers[0].compile()
    with pytest.raises(RuntimeError, match=r"layers\.0 is wrapped by torch.compile"):
        dtme.expand(inside, plan)
    dtme.expand(model, plan)
    with pytest.raises(RuntimeError, match="expanded already"):
        dtme.expand(model, plan)
    with pytest.raises(RuntimeError, match="expanded already"):
        dtme.expand(model.backbone, plan)


def test_unknown_options_and_tasks(build):
    model, x = build("own, generic seam")
    plan = dtme.ExpansionPlan(TASKS, 1, {"layers.0": TASKS})
    with pytest.raises(ValueError, match="modulator must be one of"):
        dtme.expand(model, plan, modulator="gelu")
    with pytest.raises(TypeError, match="plan must be an ExpansionPlan"):
        dtme.expand(model, {"layers.0": TASKS})
    dtme.expand(model, plan)
    with pytest.raises(ValueError, match="unknown task 'pose'"):
        model(x, "pose")
    with pytest.raises(ValueError, match="different names"):
        model(x, ["depth", "depth"])
    with pytest.raises(ValueError, match="unknown task 'pose'"):
        dtme.tasks(model.backbone, ["pose"])
    with pytest.raises(ValueError, match=r"rows of 2 tasks"):
        dtme.split(torch.zeros(3, 2), ["a", "b"])


def test_blocks_named_in_any_order_and_only_some_of_them(build, randomise, naive):
    """The report follows the order in which they run; blocks that were not analysed keep the streams apart all the
    same."""
    for client, pick in (("own, generic seam", [2, 0, 1]), ("transformers BERT", [1, 0])):
        model, x = build(client)
        names = list(find_blocks(model.backbone))
        rows = model(x)["depth"].shape[:2]
        targets = {task: torch.randn(*rows, 2 + i, dtype=torch.float64) for i, task in enumerate(TASKS)}
        losses = dict.fromkeys(TASKS, nn.functional.mse_loss)
        report = dtme.analyze(model, [(x, targets)], losses, blocks=[names[i] for i in pick], progress=False)
        assert report.blocks == tuple(names[i] for i in sorted(pick))
        plain = copy.deepcopy(model)
        dtme.expand(model, report.plan(modulation=0.7, expansion=0.7, num_tokens=2))
        randomise(model)
        out, added = model(x), {name: p.detach() for name, p in added_parameters(model).items()}
        for task in TASKS:
            torch.testing.assert_close(out[task], naive(plain, added, task, x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("order", [[0, 0, 1, 2], [1, 0, 2], [0, 2], [2, 1, 0], [1]], ids=str)
def test_blocks_may_run_twice_in_another_order_or_not_at_all(build, randomise, naive, order):
    model, x = build("own, generic seam")
    plain = copy.deepcopy(model)
    dtme.expand(model, dtme.ExpansionPlan(TASKS, 1, {"layers.0": TASKS, "layers.2": ("depth",)}, {"layers.1": TASKS}))
    randomise(model)
    added = {name: p.detach() for name, p in added_parameters(model).items()}
    for some in (model, plain):
        layers = some.backbone.layers
        some.backbone.forward = lambda x, layers=layers: nn.Sequential(*(layers[i] for i in order))(x)
    for task, got in model(x).items():
        torch.testing.assert_close(got, naive(plain, added, task, x), rtol=1e-10, atol=1e-10)


def test_sequence_first_blocks_are_refused():
    layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 3, 48), 2, enable_nested_tensor=False)
    with pytest.raises(ValueError, match=r"'layers.0' takes its tokens sequence first"):
        dtme.expand(layers, dtme.ExpansionPlan(("a", "b"), 1, {"layers.0": ("a",)}))


def test_split_gives_what_was_tapped_before_the_streams_parted_to_every_task(build):
    model, x = build("transformers ViT")
    second = list(find_blocks(model.backbone))[1]
    dtme.expand(model, dtme.ExpansionPlan(TASKS, 1, {second: TASKS}))
    with dtme.tasks(model, TASKS):
        output = model.backbone(x, output_hidden_states=True)
    assert [len(state) for state in output.hidden_states] == [9, 9, 9, 9]
    for task, part in dtme.split(output, TASKS).items():
        assert [len(state) for state in part.hidden_states] == [3, 3, 3, 3]
        assert torch.equal(part.hidden_states[0], output.hidden_states[0][:3])
        torch.testing.assert_close(model.heads[task](part.last_hidden_state), model(x, task)[task])


def test_a_copy_made_under_a_choice_is_free_of_it_and_choices_nest(build):
    model, x = build("own, generic seam")
    dtme.expand(model, dtme.ExpansionPlan(TASKS, 1, {"layers.0": TASKS}))
    chosen = dtme.tasks(model, "depth")
    with chosen:
        other = copy.deepcopy(model)
        with dtme.tasks(model.backbone, ["semseg", "normals"]), chosen:
            assert len(model.backbone(x)) == 3
        assert len(model.backbone(x)) == 3
    assert len(other.backbone(x)) == 9 == len(model.backbone(x))


def test_features_of_any_batch_reach_the_heads(build):
    """Unexpanded features go to the heads as they are; expanded ones are cut by the rows the blocks saw, not by x."""
    model, x = build("own, generic seam")
    listed = dtme.MultiTaskModel(
        model.backbone, dict(model.heads), lambda backbone, images: backbone(torch.stack(images))
    )
    want = listed(list(x))
    torch.testing.assert_close(want["depth"], model(x)["depth"])
    dtme.expand(listed, dtme.ExpansionPlan(TASKS, 1, {"layers.1": TASKS}))
    torch.testing.assert_close(listed(list(x))["depth"], want["depth"])


def test_collapse_thaws_replaced_parameters(build):
    model, _ = build("own, generic seam")
    plan = dtme.ExpansionPlan(TASKS, 1, {"layers.1": TASKS})
    dtme.expand(model, plan, freeze_backbone=True)
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    dtme.collapse(model)
    assert all(p.requires_grad for p in model.parameters())


def test_what_is_no_model_is_refused_by_name():
    for call in (lambda: dtme.expand(None, dtme.ExpansionPlan(TASKS)), lambda: dtme.collapse([1])):
        with pytest.raises(TypeError, match=r"the model must be a torch\.nn\.Module, got (NoneType|list)"):
            call()
