"""Analyses by a step function: whatever it runs is in the analysis' mode meanwhile, and as before afterwards."""

import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dtme
from tests.dtme.clients import SDPA, WIDTH, OwnBlock, OwnTransformer
from tests.dtme.snapshots import Dropping, same, snapshot

HEADS = ("a", "b", "c")
DATA = [torch.randn(4, 5, WIDTH, generator=torch.Generator().manual_seed(i)) for i in range(3)]
COUNTS = ("ranks", "range_counts", "null_counts", "valid_counts")


class Net(nn.Module):
    """A backbone, and behind it all that minds the mode it is in."""

    def __init__(self, depth=2):
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.neck = OwnTransformer(depth), Dropping()
        self.neck.out = nn.Linear(WIDTH, WIDTH)
        self.heads = nn.ModuleDict({task: nn.Linear(WIDTH, 1) for task in HEADS})

    def decode(self, tokens):
        y = self.neck(tokens)
        return {task: head(y) for task, head in self.heads.items()}

    def forward(self, x):
        return self.decode(self.backbone(x))

    def training_step(self, backbone, x):
        return losses(self.decode(F.dropout(backbone(x), 0.3, self.training)))


def losses(outputs):
    return {task: y.square().mean() for task, y in outputs.items()}


def run(model, step, **options):
    return dtme.analyze(model, DATA, step, progress=False, **options)


def equal(got, want):
    return all(torch.equal(getattr(got, name), getattr(want, name)) for name in COUNTS)


@pytest.fixture
def net():
    net = Net().train()
    net.heads["a"].eval()
    net.heads["b"].weight.requires_grad_(False)
    return net


@pytest.fixture
def want():
    return run(Net(), lambda net, x: losses(net(x)), blocks="backbone.layers")


STEPS = {
    "the whole": lambda net: lambda _, x: losses(net(x)),
    "its parts": lambda net: lambda backbone, x: losses(net.decode(backbone(x))),
    "a method": lambda net: net.training_step,
    "the compiled whole": lambda net: (lambda compiled: lambda _, x: losses(compiled(x)))(
        torch.compile(net, backend="eager")
    ),
    "compiled parts": lambda net: (lambda decode: lambda backbone, x: losses(decode(backbone(x))))(
        torch.compile(net.decode, backend="eager")
    ),
}


@pytest.mark.parametrize("make", STEPS.values(), ids=STEPS)
def test_what_a_step_runs_beside_the_model_is_held_as_the_model_is(net, want, make):
    before = snapshot(net)
    got = run(net.backbone, make(net))
    same(before, snapshot(net))
    assert equal(got, want) and got.blocks == ("layers.0", "layers.1")


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("batch", [2, 5])
def test_it_is_put_back_whatever_ends_the_step(net, error, batch):
    seen = []

    def step(backbone, x):
        outputs = net(x)
        assert not any(module.training for module in net.modules())
        assert not any(parameter.requires_grad for parameter in net.parameters())
        seen.append(torch.rand(0))
        if len(seen) == batch:
            raise error
        return losses(outputs)

    before = snapshot(net)
    with pytest.raises(error):
        run(net.backbone, step)
    same(before, snapshot(net))


def test_in_training_mode_everything_trains(net):
    before, modes = snapshot(net), set()

    def step(_, x):
        outputs = net(x)
        modes.update(module.training for module in net.modules())
        return losses(outputs)

    run(net.backbone, step, train_mode=True)
    assert modes == {True}
    same(before, snapshot(net))


def test_random_numbers_beside_modules_that_are_seen_only_in_part_are_refused(net):
    def step(backbone, x):
        return net.training_step(backbone, x)  # not a call of the module, so that its mode is not known

    before = snapshot(net)
    with pytest.raises(ValueError, match=r"no part of OwnTransformer ran \(Dropping, Linear\).*blocks=\"backbone\""):
        run(net.backbone, step)
    same(before, snapshot(net))
    run(net.backbone, step, train_mode=True)
    whole = run(net, lambda net, x: net.training_step(net.backbone, x), blocks="backbone.layers")
    assert whole.range_rates.isfinite().all()


def test_random_numbers_and_losses_that_are_modules_are_a_steps_own_affair():
    model = dtme.MultiTaskModel(OwnTransformer(2), {task: nn.Linear(WIDTH, 1) for task in HEADS})
    criterion = nn.MSELoss()

    def step(model, x):
        return {task: criterion(y, torch.rand(y.shape)) + 0 * nn.Dropout()(y).sum() for task, y in model(x).items()}

    assert run(model, step).range_rates.isfinite().all()


def test_losses_and_features_that_are_modules_or_call_them_are_held_too():
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(1)

        def forward(self, y, target):
            return F.mse_loss(self.norm(y.mT).mT, target)

    adapter, loss = Dropping().train(), Loss().train()
    adapter.out = nn.Linear(WIDTH, WIDTH)
    model = dtme.MultiTaskModel(
        OwnTransformer(2), {t: nn.Linear(WIDTH, 1) for t in "ab"}, features=lambda backbone, x: adapter(backbone(x))
    )
    data = [(x, {task: torch.zeros(4, 5, 1) for task in "ab"}) for x in DATA]
    before = [snapshot(module) for module in (adapter, loss)]
    reports = [dtme.analyze(model, data, {"a": loss, "b": loss}, progress=False) for _ in range(2)]
    assert equal(*reports)
    for module, state in zip((adapter, loss), before, strict=True):
        same(state, snapshot(module))


