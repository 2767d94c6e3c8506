"""What each task would gain from an affine map of its own, against real steps."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from dtme.analysis.gains import estimate
from tests.dtme.analysed import analyze, make_batch, make_model
from tests.dtme.clients import TASKS, WIDTH


def test_gains_are_what_split_steps_lower_the_losses_by():
    """A step of length ε of one map for all tasks, and of one each, at one block, against the real losses."""
    model, batch = make_model(), make_batch(rows=3)
    report = analyze(model, [batch] * 8)  # the same batch again: without noise, products of two batches are its own
    x, targets = batch

    def losses(d, maps):
        hidden = x
        for block in model.backbone.layers[:d]:
            hidden = block(hidden)
        found = {}
        for task in TASKS:
            weight, bias = maps[task]
            own = hidden.detach() * weight + bias
            for block in model.backbone.layers[d:]:
                own = block(own)
            found[task] = F.mse_loss(model.heads[task](own), targets[task])
        return found

    for d in range(3):

        def fresh():
            return torch.ones(WIDTH).double().requires_grad_(), torch.zeros(WIDTH).double().requires_grad_()

        maps = {task: fresh() for task in TASKS}
        before = losses(d, maps)
        grads = {t: torch.cat(torch.autograd.grad(before[t], maps[t], retain_graph=True)) for t in TASKS}
        total, eps = sum(before.values()).item(), 1e-6
        shared = sum(grads.values())
        falls = []
        for steps in ({t: shared for t in TASKS}, grads):
            moved = {}
            for t in TASKS:
                step = eps * steps[t] / steps[t].norm()
                moved[t] = maps[t][0] - step[:WIDTH], maps[t][1] - step[WIDTH:]
            falls.append((total - sum(losses(d, moved).values()).item()) / eps)
        assert report.gains[d].item() == pytest.approx((falls[1] - falls[0]) / total, rel=1e-3)


def test_gains_of_noise_are_zero_in_the_mean():
    """Gradients without any common direction: norms of their averages would all be positive."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(200):
        rows = torch.randn(10, 3, 2 * 6 + 2, generator=generator).double()
        rows[..., -2:] = 1.0
        found.append(estimate(list(rows), [6])[0].item())
    found = torch.tensor(found)
    assert abs(found.mean()) < 3 * found.std() / 200**0.5 < 0.1
    rows[:, :, :4] += torch.eye(4)[:3].double() * 5  # a direction of its own for each task
    gain, resamples = estimate(list(rows), [6])
    assert gain.item() > 1.5 and resamples.shape == (200, 1) and 0 < resamples.std() < 1


def test_tasks_that_are_seldom_together_count_in_the_gains_as_often_as_they_are():
    """Every pair of tasks is normalised by the batches that hold both or either: with the same gradient in every batch,
    leaving some out changes nothing."""
    model, (x, targets) = make_model(), make_batch(rows=3)
    want = analyze(model, [(x, targets)] * 8)
    some = [{t: targets[t] for t in pair} for pair in itertools.combinations(TASKS, 2)]
    torch.testing.assert_close(analyze(model, [(x, some[i % 3]) for i in range(12)]).gains, want.gains)
