"""Backbones and heads: shapes, taps, and that an expanded model with each decoder is what each task is alone."""

import pytest
import torch

import dtme
from benchmarks.paper.data import Data
from benchmarks.paper.data.rooms import TASKS
from benchmarks.paper.decoders import DECODERS
from benchmarks.paper.models import build, taps_of, tokens_of
from benchmarks.paper.tasks import choose

DATA = Data("rooms", choose(TASKS, ("semseg", "depth")), [], [], (32, 48))


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_decoder_predicts_every_pixel_and_trains_expanded(decoder):
    model = build(DATA, "small", 0, decoder).double()
    x = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    assert {task: tuple(y.shape[1:]) for task, y in model(x).items()} == {"semseg": (15, 32, 48), "depth": (1, 32, 48)}
    names = [f"layers.{i}" for i in range(6)]
    blocks = [name for name, _ in model.backbone.named_modules() if name in names]
    dtme.expand(model, dtme.ExpansionPlan(model.tasks, 2, {blocks[3]: model.tasks}, {blocks[4]: model.tasks}))
    assert dtme.verify(model.eval(), x) < 1e-12
    sum(y.square().mean() for y in model.train()(x).values()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.heads.parameters() if p.dim() > 1)


def test_taps_are_the_tokens_behind_the_quarters():
    model, x = build(DATA, "small", 0, "taps").eval(), torch.randn(1, 3, 32, 48)
    seen = []
    hooks = [layer.register_forward_hook(lambda _m, _x, y: seen.append(y)) for layer in model.backbone.layers]
    taps = taps_of(model.backbone, x)
    for hook in hooks:
        hook.remove()
    assert all(torch.equal(taps[i], seen[depth - 1]) for i, depth in enumerate((1, 3, 4)))  # of six blocks
    assert torch.equal(taps[3], tokens_of(model.backbone, x))


def test_the_papers_decoder_has_a_weight_per_channel_and_the_other_one_per_pixel():
    count = {name: sum(p.numel() for p in build(DATA, "small", 0, name).heads.parameters()) for name in DECODERS}
    conv, channels = 9 * 128**2 + 2 * 128, 15 + 1
    assert count == {
        "conv": 2 * conv + channels * 129,
        "pixels": 2 * conv + 64 * channels * 129,
        "taps": channels * (4 * 128 + 1),
    }
