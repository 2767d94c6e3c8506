"""Rep-MTL's terms against the matrices of its paper, written out, and their gradients against differences."""

import pytest
import torch

import dtme
from benchmarks.paper.combinations import RepMTL
from benchmarks.paper.combinations.rep_mtl import alignment_loss, saliency_entropy

from .toy_tasks import Point, gradients, token_batch, token_tasks, transformer

NAMES = ["a", "b", "c"]
RANDOM = torch.Generator().manual_seed(0)


def entropy_by_hand(saliencies):
    _, images, tokens, _ = saliencies.shape
    total = 0
    for image in range(images):
        for token in range(tokens):
            sizes = [saliency[image, token].mean().abs() for saliency in saliencies]
            total = total - sum(size / sum(sizes) * (size / sum(sizes)).log() for size in sizes)
    return total / (images * tokens)


def alignment_by_hand(saliencies, temperature):
    """Equations 7 to 9 with the matrices of channels, S as channels × tokens."""
    tasks, images, _, _ = saliencies.shape
    affinities = torch.stack([torch.stack([s.mT @ s for s in saliency]) for saliency in saliencies])
    anchors = []
    for image in range(images):
        means = torch.stack([saliencies[t, image].mean(0) for t in range(tasks)], dim=1)
        anchors.append(means @ means.mT)

    def similarity(one, other):
        return torch.cosine_similarity(one.flatten(), other.flatten(), dim=0) / temperature

    total = 0
    for image in range(images):
        negative = sum(similarity(anchors[image], anchors[k]).exp() for k in range(images) if k != image)
        for t in range(tasks):
            total = total - (similarity(anchors[image], affinities[t, image]).exp() / negative).log()
    return total / (images * tasks)


def example(tokens=5, channels=7):
    return torch.randn(3, 4, tokens, channels, generator=RANDOM, dtype=torch.float64)


@pytest.mark.parametrize(("tokens", "channels"), [(5, 7), (9, 4)])
def test_terms(tokens, channels):
    saliencies = example(tokens, channels)
    torch.testing.assert_close(saliency_entropy(saliencies), entropy_by_hand(saliencies))
    for temperature in (0.1, 1.0):
        torch.testing.assert_close(alignment_loss(saliencies, temperature), alignment_by_hand(saliencies, temperature))


def test_saliency_of_one_task_alone_has_no_entropy_and_equal_ones_have_most():
    one, equal = torch.zeros(3, 2, 4, 5), torch.ones(3, 2, 4, 5)
    one[1] = 1
    assert saliency_entropy(one) == 0
    torch.testing.assert_close(saliency_entropy(equal), torch.tensor(3.0).log())


@pytest.mark.parametrize("scale", [1e-12, 1e9])
def test_terms_do_not_change_with_the_scale(scale):
    saliencies = example().float()
    torch.testing.assert_close(saliency_entropy(saliencies * scale), saliency_entropy(saliencies))
    torch.testing.assert_close(alignment_loss(saliencies * scale, 0.1), alignment_loss(saliencies, 0.1))


def test_what_has_no_saliency_is_left_out():
    saliencies = example()
    saliencies[:, :, 1:] = 0  # heads that read the first token
    saliencies.requires_grad_()
    torch.testing.assert_close(saliency_entropy(saliencies), entropy_by_hand(saliencies[:, :, :1]))
    (saliency_entropy(saliencies) + alignment_loss(saliencies, 0.1)).backward()
    assert saliencies.grad.isfinite().all() and saliencies.grad[:, :, 0].abs().min() > 0

    saliencies = example()
    saliencies[:, 3] = 0  # an image without any labels
    torch.testing.assert_close(alignment_loss(saliencies, 0.1), alignment_by_hand(saliencies[:, :3], 0.1))
    saliencies = example().requires_grad_()
    assert alignment_loss(saliencies[:, :1], 0.1) == 0
    assert alignment_loss(saliencies * 0, 0.1) == 0 and saliency_entropy(saliencies * 0) == 0


def total(model, batch, tasks, combination):
    """Equation 10 with the terms by hand."""
    x, labels = batch
    tokens = model.backbone(x)
    losses = [tasks[name].loss(model.heads[name](tokens), labels[name]) for name in tasks]
    losses = [loss.log() for loss in losses] if combination.logarithm else losses
    saliencies = torch.stack([torch.autograd.grad(loss, tokens, create_graph=True)[0] for loss in losses])
    entropy, alignment = entropy_by_hand(saliencies), alignment_by_hand(saliencies, combination.temperature)
    return sum(losses) + combination.saliency * entropy + combination.alignment * alignment


def doubles(batch):
    return batch[0].double(), {name: label.double() for name, label in batch[1].items()}


@pytest.mark.parametrize("logarithm", [True, False])
def test_a_step_is_the_gradient_of_the_papers_loss(logarithm):
    tasks, batch = token_tasks(NAMES), doubles(token_batch(NAMES))
    model = transformer(NAMES, dropout=0.0).double()
    combination = RepMTL(tasks, saliency=0.7, alignment=1.1, temperature=0.5, logarithm=logarithm).double()
    combination.step(model, batch, tasks)
    found = gradients(model)
    expected = torch.autograd.grad(total(model, batch, tasks, combination), list(model.parameters()))
    for (name, _), gradient in zip(model.named_parameters(), expected, strict=True):
        torch.testing.assert_close(found[name], gradient, msg=name)

    facts = combination.facts()
    assert 0 < facts["saliency_entropy"] < 1.1 and facts["alignment_loss"] != 0
    for parameter, index in (
        (model.backbone.layers[0].linear1.weight, (2, 3)),
        (model.heads["b"].project.weight, (1, 4)),
    ):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter[index] += sign * 1e-5
            values.append(total(model, batch, tasks, combination).item())
            with torch.no_grad():
                parameter[index] -= sign * 1e-5
        assert parameter.grad[index].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4)


def test_a_frozen_backbone_trains_its_heads():
    tasks, model = token_tasks(NAMES), transformer(NAMES)
    model.backbone.requires_grad_(False)
    RepMTL(tasks).step(model, token_batch(NAMES), tasks)
    assert {name.split(".")[0] for name in gradients(model)} == {"heads"}
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


def test_streams_of_their_own_are_refused():
    tasks, model = token_tasks(NAMES), transformer(NAMES)
    dtme.expand(model, dtme.ExpansionPlan(tuple(NAMES), 2, {"layers.0": tuple(NAMES)}, {}))
    with pytest.raises(ValueError, match="streams of their own for a, b, c"):
        RepMTL(tasks).step(model, token_batch(NAMES), tasks)
    assert not gradients(model)


def test_other_models_and_features_are_refused():
    tasks = token_tasks(NAMES)
    with pytest.raises(ValueError, match=r"needs a dtme.MultiTaskModel, got Point"):
        RepMTL(tasks).prepare(Point(NAMES, 3))
    model = transformer(NAMES)
    model.features = "cls"
    with pytest.raises(ValueError, match=r"\(images, tokens, channels\), got \(4, 8\)"):
        RepMTL(tasks).step(model, token_batch(NAMES), tasks)
