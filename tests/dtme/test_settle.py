"""An analysis that ends as soon as its plan is settled: how sure it has to be, and what it reads."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, IterableDataset

import dtme
from dtme.analysis import _wanted
from dtme.analysis.spaces import TokenSpaces
from dtme.interrupts import Deferred
from dtme.ranks import Ranks
from dtme.resampling import MIN_UNITS
from tests.dtme.clients import TASKS

LOSSES = {task: F.mse_loss for task in TASKS}
ALL = {"modulation": 1.0, "expansion": 1.0}  # of all blocks: a plan that no resample can change


@pytest.mark.parametrize("horizon", [8, 9, 64, 100, 1000])
@pytest.mark.parametrize("known", [True, False])
def test_all_looks_together_may_err_as_often_as_one(horizon: int, known: bool) -> None:
    looks = [n for n in (MIN_UNITS * 2**k for k in range(10)) if n <= horizon]
    looks += [horizon] if horizon not in looks else []
    errors = [1 - _wanted(0.9, n, horizon if known else None) for n in looks]
    assert sum(errors) == pytest.approx(0.1 if known else 0.1 * (1 - 0.5 ** len(looks)))
    assert min(errors) > 0 and (not known or max(errors) == pytest.approx(min(errors)))


class Endless(IterableDataset):
    """The batches, again and again, of which no one knows how many there are."""

    def __init__(self, batches: list) -> None:
        self.batches = batches

    def __iter__(self):
        while True:
            yield from self.batches


def test_it_ends_where_the_plan_is_settled_and_not_before(problem, capsys):
    model, batches = problem()
    loader = batches * -(-24 // len(batches))
    report = dtme.analyze(model, loader, LOSSES, settle=0.9, plan_options=ALL, progress=False)
    assert report.settled is True and report.num_batches == MIN_UNITS < len(loader)
    assert dtme.analyze(model, loader, LOSSES, progress=False).settled is None


def test_a_loader_without_a_length_settles_too(problem, capsys):
    model, batches = problem()
    loader = DataLoader(Endless(batches), batch_size=None)
    with pytest.raises(TypeError):
        len(loader)
    report = dtme.analyze(model, loader, LOSSES, settle=0.9, plan_options=ALL, covariance_batches=4)
    assert report.settled and report.num_batches == MIN_UNITS
    assert "conflicts" in capsys.readouterr().err


def test_few_batches_settle_nothing(problem):
    model, batches = problem()
    few = (batches * MIN_UNITS)[: MIN_UNITS - 1]
    report = dtme.analyze(model, few, LOSSES, settle=0.9, plan_options=ALL, progress=False)
    assert report.settled is False and report.num_batches == MIN_UNITS - 1


def test_labels_of_noise_never_settle(problem):
    model, batches = problem()
    torch.manual_seed(0)
    noise = [(x, {task: torch.randn_like(y) for task, y in labels.items()}) for x, labels in batches * 16][:32]
    report = dtme.analyze(model, noise, LOSSES, settle=0.99, progress=False)
    assert report.settled is False and report.num_batches == len(noise)


@pytest.mark.parametrize(("last", "settled"), [(0.05, True), (0.13, False)])
def test_both_halves_need_the_rank_that_they_have_together(last: float, settled: bool) -> None:
    """What came since the last look hardly counts in the sum of both: its rank may differ from that of the sum."""

    def tokens(energies: list[float]) -> dict[str, torch.Tensor]:
        return {"block": torch.diag(torch.tensor(energies).sqrt())[None]}

    with Deferred() as signals:
        spaces = TokenSpaces((100.0,), Ranks(None, signals))
        spaces.add(tokens([1000.0, 50.0, 5.0]))
        assert not spaces.look()
        before = spaces.split()[0]["block"].ranks
        spaces.add(tokens([10.0, 0.55 - last, last]))  # 10.42 / 0.13 is less than the ratio: two channels
        now = spaces.split()[0]["block"].ranks
        assert before == now == (1,)
        assert spaces.look() is settled