def test_other_threads_and_what_the_loader_calls_are_left_alone(net):
    elsewhere, augmentation = nn.BatchNorm1d(WIDTH), nn.Dropout(0.5)
    start, done, modes = threading.Event(), threading.Event(), []

    def work():
        start.wait(30)
        elsewhere(DATA[0].mT)
        modes.append(elsewhere.training)
        done.set()

    class Loader:
        def __iter__(self):
            for x in DATA:
                augmentation(x)
                modes.append(augmentation.training)
                yield x

    def step(_, x):
        start.set()
        assert done.wait(30)
        return losses(net(x))

    thread = threading.Thread(target=work)
    thread.start()
    dtme.analyze(net.backbone, Loader(), step, progress=False)
    thread.join()
    assert modes == [True] * 7 and elsewhere.num_batches_tracked == 1
    assert not nn.modules.module._global_forward_pre_hooks


def test_a_module_that_shares_parts_with_the_model_is_put_back_once(net, want):
    """It holds the model, its buffers and its weights: what counts is how they were before the analysis."""
    other = nn.ModuleDict({"net": net, "again": net.neck})
    net.backbone.register_buffer("calls", net.neck.norm.running_mean)

    def step(backbone, x):
        backbone.calls.add_(1)
        return losses(other["net"](x))

    before = snapshot(net)
    run(net.backbone, step)
    same(before, snapshot(net))


def test_modules_that_a_forward_makes_are_not_kept(net):
    made = []

    def step(backbone, x):
        softmax = nn.Sequential(nn.Softmax(-1))
        made.append(weakref.ref(softmax))
        return losses(net(softmax(x)))

    def checked(backbone, x):
        assert all(reference() is None for reference in made)
        return step(backbone, x)

    run(net.backbone, checked)
    assert len(made) == 2 * len(DATA)


def test_a_step_under_an_expanded_model(net, want):
    """At its start an affine plan changes nothing, neither what the tasks' gradients are."""
    model = dtme.MultiTaskModel(net.backbone, {task: nn.Identity() for task in HEADS})
    dtme.expand(model, dtme.ExpansionPlan(HEADS, 1, {"layers.0": HEADS}))
    before = snapshot(net)

    def step(model, x):
        return {task: net.heads[task](net.neck(tokens)).square().mean() for task, tokens in model(x).items()}

    assert equal(run(model, step), want)
    same(before, snapshot(net))


# --- numbers as losses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", [False, True])
def test_a_number_says_that_a_task_has_no_gradient_in_a_batch(zero):
    net, numbers = Net().eval(), {0: {"a": 0.0}, 1: {"a": 0, "b": 1.5, "c": 2}, 2: {}}

    def step(net, batch):
        i, x = batch
        return losses(net(x)) | numbers[i]

    def analyze(data):
        report = dtme.analyze(
            net, data, step, blocks="backbone.layers", progress=False, count_zero_gradients=zero, covariance_batches=1
        )
        return report

    data = list(enumerate(DATA))
    got, last = analyze(data), analyze([data[0], data[2]])
    for name in COUNTS:  # the second batch has no pair, the first only b with c
        assert torch.equal(getattr(got, name), getattr(last, name))
    assert (got.valid_counts[:, 0, 1] == 20).all() and (got.valid_counts[:, 1, 2] == 40).all()
    with pytest.raises(ValueError, match="task 'a' has no gradient anywhere"):
        analyze(data[:2])
    numbers[1]["b"] = float("nan")
    with pytest.raises(ValueError, match="loss of task 'b' is not finite: nan"):
        analyze(data)
    numbers[1]["b"] = True
    with pytest.raises(ValueError, match="loss of task 'b' must be a scalar tensor, got bool"):
        analyze(data)


# --- blocks that fewer than two tasks reach ---------------------------------------------------------------------------


class Decoders(nn.Module):
    """Every task has blocks of its own behind the shared ones."""

    def __init__(self, shared=2):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(*[OwnBlock(SDPA()) for _ in range(shared)])
        self.out = nn.ModuleDict({t: nn.Sequential(OwnBlock(SDPA()), nn.Linear(WIDTH, 1)) for t in "ab"})

    def forward(self, x):
        y = self.encoder(x)
        return {task: out(y) for task, out in self.out.items()}


@pytest.mark.parametrize("zero", [False, True])
def test_blocks_of_a_tasks_own_decoder_are_no_part_of_the_plan(zero):
    net = Decoders()
    report = run(net, lambda net, x: losses(net(x)), count_zero_gradients=zero)
    assert report.blocks == ("encoder.0", "encoder.1", "out.a.0", "out.b.0")
    assert report.valid_counts[:, 0, 1].tolist() == [60, 60, 0, 0]
    assert report.shared_blocks == report.blocks[:2]
    plan = report.plan(modulation=1, expansion=1)
    assert plan.blocks == tuple(plan.num_features) == report.shared_blocks
    plain = net(DATA[0])
    dtme.expand(net, report.plan(expansion=0))
    assert not hasattr(net.out["a"][0], "dtme")
    with dtme.tasks(net, "b"):
        torch.testing.assert_close(net(DATA[0])["b"], plain["b"])


def test_an_analysis_without_a_pair_says_why():
    step = lambda net, x: losses(net(x))  # noqa: E731
    with pytest.raises(ValueError, match=r"no block .* two tasks.*'out.a.0' by 'a', 'out.b.0' by 'b'.*blocks="):
        run(Decoders(shared=0), step)

    def either(net, batch):
        outputs, i = net(batch[0]), batch[1]
        return losses(outputs) | {"ab"[i % 2]: 0.0}

    net = Decoders()
    with pytest.raises(ValueError, match="no two tasks have a gradient at the same token"):
        dtme.analyze(net, [(x, i) for i, x in enumerate(DATA)], either, progress=False)
