"""What trainers ask of a model is done by its backbone, or refused."""

import pytest
import torch
from torch import nn

import dtme
from benchmarks.stacks import loops
from tests.dtme.backbones import Wrapper
from tests.dtme.clients import OwnTransformer

pytestmark = pytest.mark.filterwarnings("ignore")


def runs_of_mlps(model):
    """How often the MLPs of blocks ran in a step of training, and its gradients."""
    counts = []
    handles = [
        module.register_forward_pre_hook(lambda *args: counts.append(1))
        for name, module in model.backbone.named_modules()
        if name.endswith("mlp")
    ]
    model.train().zero_grad()
    torch.stack([y.square().mean() for y in model(loops.images(2)).values()]).sum().backward()
    for handle in handles:
        handle.remove()
    return len(counts), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("make", [loops.vit, loops.timm_vit], ids=["transformers", "timm"])
@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_checkpointing_recomputes_and_is_switched_off_again(make, name):
    model = loops.expanded_model(make())
    runs_of_mlps(model)  # the first call compares ways to share
    plain, want = runs_of_mlps(model)
    assert not getattr(model, f"is_{name}")
    getattr(model, f"{name}_enable")()
    assert getattr(model, f"is_{name}")
    count, found = runs_of_mlps(model)
    assert count == 2 * plain
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    getattr(model, f"{name}_disable")()
    assert not getattr(model, f"is_{name}") and runs_of_mlps(model)[0] == plain


def test_options_reach_transformers_and_are_refused_for_timm():
    model = loops.expanded_model()
    model.gradient_checkpointing_enable({"use_reentrant": True}, every_n_layers=2)
    on = [getattr(layer, "gradient_checkpointing", False) for layer in model.backbone.layers]
    assert on.count(True) in (1, 2) and model.is_gradient_checkpointing
    other = loops.expanded_model(loops.timm_vit())
    other.gradient_checkpointing_enable(None, every_n_layers=1, offload=False)  # as Trainer calls it
    for options in ({"activation_checkpointing_kwargs": {"use_reentrant": True}}, {"offload": True}):
        with pytest.raises(ValueError, match=r"set_grad_checkpointing takes no options, got \['(use_reent|offload)"):
            other.activation_checkpointing_enable(**options)


def test_a_part_of_the_backbone_may_be_what_can():
    class Outer(Wrapper):
        def forward(self, x):
            return self.inner(x).last_hidden_state

    model = dtme.MultiTaskModel(Outer(loops.vit()), loops.heads(), "cls").double()
    model.activation_checkpointing_enable()
    assert model.backbone.inner.is_activation_checkpointing and model.is_activation_checkpointing
    assert model.get_input_embeddings() is model.backbone.inner.get_input_embeddings()


def test_what_no_part_can_is_an_error_that_says_so():
    model = dtme.MultiTaskModel(OwnTransformer(), {"depth": nn.Linear(24, 1)})
    assert not model.is_gradient_checkpointing
    for name in (
        "gradient_checkpointing_enable",
        "gradient_checkpointing_disable",
        "activation_checkpointing_enable",
        "activation_checkpointing_disable",
        "enable_input_require_grads",
        "disable_input_require_grads",
        "get_input_embeddings",
    ):
        with pytest.raises(AttributeError, match="the backbone OwnTransformer has none of the methods"):
            getattr(model, name)()
    assert not hasattr(model, "config") and not hasattr(model, "main_input_name")
    assert model.device == torch.device("cpu") and model.dtype == torch.float32


def test_what_the_backbone_says_of_itself():
    model = loops.expanded_model()
    assert model.config is model.backbone.config
    assert model.main_input_name == "pixel_values"
    assert model.dtype == torch.float64
    model.backbone.config = {"width": 24}  # somebody's own, which a trainer could not write to
    assert not hasattr(model, "config")
    assert dtme.MultiTaskModel(nn.Identity(), {"a": nn.Identity()}).dtype == torch.get_default_dtype()


def test_gradients_reach_the_embeddings_of_a_frozen_backbone():
    from transformers import BertConfig, BertModel

    size = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48}
    backbone = BertModel(BertConfig(**size, vocab_size=40, max_position_embeddings=16), add_pooling_layer=False)
    model = dtme.MultiTaskModel(backbone.requires_grad_(False), {"a": nn.Linear(24, 1)}, "cls")
    ids = {"input_ids": torch.ones(2, 4, dtype=torch.long)}
    for switch, expected in ((model.enable_input_require_grads, True), (model.disable_input_require_grads, False)):
        switch()
        assert model.extract(ids, ["a"])["a"].requires_grad is expected
