"""Heads that have learnt nothing are told by name: no rate shows them, the losses with other images' labels do."""

import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dtme
from dtme.trees import tensors
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
    others, own = report.head_losses[:, 1].unbind(1)  # the larger is what is divided by: here that of own labels
    assert own.mean() < others.mean()
    gain, half = report.label_gains()["drawn"]
    draws = torch.randint(12, (20_000, 12), generator=torch.Generator().manual_seed(0))
    gains = own[draws].mean(1) / others[draws].mean(1) - 1
    assert math.isclose(gain, (own.mean() / others.mean()).item() - 1, abs_tol=1e-12)
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
    assert 0.4 < gain - half < gain < 0.6


def test_losses_around_zero_are_measured_by_those_that_are_not():
    """A negative cosine: with the labels of others about 0, now on this side of it and now on that."""
    draw = torch.Generator().manual_seed(0)
    others = 0.02 * torch.randn(12, 2, generator=draw, dtype=torch.float64)
    report = made_up([0.4], [0.5], num_tasks=2, head_losses=torch.stack([others - 0.8, others], 2))
    gain, half = report.label_gains()["semseg"]
    assert 0.9 < gain - half < gain + half < 1.1
    assert "these heads" not in str(report)


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
    from dtme.analysis import passes

    model, loader, report = analysed
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


def squares_of_some(prediction, target):
    """Draws its images, and writes into both of its arguments, as losses in use do."""
    chosen = torch.randperm(len(target))[: len(target) // 2]
    target -= 1
    return F.mse_loss(prediction.sigmoid_()[chosen], target[chosen])


@pytest.mark.parametrize(
    "options", [{"train_mode": True}, {"train_mode": True, "method": "streamed"}, {"max_tasks": 2}]
)
def test_all_else_is_as_if_they_had_not_been_taken(monkeypatch, options):
    from dtme.analysis import passes

    model = make_model()
    for name, head in model.heads.items():
        model.heads[name] = nn.Sequential(nn.Dropout(0.3), head)
    losses = {**LOSSES, "known": squares_of_some}

    def analyse():
        torch.manual_seed(3)
        with pytest.warns() if "max_tasks" in options else nullcontext():
            return dtme.analyze(model, make_loader(model), losses, progress=False, **options)

    report = analyse()
    monkeypatch.setattr(passes, "HEAD_BATCHES", 0)
    without = analyse()
    assert without.head_losses is None and report.head_losses.isfinite().any(0).all()
    for name in ("range_counts", "null_counts", "valid_counts", "gains", "gain_resamples"):
        assert torch.equal(getattr(report, name), getattr(without, name)), name


def test_what_a_loss_writes_into_its_arguments_is_not_seen():
    model = make_model()

    def shifted(prediction, target):
        target -= 1
        return F.mse_loss(prediction.mul_(2), target)

    report = dtme.analyze(model, make_loader(model), {**LOSSES, "known": shifted}, progress=False)
    plain = {**LOSSES, "known": lambda prediction, target: F.mse_loss(2 * prediction, target - 1)}
    want = dtme.analyze(model, make_loader(model), plain, progress=False)
    torch.testing.assert_close(report.head_losses, want.head_losses, rtol=1e-12, atol=0)


def first_tensor(target):
    return next(tensors(target))


@pytest.mark.parametrize(
    ("made", "known"),
    [
        (lambda y: {"labels": y, "more": (y.clone(), None)}, True),
        (lambda y: [y[:1].repeat(3, 1), y], False),  # an axis that is not the batch
        (lambda y: y.repeat(2, 1), False),  # such as the boxes of all images
        (lambda y: [y[0].repeat(3, 1) for _ in y], False),  # three boxes of each image
        (lambda y: {"labels": y, "scale": torch.tensor(2.0)}, False),
        (lambda y: {"labels": y, "names": ["a"] * len(y)}, False),
        (lambda y: y[:1].expand(len(y), -1), False),  # all images have the same labels
    ],
)
def test_labels_that_are_not_told_apart_by_image_say_nothing(analysed, made, known):
    model, loader, _ = analysed
    loader = [(x, {**y, "known": made(y["known"])}) for x, y in loader]

    def loss(prediction, target):
        labels = first_tensor(target)
        return F.mse_loss(prediction, labels) if known else (prediction.mean(0) - labels.mean(0)).square().sum()

    report = dtme.analyze(model, loader, {**LOSSES, "known": loss}, progress=False)
    gains = report.label_gains()
    assert math.isnan(gains["known"][0]) != known and not math.isnan(gains["drawn"][0])
    assert "'known' (" not in str(report)


def test_a_loss_that_cannot_be_taken_again_does_not_end_the_analysis(analysed):
    model, loader, _ = analysed

    def penalised(prediction, target):
        value = F.mse_loss(prediction, target)
        return value + torch.autograd.grad(value, prediction, create_graph=True)[0].square().sum()

    report = dtme.analyze(model, loader, {**LOSSES, "known": penalised}, progress=False)
    assert math.isnan(report.label_gains()["known"][0]) and report.head_losses[:, 0, 1].isnan().all()


def test_a_few_batches_are_told_from_heads_that_know_nothing():
    few = torch.tensor([[[1.0, 2.0]] * 2, [[1.0, 4.0]] * 2], dtype=torch.float64)
    assert "read more batches" in str(made_up([0.4], [0.5], num_tasks=2, head_losses=few))
    nothing = torch.tensor([[[1.0, 1.0]] * 2, [[1.1, 1.0]] * 2], dtype=torch.float64)
    assert "train them first" in (text := str(made_up([0.4], [0.5], num_tasks=2, head_losses=nothing)))
    assert "read more batches" not in text


def test_a_report_at_another_ratio_keeps_them(analysed):
    model, loader, report = analysed
    both = dtme.analyze(model, loader, LOSSES, ratio=(100.0, 3.0), progress=False)
    assert torch.equal(both.at(3.0).head_losses, report.head_losses)


def test_where_some_are_not_known_chance_still_advises():
    losses = torch.tensor([[[1.0, 2.0], [math.nan] * 2]] * 4, dtype=torch.float64)
    report = made_up([0.5, 0.5], [0.5, 0.5], num_tasks=2, head_losses=losses)
    assert "train the heads first" in str(report)
    assert "train the heads first" not in str(
        made_up([0.5, 0.5], [0.5, 0.5], num_tasks=2, head_losses=losses[:, [0, 0]])
    )
