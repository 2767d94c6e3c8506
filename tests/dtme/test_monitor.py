"""The monitor: sees what an analysis of the same batches sees, and the training does not see it."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import dtme
from tests.dtme.clients import TASKS
from tests.dtme.snapshots import Dropping, same, snapshot

LOSSES = {task: mse_loss for task in TASKS}


class Writer:
    def __init__(self):
        self.scalars = []

    def add_scalar(self, tag, value, step):
        self.scalars.append((tag, value, step))


def train(model, loader, steps, monitor=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    for step in range(steps):
        x, target = loader[step % len(loader)]
        optimizer.zero_grad()
        sum(LOSSES[task](out, target[task]) for task, out in model(x).items()).backward()
        if monitor is not None:
            before = snapshot(model)
            monitor.step((x, target))
            same(before, snapshot(model))
            assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_the_training_is_the_same_and_the_history_that_of_analyses(problem):
    model, loader = problem()
    model.heads["semseg"] = Dropping().double()
    model.train()
    twin, writer = copy.deepcopy(model), Writer()
    monitor = dtme.ConflictMonitor(model, LOSSES, every=5, ratio=10.0, writer=writer, blocks="layers")
    assert monitor.overhead == 0 and "0 analyses in 0 steps" in str(monitor)
    torch.manual_seed(0)
    watched = train(model, loader, 12, monitor)
    torch.manual_seed(0)
    unwatched = train(twin, loader, 12)
    assert all(torch.equal(watched[name], value) for name, value in unwatched.items())

    assert [seen.step for seen in monitor.history] == [5, 10] and monitor.num_steps == 12
    for seen in monitor.history:
        assert seen.error is None and seen.report.ratio == 10.0 and seen.report.bases is None
        assert list(seen.range_rates.values()) == seen.report.range_rates.tolist()
        assert list(seen.null_rates) == list(seen.report.blocks) and seen.seconds > 0
    assert 0 < monitor.overhead < 1
    tags = [tag for tag, _, step in writer.scalars if step == 10]
    blocks = monitor.history[0].report.blocks
    want = [f"dtme/{space}{rest}" for space in ("range", "null") for rest in (*(f"/{b}" for b in blocks), "_mean")]
    assert tags == [*want, "dtme/overhead"]
    values = {(tag, step): value for tag, value, step in writer.scalars}
    assert values["dtme/null_mean", 5] == pytest.approx(monitor.history[0].report.null_rates.mean().item())
    shown = str(monitor)
    assert "2 analyses in 12 steps" in shown and f"{monitor.overhead:.1%} of the time"[-12:] in shown
    assert len(shown.splitlines()) == 5


@pytest.mark.parametrize("batches", [None, 1, 3])
def test_the_last_batches_before_a_step_are_analysed(problem, batches):
    model, loader = problem()
    monitor = dtme.ConflictMonitor(model, LOSSES, every=4, batches=batches)
    seen = [monitor.step(loader[step % 3]) for step in range(8)]
    assert [step for step, one in enumerate(seen) if one is not None] == [3, 7]
    read = [loader[step % 3] for step in range(8 - (batches or 2), 8)]
    report = dtme.analyze(model, read, LOSSES, progress=False)
    assert torch.equal(seen[-1].report.range_counts, report.range_counts)
    assert torch.equal(seen[-1].report.null_counts, report.null_counts)
    assert seen[-1].mean("range") == pytest.approx(report.range_rates.mean().item())
    assert dtme.ConflictMonitor(model, LOSSES, every=1).step(loader[0]).report.num_samples == 3


def test_a_loop_of_ones_own(problem):
    model, loader = problem()

    def step(net, batch):
        tokens = net(batch[0])
        return {task: (tokens * tokens.roll(k + 1, -1)).mean() for k, task in enumerate(TASKS)}

    monitor = dtme.ConflictMonitor(model.backbone, step, every=2)
    for batch in loader[:2]:
        monitor.step(batch)
    assert monitor.history[0].report.tasks == TASKS


def test_a_failing_analysis_is_recorded_and_warned_of_once(problem):
    model, loader = problem()
    writer = Writer()
    losses = LOSSES | {"depth": lambda out, target: target * out.mean()}
    monitor = dtme.ConflictMonitor(model, losses, every=2, writer=writer)
    empty = [(x, target | {"depth": torch.tensor(math.nan)}) for x, target in loader]
    before = snapshot(model)
    with pytest.warns(UserWarning, match="step 2 failed, and the training goes on.*'depth'") as caught:
        for x, target in [*empty[:2], *empty[:2]]:
            monitor.step((x, target))
    assert len(caught) == 1
    same(before, snapshot(model))
    first, second = monitor.history
    assert first.report is None and "'depth'" in first.error and first.range_rates == {} and second.error
    assert math.isnan(first.mean("range"))
    assert [tag for tag, *_ in writer.scalars] == ["dtme/overhead"] * 2
    assert "2 of them failed" in str(monitor) and "failed" in str(monitor).splitlines()[-1]
    for x, target in loader[:2]:
        monitor.step((x, target | {"depth": torch.tensor(1.0)}))
    assert monitor.history[-1].error is None


def test_a_failing_writer_is_recorded_and_warned_of_once(problem):
    model, loader = problem()
    writer = Writer()
    monitor = dtme.ConflictMonitor(model, LOSSES, every=1, writer=writer)
    monitor.step(loader[2])
    given, works = len(writer.scalars), writer.add_scalar
    writer.add_scalar = lambda *_: next(iter(()))  # StopIteration, of all errors
    with pytest.warns(
        UserWarning, match=r"monitor's writer at step 2 failed, and the training goes on.*StopIter"
    ) as said:
        seen = [monitor.step(loader[2]) for _ in range(2)]
    assert len(said) == 1 and said[0].filename == __file__ and len(writer.scalars) == given
    assert all(one is kept for one, kept in zip(seen, monitor.history[1:], strict=True))
    assert all("StopIteration" in one.writer_error and one.error is None and one.range_rates for one in seen)
    assert "failed" not in str(monitor)  # of the analyses none did
    writer.add_scalar = works
    assert monitor.step(loader[2]).writer_error is None and len(writer.scalars) == 2 * given


class DistributedDataParallel(nn.Module):
    """Known by its name: the real one wants a group of processes."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def test_bad_arguments_are_refused_at_construction(problem, monkeypatch):
    model, _ = problem()
    for arguments, error, message in (
        ({"writer": print}, TypeError, "add_scalar.*got builtin"),
        ({"every": 0}, ValueError, "every must be a positive integer, got 0"),
        ({"every": True}, ValueError, "every"),
        ({"every": 1.5}, ValueError, "every"),
        ({"batches": 0}, ValueError, "batches must be a positive integer"),
        ({"every": 3, "batches": 4}, ValueError, "4 > 3"),
        ({"max_overhead": 0.0}, ValueError, "max_overhead"),
        ({"ratio": -1.0}, ValueError, "ratio"),
        ({"ratio": [100.0, 10.0]}, ValueError, "ratio must be one positive number"),
        ({"ratio": [100.0]}, ValueError, "ratio must be one positive number"),
        ({"max_overhead": "a"}, ValueError, "max_overhead must be None or a share .* got 'a'"),
        ({"max_batches": 3}, TypeError, "'max_batches'"),
        ({"covariance_batches": 3}, TypeError, "'covariance_batches'"),
        ({"folder": "sums"}, TypeError, "'folder'; its options .*'blocks', 'token_mask'"),
        ({"settle": 0.9}, TypeError, "'settle'"),
        ({"plan_options": {}}, TypeError, "'plan_options'"),
        ({"process_group": None}, TypeError, "'process_group'"),
        ({"blocks": ["x"]}, ValueError, "blocks names 'x'"),
        ({"blocks": 3}, TypeError, "blocks must be"),
        ({"token_mask": 3}, TypeError, "token_mask must be None or a function"),
        ({"max_tasks": 0}, ValueError, "max_tasks"),
        ({"method": "fast"}, ValueError, "method must be one of"),
        ({"autocast": "bf16"}, ValueError, "autocast must be"),
        ({"device": "quantum"}, ValueError, "device must be .* got 'quantum'"),
        ({"model": 3}, TypeError, "must be a torch.nn.Module, got int"),
        ({"model": 3, "losses": print}, TypeError, "must be a torch.nn.Module, got int"),
        ({"tau": 3}, TypeError, "'tau'"),
        ({"losses": LOSSES | {"pose": mse_loss}}, ValueError, "'pose'"),
        ({"losses": 3}, TypeError, "losses"),
        ({"model": nn.DataParallel(model)}, RuntimeError, "trained by DataParallel"),
        ({"model": DistributedDataParallel(model)}, RuntimeError, "trained by DistributedDataParallel"),
        ({"model": nn.Sequential(DistributedDataParallel(model))}, RuntimeError, "by DistributedDataParallel"),
    ):
        with pytest.raises(error, match=message):
            dtme.ConflictMonitor(**({"model": model, "losses": LOSSES} | arguments))
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 4)
    with pytest.raises(RuntimeError, match="a group of 4 processes"):
        dtme.ConflictMonitor(model, LOSSES)


def test_only_the_last_analyses_are_shown(problem):
    model, loader = problem()
    monitor = dtme.ConflictMonitor(model, LOSSES, every=1)
    for _ in range(12):
        monitor.step(loader[2])
    lines = str(monitor).splitlines()
    assert lines[1] == "(the last 10)" and len(lines) == 14 and lines[-1].split()[0] == "12"


def test_an_analysis_that_would_cost_too_much_is_left_out(problem, monkeypatch):
    model, loader = problem()
    now = [0.0]
    monkeypatch.setattr("dtme.monitor.perf_counter", lambda: now[0])
    analyze = dtme.analyze

    def slow(*args, **options):
        now[0] += 3.0
        return analyze(*args, **options)

    monkeypatch.setattr("dtme.monitor.analyze", slow)
    monitor = dtme.ConflictMonitor(model, LOSSES, every=10, max_overhead=0.1)
    for _ in range(100):
        now[0] += 1.0
        monitor.step(loader[2])
    assert [seen.step for seen in monitor.history] == [10, 60, 90] and monitor.overhead <= 0.1
