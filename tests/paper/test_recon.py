"""Recon's conflict scores where they are known by hand, and what its layers become."""

import itertools

import pytest
import torch
from torch import nn

import dtme
from benchmarks.paper.arms import Setting
from benchmarks.paper.data.rooms import TASKS
from benchmarks.paper.structures import Recon
from benchmarks.paper.structures.recon import conflict_scores
from tests.paper.small import batches, small_model, small_setting


class Scale(nn.Module):
    """Two numbers that multiply two columns: their gradient is what the loss gives these columns."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))


class Columns(nn.Module):
    """Three layers, of which each makes two of six columns; and one that nothing uses."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Scale() for _ in range(3))
        self.unused = Scale()

    def forward(self, x):
        numbers = torch.cat([number for layer in self.layers for number in (layer.weight, layer.bias)])
        return (x * numbers).unsqueeze(1)


class Weighted:
    """A task whose loss has the target as its gradient."""

    def loss(self, prediction, target):
        return (prediction.squeeze(1) * target).sum()


TOY = dict.fromkeys("abc", Weighted())


def toy():
    return dtme.MultiTaskModel(Columns(), {task: nn.Identity() for task in TOY})


def batch(**targets):
    return torch.ones(1, 6), {task: torch.tensor([list(map(float, target))]) for task, target in targets.items()}


# two columns of each of three layers; in comments, the cosines of the pairs (a, b), (a, c) and (b, c) in every layer
FIRST = batch(a=(1, 0, 1, 0, 1, 1), b=(-1, 0, 0, 1, 1, 1), c=(1, 0, -0.05, 1, 1, 2))
# (-1, 1, -1), (0, -0.05, 1), (1, 0.95, 0.95)
SECOND = batch(a=(1, 1, 1, 0, 0, 0), b=(-1, 1, 1, 0, 1, 1), c=(-1, -1, 1, 0, -1, -1))
# (0, -1, 0), (1, 1, 1), and, as a has no gradient, only -1 of (b, c)


@pytest.mark.parametrize(
    ("severity", "scores"), [(0, (3, 1, 1)), (-0.02, (3, 1, 1)), (-0.1, (3, 0, 1)), (-0.999, (3, 0, 1))]
)
def test_scores_are_the_pairs_below_the_severity(severity, scores):
    found = conflict_scores(toy(), [FIRST, SECOND], TOY, severity)
    assert found == {f"layers.{i}": score for i, score in enumerate(scores)}  # the unused layer has none


def test_the_layers_with_the_highest_scores_become_the_tasks_own():
    model, facts = Recon(share=1 / 3).apply(Setting(toy(), [FIRST, SECOND], TOY, 0))
    assert facts["chosen"] == ["layers.0"] and model.names == ("layers.0.weight", "layers.0.bias")
    assert (facts["added"], facts["retired"]) == (6, 2)
    # of layers 1 and 2, which have a pair each, the earlier
    model, facts = Recon(share=2 / 3).apply(Setting(toy(), [FIRST, SECOND], TOY, 0))
    assert facts["chosen"] == ["layers.0", "layers.1"] and facts["scores"] == {
        "layers.0": 3,
        "layers.1": 1,
        "layers.2": 1,
    }


def test_scores_of_a_transformer_are_those_of_whole_gradients():
    made = small_setting()
    scores = conflict_scores(made.model, batches(), made.tasks, -0.02)
    gradients = []
    model = small_model().eval()
    layers = {n: m for n, m in model.backbone.named_modules() if any(True for _ in m.parameters(recurse=False))}
    for x, labels in batches():
        rows = []
        for task in model.tasks:
            model.zero_grad()
            TASKS[task].loss(model(x, task)[task], labels[task]).backward()
            rows.append(
                {n: torch.cat([p.grad.flatten() for p in m.parameters(recurse=False)]) for n, m in layers.items()}
            )
        gradients.append(rows)
    want = {
        layer: sum(
            torch.cosine_similarity(a[layer], b[layer], dim=0).item() < -0.02
            for rows in gradients
            for a, b in itertools.combinations(rows, 2)
        )
        for layer in layers
    }
    assert scores == want and len(set(scores.values())) > 3


def test_measuring_leaves_the_model_as_it_was():
    model = small_model().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    conflict_scores(model, batches()[:1], {name: TASKS[name] for name in model.tasks}, 0)
    assert torch.equal(torch.get_rng_state(), state) and all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_wrong_options_and_losses_are_named():
    for wrong in ({"share": 0}, {"share": 1.5}, {"severity": 0.1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Recon(**wrong)
    with pytest.raises(ValueError, match="no batch"):
        conflict_scores(toy(), [], TOY, 0)
    with pytest.raises(ValueError, match="loss of 'b' is nan"):
        conflict_scores(toy(), [batch(a=(1,) * 6, b=(float("nan"),) * 6, c=(1,) * 6)], TOY, 0)
