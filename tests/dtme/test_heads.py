"""Heads that have learnt nothing are told by name: no rate shows them, the losses with other images' labels do."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dtme
from tests.dtme.clients import WIDTH, OwnTransformer
from tests.dtme.reports import made_up

LOSSES = {"known": F.mse_loss, "drawn": F.mse_loss, "classes": F.cross_entropy}


class OfImage(nn.Linear):
    def forward(self, tokens):
        return super().forward(tokens.mean(1))


def make_model():
    torch.manual_seed(0)
    heads = {"known": OfImage(WIDTH, 2), "drawn": OfImage(WIDTH, 2), "classes": OfImage(WIDTH, 3)}
    return dtme.MultiTaskModel(OwnTransformer(), heads).double().eval()


def make_loader(model, batches=12, rows=8):
    """Labels of "known" are about what the model says of the images; the others have nothing to do with them."""
    draw = torch.Generator().manual_seed(1)
    loader = []
    for _ in range(batches):
        x = 3 * torch.randn(rows, 5, WIDTH, generator=draw, dtype=torch.float64)
        with torch.no_grad():
            known = model(x)["known"] + 0.1 * torch.randn(rows, 2, generator=draw, dtype=torch.float64)
        drawn = torch.randn(rows, 2, generator=draw, dtype=torch.float64)
        loader.append((x, {"known": known, "drawn": drawn, "classes": torch.randint(3, (rows,), generator=draw)}))
    return loader


@pytest.fixture(scope="module")
def analysed():
    model = make_model()
    loader = make_loader(model)
    return model, loader, dtme.analyze(model, loader, LOSSES, progress=False)


def test_the_losses_are_those_with_the_labels_half_a_batch_before(analysed):
    model, loader, report = analysed
    assert report.head_losses.shape == (12, 3, 2)
    for (x, targets), row in zip(loader, report.head_losses, strict=True):
        with torch.no_grad():
            predictions = model(x)
        for task, (own, others) in zip(report.tasks, row.tolist(), strict=True):
            swapped = torch.cat([targets[task][4:], targets[task][:4]])
            assert math.isclose(own, LOSSES[task](predictions[task], targets[task]).item(), rel_tol=1e-9)
            assert math.isclose(others, LOSSES[task](predictions[task], swapped).item(), rel_tol=1e-9)


def test_a_head_that_knows_its_labels_gains_by_them_and_the_others_are_named(analysed):
    _, _, report = analysed
    gains = report.label_gains()
    gain, half = gains["known"]
    assert gain - half > 0.5
    for task in ("drawn", "classes"):
        gain, half = gains[task]
        assert abs(gain) < half < 0.5
    text = str(report)
    assert "train them first" in text and "'drawn'" in text.split("train them first")[0]
    assert "'known' (" not in text


def test_half_of_the_interval_is_that_of_a_ratio_of_means(analysed):
    _, _, report = analysed
    own, others = report.head_losses[:, 1].unbind(1)
    gain, half = report.label_gains()["drawn"]
    draws = torch.randint(12, (20_000, 12), generator=torch.Generator().manual_seed(0))
    gains = 1 - own[draws].mean(1) / others[draws].mean(1)
    assert math.isclose(gain, 1 - (own.mean() / others.mean()).item(), abs_tol=1e-12)
    # Student's quantile of 11 degrees of freedom, and n - 1 instead of n, are what resamples lack
    assert math.isclose(half, 2.201 * gains.std().item() * math.sqrt(12 / 11), rel_tol=0.1)


def test_intervals_hold_zero_for_heads_that_know_nothing():
    draw = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(400):
        own, others = 1 + 0.2 * torch.randn(2, 12, 1, generator=draw, dtype=torch.float64)
        report = made_up(
            [0.4, 0.5], [0.5, 0.5], num_tasks=2, head_losses=torch.stack([own, others], 2).expand(12, 2, 2)
        )
        gain, half = report.label_gains()[report.tasks[0]]
        held += abs(gain) <= half
    assert 0.92 <= held / 400 <= 0.98


def test_negative_losses_gain_where_they_fall():
    losses = torch.tensor([[[-2.0, -1.0]] * 2, [[-2.2, -1.1]] * 2, [[-1.9, -1.0]] * 2], dtype=torch.float64)
    gain, half = made_up([0.4], [0.5], num_tasks=2, head_losses=losses).label_gains()["semseg"]
    assert gain - half > 0.5


def test_a_task_that_is_absent_counts_where_it_is_there(analysed):
    model, loader, _ = analysed
    some = [(x, {**y, "drawn": None} if i % 2 else y) for i, (x, y) in enumerate(loader)]
    report = dtme.analyze(model, some, LOSSES, progress=False)
    there = report.head_losses.isfinite().all(2).sum(0)
    assert there.tolist() == [12, 6, 12]


def test_batches_of_one_image_and_step_functions_have_nothing_to_compare(analysed):
    model, loader, _ = analysed
    single = [(x[:1], {task: target[:1] for task, target in y.items()}) for x, y in loader]
    report = dtme.analyze(model, single, LOSSES, progress=False)
    assert report.head_losses is None and all(math.isnan(gain) for gain, _ in report.label_gains().values())
    assert "these heads" not in str(report)

    def step(model, batch):
        x, targets = batch
        return {task: LOSSES[task](prediction, targets[task]) for task, prediction in model(x).items()}

    assert dtme.analyze(model, loader, step, progress=False).head_losses is None


def test_no_more_than_the_first_batches_are_looked_at(analysed, monkeypatch):
    from dtme.analysis import heads, passes

    model, loader, report = analysed
    monkeypatch.setattr(heads, "HEAD_BATCHES", 5)
    monkeypatch.setattr(passes, "HEAD_BATCHES", 5)
    few = dtme.analyze(model, loader, LOSSES, progress=False)
    assert torch.equal(few.head_losses, report.head_losses[:5]) and torch.equal(few.range_counts, report.range_counts)


def test_files_keep_them_and_refuse_others(analysed, tmp_path):
    *_, report = analysed
    report.save(tmp_path / "report.json")
    again = dtme.ConflictReport.load(tmp_path / "report.json")
    assert torch.equal(again.head_losses, report.head_losses) and again.label_gains() == report.label_gains()
    made_up([0.4], [0.5], head_losses=torch.zeros(3, 2, 2, dtype=torch.float64)).save(tmp_path / "other.json")
    with pytest.raises(ValueError, match=r"head_losses must be \(n, 3, 2\)"):
        dtme.ConflictReport.load(tmp_path / "other.json")
