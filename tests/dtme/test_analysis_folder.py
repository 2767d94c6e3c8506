"""An analysis that was killed goes on from its folder, and ends in the same numbers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import dtme
from dtme.analysis import folder as folders
from dtme.analysis.loop import Pass
from tests.dtme.clients import WIDTH, OwnTransformer

LOSSES = {"a": F.mse_loss, "b": F.l1_loss}
OPTIONS = {"train_mode": True, "ratio": (100.0, 3.0), "progress": False}


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop, self.out = nn.Dropout(0.3), nn.Linear(WIDTH, 2)

    def forward(self, x):
        return self.out(self.drop(x))


def make_model():
    torch.manual_seed(0)
    return dtme.MultiTaskModel(OwnTransformer(), {task: Dropping() for task in LOSSES})


def make_loader():
    generator = torch.Generator().manual_seed(1)

    def draw(channels):
        return torch.randn(5, channels, generator=generator)

    rows = [(draw(WIDTH), {task: draw(2) for task in LOSSES}) for _ in range(24)]
    return DataLoader(rows, batch_size=2, shuffle=True)


class Killed(BaseException):
    pass


class Loss:
    """Counts the batches that the second pass computes, and is killed in one of them."""

    def __init__(self, kill_at=None):
        self.calls, self.kill_at = 0, kill_at

    def __call__(self, prediction, target):
        if not torch.is_grad_enabled():  # with the labels of other images
            return F.mse_loss(prediction, target)
        self.calls += 1
        if self.calls == self.kill_at:
            raise Killed
        return F.mse_loss(prediction, target)


def run(path, loss=F.mse_loss, model=None, **options):
    torch.manual_seed(3)
    return dtme.analyze(model or make_model(), make_loader(), LOSSES | {"a": loss}, folder=path, **OPTIONS | options)


@pytest.mark.parametrize("writes", ["every batch", "when it ends"])
def test_the_same_call_goes_on_and_ends_in_the_same_numbers(tmp_path, monkeypatch, writes):
    want = run(None)
    if writes == "every batch":  # and nothing when it is killed
        monkeypatch.setattr(folders, "EVERY", 0.0)
        monkeypatch.setattr(Pass, "_write_after", lambda *_: None)
    with pytest.raises(Killed):
        run(tmp_path, Loss(kill_at=8))
    counting = Loss()
    report = run(tmp_path, counting)
    assert counting.calls == 12 - 7  # the batches before the kill are read, and not computed again
    for name in ("ranks", "range_counts", "null_counts", "valid_counts", "eigenvalues", "gains"):
        assert torch.equal(getattr(report, name), getattr(want, name)), name
    for a, b in zip(report.units, want.units, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(report.head_losses, want.head_losses) and report.head_losses.shape == (12, 2, 2)
    other, same = report.at(3.0), want.at(3.0)
    assert torch.equal(other.range_counts, same.range_counts)
    again = Loss()
    assert torch.equal(run(tmp_path, again).null_counts, want.null_counts) and again.calls == 0
    assert len(list(tmp_path.iterdir())) == 2


def test_a_shuffling_loader_with_a_generator_of_its_own_goes_on_too(tmp_path):
    def call(path, loss=F.mse_loss):
        generator = torch.Generator().manual_seed(5)
        loader = DataLoader(make_loader().dataset, batch_size=2, shuffle=True, generator=generator)
        torch.manual_seed(3)
        return dtme.analyze(make_model(), loader, {"a": loss, "b": F.l1_loss}, folder=path, progress=False)

    want = call(None)
    with pytest.raises(Killed):
        call(tmp_path, Loss(kill_at=8))
    assert torch.equal(call(tmp_path, Loss()).range_counts, want.range_counts)


@pytest.mark.parametrize("end", ["killed", "over"])
def test_another_order_or_other_data_are_noticed(tmp_path, end):
    if end == "killed":
        with pytest.raises(Killed):
            run(tmp_path, Loss(kill_at=8))
    else:
        run(tmp_path, Loss())
    loader = make_loader()
    loader.dataset[:] = [(x + 1, y) for x, y in loader.dataset]
    torch.manual_seed(3)
    with pytest.raises(ValueError, match="does not yield the batches whose sums are in folder"):
        dtme.analyze(make_model(), loader, LOSSES | {"a": Loss()}, folder=tmp_path, **OPTIONS)


def test_what_did_not_settle_has_not_settled_when_it_is_asked_again(tmp_path):
    first, again = (run(tmp_path, settle=0.99, train_mode=False) for _ in range(2))
    assert first.settled is again.settled is False and torch.equal(first.range_counts, again.range_counts)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"loss": lambda p, y: (p - y).abs().sum()}, "its losses is"),
        ({"ratio": 5.0}, "its ratio is"),
        ({"max_batches": 3}, "its max_batches is"),
        ({"model": "other"}, "its model is"),
        ({"train_mode": False}, "its train_mode is"),
    ],
)
def test_a_folder_of_another_analysis_is_refused(tmp_path, change, says):
    run(tmp_path)
    before = sorted(tmp_path.iterdir())
    if "model" in change:
        change = {"model": make_model().double().float()}
        with torch.no_grad():
            next(change["model"].parameters()).add_(1)
    with pytest.raises(ValueError, match=rf"holds the sums of another analysis: {says}"):
        run(tmp_path, **change)
    assert sorted(tmp_path.iterdir()) == before


def test_a_flipped_bit_is_noticed(tmp_path):
    run(tmp_path)
    (*_, last) = sorted(tmp_path.iterdir())
    data = last.read_bytes()
    for place in (3, 30, 60, len(data) // 2, len(data) - 1):
        last.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        with pytest.raises(ValueError, match=r"sums-0-of-1-.*pt is damaged: it.* Delete it to begin anew"):
            run(tmp_path)


def test_damaged_files_and_no_folder(tmp_path):
    run(tmp_path)
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"sums-0-of-1-.*pt is damaged"):
        run(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"folder .*file cannot be written to"):
        run(tmp_path / "file")
    with pytest.raises(TypeError, match="folder must be None or a path"):
        run(3)
