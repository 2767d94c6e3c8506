"""Names and gradients that PEFT changes around an expanded model."""

import warnings

import pytest
import torch
from torch import nn

import dtme
from benchmarks.stacks.adapters import expanded_first, lora, wrapped_first
from benchmarks.stacks.small import TASKS, heads, images, move, plan_of, vit
from dtme.wrappers import bare_name, plan_for, resolve

pytest.importorskip("peft")


def frozen():
    model = dtme.MultiTaskModel(vit(), heads())
    dtme.expand(model, plan_of(model.backbone))
    move(model, ".dtme.")
    model.backbone = lora(model.backbone)
    return model


def test_what_peft_froze_is_said_by_name(capsys):
    model = frozen()
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"its 9 parameters \(layers\.0\.dtme\.weight\.semseg, .*dtme\.unfreeze"):
            groups = model.parameter_groups()
    assert not groups[1]["params"]
    model.print_trainable_parameters()
    assert "all frozen: dtme.unfreeze(model)" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="nothing that dtme added trains") as caught:
        model.train()(images())
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(images())  # said once
        assert dtme.unfreeze(model) is model
        assert len(model.parameter_groups()[1]["params"]) == 9
        model(images())
    model.print_trainable_parameters()
    assert "frozen" not in capsys.readouterr().out


def test_nothing_is_said_where_nothing_was_forgotten():
    model = frozen()
    for parameter in model.backbone.parameters():
        parameter.requires_grad_(False)
    other = wrapped_first().train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.train()(images())  # the heads alone train
        model.parameter_groups()
        other(images())
    plain = dtme.MultiTaskModel(vit(), heads())
    with pytest.raises(RuntimeError, match="MultiTaskModel is not expanded: there is nothing to unfreeze"):
        dtme.unfreeze(plain)


def test_copies_of_what_was_added_are_refused():
    model = dtme.MultiTaskModel(vit(), heads()).eval()
    dtme.expand(model, plan_of(model.backbone))
    model.backbone = lora(model.backbone, modules_to_save=["dtme"])
    with pytest.raises(RuntimeError, match=r"block 'layers\.0' were replaced by copies .* modules_to_save"):
        model(images())
    model = dtme.MultiTaskModel(vit(), heads()).eval()
    dtme.expand(model, plan_of(model.backbone))
    model.backbone = lora(model.backbone, modules_to_save=["layernorm_before"])
    with pytest.raises(RuntimeError, match=r"norm of the attention of block 'layers\.1' was replaced after"):
        model(images())


@pytest.mark.parametrize("make", [wrapped_first, expanded_first])
def test_replan_by_names_of_the_other_side_keeps_parameters_and_their_state(make):
    model = make().train()
    optimizer = torch.optim.Adam(model.parameter_groups())
    model(images())[TASKS[0]].sum().backward()
    optimizer.step()
    before = {name: p for name, p in model.named_parameters() if ".dtme." in name}
    dtme.replan(model, plan_of(lora(vit())), optimizer)
    after = {name: p for name, p in model.named_parameters() if ".dtme." in name}
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)
    assert all(name.startswith("backbone.base_model.model.layers.") for name in after)
    dtme.collapse(model)
    assert not dtme.is_expanded(model)
    assert not [name for name, _ in model.named_parameters() if ".dtme." in name]


def test_gates_find_their_blocks_on_the_other_side(tmp_path):
    model = wrapped_first().eval()
    plan = plan_of(vit())
    dtme.replan(model, dtme.ExpansionPlan(TASKS, 3, plan.modulation, plan.expansion), gate_tokens=True)
    move(model, ".dtme.")
    model.save_pretrained(tmp_path, expansion_only=True)
    bare = dtme.MultiTaskModel.from_pretrained(tmp_path, vit(), model.heads).eval()
    bare.backbone = lora(bare.backbone)
    for task, want in model(images()).items():
        assert torch.equal(bare(images())[task], want)


def test_a_report_on_one_side_is_read_on_the_other():
    losses = {task: nn.functional.mse_loss for task in TASKS}
    batch = images(2), {task: torch.ones(2, 5, 2 + i).double() for i, task in enumerate(TASKS)}
    bare, wrapped = (dtme.MultiTaskModel(net, heads()).eval() for net in (vit(), lora(vit())))
    report = dtme.analyze(bare, [batch], losses, progress=False)
    again = dtme.analyze(wrapped, [batch], losses, blocks=list(report.blocks), progress=False)
    assert again.blocks == tuple(f"base_model.model.{name}" for name in report.blocks)
    found = dtme.conflict_map(wrapped, batch, losses, report, report.blocks[1])
    want = dtme.conflict_map(wrapped, batch, losses, again, again.blocks[1])
    assert found.keys() == want.keys() and found[TASKS].shape == (2, 5)


def test_names_that_wrappers_change():
    wrapped = ("base_model.model.layers.0", "module.layers.0", "_orig_mod.module.layers.0", "layers.0._orig_mod")
    assert {bare_name(name) for name in wrapped} == {"layers.0"}
    assert bare_name("base_model.layers.0") == "base_model.layers.0"
    assert resolve(["layers.0"], ["module.layers.0", "module.layers.1"]) == {"layers.0": "module.layers.0"}
    assert resolve(["layers.0"], ["layers.0", "module.layers.0"]) == {"layers.0": "layers.0"}
    assert resolve(["layers.0"], ["module.layers.0", "_orig_mod.layers.0"]) == {}  # which of the two is not known
    plan = dtme.ExpansionPlan(TASKS, 2, {"module.layers.0": TASKS, "layers.0": TASKS})
    assert plan_for(plan, ["layers.0"]) is plan
    with pytest.raises(ValueError, match=r"plan names block 'module\.layers\.0', which ViTModel does not have"):
        dtme.expand(vit(), plan)


def test_what_torchs_attention_never_calls_has_no_effect_with_task_tokens_either():
    def encoder():
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(24, 3, 48, 0.0, batch_first=True)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().eval()

    model, x = dtme.MultiTaskModel(encoder(), heads()).eval(), torch.randn(2, 5, 24).double()
    dtme.expand(model, dtme.ExpansionPlan(TASKS, 2, {}, {"layers.1": TASKS}))
    want = model(x)
    model.backbone = lora(model.backbone, target_modules=["out_proj"])
    torch.testing.assert_close(model(x), want, rtol=1e-12, atol=1e-12)
