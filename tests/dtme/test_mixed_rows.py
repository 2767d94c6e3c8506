"""Rows of one batch that have different tasks: each runs in the stream of its task alone, whatever the backbone."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import dtme
from dtme.blocks import find_blocks
from tests.dtme.backbones import BACKBONES, LENGTH, expanded, flat
from tests.dtme.clients import CLIENTS, TASKS, WIDTH, OwnTransformer, Two, make_input, mixed_plan

ROWS = ("depth", "semseg", "semseg", "normals", "depth")


def parts(x, rows):
    return {name: value[rows] for name, value in x.items()} if isinstance(x, dict) else x[rows]


def rows_of(task, task_of_row=ROWS):
    return [i for i, own in enumerate(task_of_row) if own == task]


def far_from_the_identity(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".dtme." in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def made(backbone, plan=None, **options):
    torch.manual_seed(0)
    model = dtme.MultiTaskModel(backbone, {task: nn.Linear(WIDTH, 2) for task in TASKS}).double().eval()
    return far_from_the_identity(dtme.expand(model, plan or mixed_plan(model), **options))


def gradients(model, calls):
    """Of a loss that weighs tasks and rows differently; None where there is none."""
    model.zero_grad()
    for predictions in calls:
        sum((i + 1) * p.square().sum() for i, p in enumerate(predictions.values())).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def equal(found, want, tolerance=1e-12):
    assert {name for name, g in found.items() if g is None} == {name for name, g in want.items() if g is None}
    largest = max(g.abs().max() for g in want.values() if g is not None)
    for name, g in want.items():
        if g is not None:
            assert (found[name] - g).abs().max() <= tolerance * largest, name


def alone(model, x, task_of_row=ROWS):
    return {t: model(parts(x, rows), t)[t] for t in TASKS if (rows := rows_of(t, task_of_row))}


@pytest.mark.parametrize("name", CLIENTS)
def test_one_pass_predicts_and_learns_what_each_task_does_with_its_rows(name):
    model, x = made(CLIENTS[name]()), make_input(name, rows=5)
    calls = []
    handle = model.backbone.get_submodule(next(iter(find_blocks(model.backbone)))).register_forward_hook(
        lambda *_: calls.append(1)
    )
    model(x, task_of_row=ROWS)
    calls.clear()
    found = model(x, task_of_row=ROWS)
    assert len(calls) == 1 and list(found) == [task for task in TASKS if task in ROWS]
    handle.remove()
    for task, want in alone(model, x).items():
        torch.testing.assert_close(found[task], want, rtol=1e-12, atol=1e-13)
    # a task at a time, weighted as they are weighed together
    model.zero_grad()
    for i, task in enumerate(found):
        ((i + 1) * model(parts(x, rows_of(task)), task)[task].square().sum()).backward()
    want = {name: p.grad.clone() if p.grad is not None else None for name, p in model.named_parameters()}
    equal(gradients(model, [found]), want)


@pytest.mark.parametrize("name", [name for name in BACKBONES if name != "early exit"])
def test_any_backbone_in_one_pass_or_one_task_after_the_other(name):
    make, _ = BACKBONES[name]
    _, model, _ = expanded(make)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for task_of_row in (ROWS, ROWS[:2], ROWS[3:], (*ROWS, "normals")):
            x = torch.randn(len(task_of_row), LENGTH, WIDTH).double()
            try:
                found = model(x, task_of_row=task_of_row)
            except RuntimeError as error:  # as many rows as tokens, say
                assert "which axis of the input" in str(error)
                continue
            for task, want in alone(model, x, task_of_row).items():
                assert (flat(found[task]) - flat(want)).abs().max() < 1e-9, task_of_row
    known = [verdict.together for verdict in model._row_ways._known.values()]
    apart = ("two views, one encoder", "frames", "rows that mix")
    assert all(known) or name in apart


def test_batch_statistics_are_those_of_a_task_alone():
    """Of the modulator in the one pass; of the backbone's own layers by running every task by itself, which is said."""
    x = make_input("own", rows=5)
    model = made(OwnTransformer(), modulator="batch_norm").train()
    twin = copy.deepcopy(model)
    found, want = model(x, task_of_row=ROWS), alone(twin, x)
    for task in want:
        torch.testing.assert_close(found[task], want[task], rtol=1e-12, atol=1e-13)
    for (name, a), b in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13, msg=name)

    blocks = {"layers.0": TASKS[1:], "layers.2": TASKS[:1]}
    plan = dtme.ExpansionPlan(TASKS, 2, blocks, {}, groups={"both": TASKS[1:]})
    model = made(OwnTransformer(), plan, modulator="batch_norm").train()
    twin = copy.deepcopy(model)
    found, want = model(x, task_of_row=ROWS), alone(twin, x)
    for task in want:  # those of a group too
        torch.testing.assert_close(found[task], want[task], rtol=1e-12, atol=1e-13)

    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.norm = OwnTransformer(), nn.BatchNorm1d(LENGTH)

        def forward(self, x):
            return self.norm(self.encoder(x))

    model = made(Normed()).train()
    twin = copy.deepcopy(model)
    x = torch.randn(6, LENGTH, WIDTH).double()
    with pytest.warns(UserWarning, match="rows of every task by themselves.*BatchNorm1d"):
        found = model(x, task_of_row=(*ROWS, "normals"))
    for task, want in alone(twin, x, (*ROWS, "normals")).items():
        torch.testing.assert_close(found[task], want, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(model.backbone.norm.running_mean, twin.backbone.norm.running_mean)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_go_on_with_their_rows(reentrant):
    class Checkpointed(OwnTransformer):
        on = True

        def forward(self, x):
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=reentrant) if self.on else layer(x)
            return x

    model = made(Checkpointed()).train()
    x = make_input("own", rows=5).requires_grad_()
    found = gradients(model, [model(x, task_of_row=ROWS)])
    found = {name: None if g is None else g.clone() for name, g in found.items()}
    model.backbone.on = False
    equal(found, gradients(model, [model(x, task_of_row=ROWS)]), 1e-14)


def test_compiled_blocks_and_models_run_the_rows_eagerly():
    model, x = made(OwnTransformer()), make_input("own", rows=5)
    want = alone(model, x)
    compiled = torch.compile(model, backend="eager")
    for layer in copy.copy(list(model.backbone.layers))[:1]:
        layer.compile(backend="eager")
    for module in (model, compiled):
        for task, prediction in module(x, task_of_row=ROWS).items():
            torch.testing.assert_close(prediction, want[task], rtol=1e-12, atol=1e-13)


def test_groups_of_tasks_and_parts_expanded_by_themselves():
    model = dtme.MultiTaskModel(OwnTransformer(), {task: nn.Identity() for task in TASKS}).double().eval()
    blocks = dict.fromkeys(["layers.0", "layers.2"], ("both",))
    plan = dtme.ExpansionPlan(TASKS, 2, blocks, {"layers.1": ("both", "depth")}, groups={"both": TASKS[:1] + TASKS[2:]})
    far_from_the_identity(dtme.expand(model, plan))
    two = Two().double().eval()
    for part in (two.left, two.right):
        dtme.expand(part, dtme.ExpansionPlan(TASKS, 2, {"layers.0": TASKS}, {"layers.1": TASKS[:2]}))
    of_two = dtme.MultiTaskModel(far_from_the_identity(two), {task: nn.Identity() for task in TASKS})
    x = make_input("own", rows=5)
    for one in (model, of_two):
        found = one(x, task_of_row=ROWS)
        for task, want in alone(one, x).items():
            torch.testing.assert_close(found[task], want, rtol=1e-12, atol=1e-13)


def test_a_backbone_called_directly_returns_its_rows_in_order():
    model, x = made(OwnTransformer()), make_input("own", rows=5)
    backbone = model.backbone
    with dtme.tasks(backbone, task_of_row=ROWS):
        found = backbone(x)
        part = backbone.layers(x)
    for i, task in enumerate(ROWS):
        with dtme.tasks(backbone, task):
            want = backbone(x[i : i + 1])
        for rows in (found, part):
            torch.testing.assert_close(rows[i : i + 1], want, rtol=1e-12, atol=1e-13)
    with dtme.tasks(backbone, task_of_row=ROWS):
        found = backbone(x)
    with pytest.raises(ValueError, match="whose rows output holds"):
        dtme.split(found, TASKS[:1])
    with dtme.tasks(backbone, task_of_row=ROWS), pytest.raises(RuntimeError, match=r"4 rows, but task_of_row names.*5"):
        backbone(x[:4])
    with dtme.tasks(backbone, task_of_row=ROWS), pytest.raises(RuntimeError, match=r"'layers\.0' was called outside"):
        backbone.layers[0](x)
    with pytest.raises(ValueError, match="not both"):
        dtme.tasks(backbone, "depth", task_of_row=ROWS)
    _, mixing, _ = expanded(BACKBONES["rows that mix"][0])
    with (
        dtme.tasks(mixing.backbone, task_of_row=ROWS),
        pytest.warns(UserWarning),
        pytest.raises(RuntimeError, match="rows of several tasks cannot run in one pass through this Mixing"),
    ):
        mixing.backbone(x)


def test_what_is_given_is_checked():
    model, x = made(OwnTransformer()), make_input("own", rows=5)
    for task_of_row, error, said in (
        ("depth", TypeError, "sequence of task names"),
        (3, TypeError, "got 3"),
        ([0, 1, 0, 1, 0], TypeError, r"got \[0, 1"),
        (["depth"] * 4 + ["edges"], ValueError, "unknown task 'edges'"),
        (["depth", "semseg"], ValueError, "names the tasks of 2 rows, but the input has 5"),
        (["depth"] * 4, ValueError, "names the tasks of 4 rows, but the input has 5"),
    ):
        with pytest.raises(error, match=said):
            model(x, task_of_row=task_of_row)
    with pytest.raises(ValueError, match="not both"):
        model(x, "depth", task_of_row=ROWS)
    decoded = dtme.MultiTaskModel(OwnTransformer(), decoder=lambda features: features, tasks=TASKS)
    with pytest.raises(RuntimeError, match="has a decoder, which reads the features of all"):
        decoded(x, task_of_row=ROWS)
    assert model(x[:0], task_of_row=[]) == {}
    plain = dtme.MultiTaskModel(OwnTransformer(), {task: nn.Linear(WIDTH, 2) for task in TASKS}).double()
    for task, prediction in plain(x, task_of_row=ROWS).items():
        torch.testing.assert_close(prediction, plain(x[rows_of(task)], task)[task], rtol=1e-12, atol=1e-13)


class Reading(nn.Module):
    """Returns what ``read(encoder, x)`` makes."""

    def __init__(self, read):
        super().__init__()
        self.encoder, self.read = OwnTransformer(), read
        self.table = nn.Parameter(torch.randn(6, 2))

    def forward(self, x):
        return self.read(self, x)


def read_by(read, plan=None):
    torch.manual_seed(0)
    heads = {task: nn.Identity() for task in TASKS}
    model = dtme.MultiTaskModel(Reading(read), heads, features=lambda net, x: net(x)).double().eval()
    plan = plan or dtme.ExpansionPlan(TASKS, 2, {"encoder.layers.0": TASKS, "encoder.layers.2": TASKS}, {})
    return far_from_the_identity(dtme.expand(model, plan))


def right(model, task_of_row):
    x = torch.randn(len(task_of_row), LENGTH, WIDTH).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = model(x, task_of_row=task_of_row)
    for task, want in alone(model, x, task_of_row).items():
        torch.testing.assert_close(found[task], want, rtol=1e-9, atol=1e-10)
    return [verdict.together for verdict in model._row_ways._known.values()]


A, B, C = TASKS


@pytest.mark.parametrize(
    ("read", "batches", "together"),
    [
        (lambda net, x: net.encoder(x.flip(0)).flip(0), [(A, A, B), (A, B, B, A, A)], [False]),
        (lambda net, x: net.encoder(x.roll(2, 0)).roll(-2, 0), [(A, A, B, B)], [False]),
        (lambda net, x: net.encoder(x - x.mean(0)), [(A, A, B, B)], [False]),
        (lambda net, x: (net.encoder(x), net.table), [(A, B) * 3, (A, B, C, A)], [True]),
        (lambda net, x: (net.encoder(x), x.transpose(0, 1)), [(A, B, C, A), (A, B)], None),
        (lambda net, x: (net.encoder(x), x.flatten(0, 1)), [(A, B, C, A)], [False]),
        (lambda net, x: torch.cat([net.encoder(part) for part in x.split(4)]), [(A, B, C), (A, B, C) * 3], [False]),
    ],
    ids=["flip", "roll", "mean", "table of B entries", "tokens first", "rows flattened", "parts of a larger batch"],
)
def test_what_one_order_of_tasks_or_one_size_would_not_show(read, batches, together):
    model = read_by(read)
    for task_of_row in batches:
        known = right(model, task_of_row)
    assert together is None or known == together


def test_as_many_rows_as_tokens_on_another_axis():
    model, rows = read_by(lambda net, x: (net.encoder(x).transpose(0, 1), x.transpose(0, 1))), (A, B, C, A, B)
    assert len(rows) == LENGTH
    for task_of_row in (rows, rows[:4]):
        x = torch.randn(len(task_of_row), LENGTH, WIDTH).double()
        found = model(x, task_of_row=task_of_row)
        for task, want in alone(model, x, task_of_row).items():
            torch.testing.assert_close(found[task], want, rtol=1e-12, atol=1e-13)


def test_tasks_that_nothing_tells_apart_teach_nothing_about_others():
    plan = dtme.ExpansionPlan(TASKS, 2, {"encoder.layers.0": (C,)}, {})
    model = read_by(lambda net, x: net.encoder(x) - net.encoder(x).mean(0), plan)
    for task_of_row in ((A, B, A, B), (A, C, A, C)):
        right(model, task_of_row)


def test_tasks_that_differ_elsewhere_are_compared_too():
    """The rows are turned around where only the fifth task has a module of its own."""
    tasks = ("a", "b", "c", "d", "e")

    def read(net, x):
        first, second, third = net.encoder.layers
        return third(second(first(x).flip(0)).flip(0))

    model = dtme.MultiTaskModel(Reading(read), {task: nn.Identity() for task in tasks}, features=lambda net, x: net(x))
    plan = dtme.ExpansionPlan(tasks, 2, {"encoder.layers.1": tasks[4:], "encoder.layers.2": tasks}, {})
    far_from_the_identity(dtme.expand(model.double().eval(), plan))
    x = torch.randn(5, LENGTH, WIDTH).double()
    for task_of_row in (tasks[:2] * 2 + tasks[:1], ("e", "e", "a", "a", "a"), tasks):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = model(x, task_of_row=task_of_row)
        for task, prediction in found.items():
            want = model(x[rows_of(task, task_of_row)], task)[task]
            torch.testing.assert_close(prediction, want, rtol=1e-9, atol=1e-10)


def test_a_call_that_returns_something_else_is_compared_again():
    model = read_by(lambda net, x: (net.encoder(x), net.table))
    right(model, ROWS)
    for read in (lambda net, x: (net.table, net.encoder(x)), lambda net, x: net.encoder(x)):
        model.backbone.read = read
        right(model, ROWS)


def test_statistics_that_were_frozen_when_calls_were_compared():
    """Of rows with their own tasks, and of all tasks at once."""

    def read(net, x):
        return net.norm(net.encoder(x))

    model, rows = read_by(read), (*ROWS, "normals")
    model.backbone.norm = nn.BatchNorm1d(LENGTH).double()
    x = torch.randn(6, LENGTH, WIDTH).double()
    for freeze in (True, False):
        model.train()
        model.backbone.norm.train(not freeze)
        twin = copy.deepcopy(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found, everyone = model(x, task_of_row=rows), model(x)
        for task, want in alone(twin, x, rows).items():
            torch.testing.assert_close(found[task], want, rtol=1e-9, atol=1e-10)
            torch.testing.assert_close(everyone[task], twin(x, task)[task], rtol=1e-9, atol=1e-10)


def test_rows_of_one_task_are_counted_too():
    backbone, x = made(OwnTransformer()).backbone, make_input("own", rows=5)
    for task_of_row in ([], ["depth"], ["depth"] * 3):
        said = f"5 rows, but task_of_row names the tasks of {len(task_of_row)}"
        with dtme.tasks(backbone, task_of_row=task_of_row), pytest.raises(RuntimeError, match=said):
            backbone(x)


def test_rows_that_were_all_the_same_teach_nothing():
    model, x = made(OwnTransformer()), make_input("own", rows=5)
    model(x[:1].expand(5, -1, -1), task_of_row=ROWS)
    assert not model._row_ways._known
    model(x, task_of_row=ROWS)
    assert [verdict.together for verdict in model._row_ways._known.values()] == [True]


def test_fifty_tasks_in_sixty_four_rows():
    tasks = tuple(f"task{i}" for i in range(50))
    torch.manual_seed(0)
    heads = {task: nn.Linear(WIDTH, 2) for task in tasks}
    model = dtme.MultiTaskModel(OwnTransformer(), heads).double()
    plan = dtme.ExpansionPlan(tasks, 2, {"layers.1": tasks[::2]}, {"layers.1": tasks, "layers.2": tasks[:30]})
    far_from_the_identity(dtme.expand(model, plan))
    x = torch.randn(64, LENGTH, WIDTH, dtype=torch.float64)
    task_of_row = [tasks[i] for i in torch.randint(50, (64,)).tolist()]
    found = model(x, task_of_row=task_of_row)
    model.zero_grad()
    for i, task in enumerate(found):
        ((i + 1) * model(x[rows_of(task, task_of_row)], task)[task].square().sum()).backward()
    want = {name: p.grad.clone() if p.grad is not None else None for name, p in model.named_parameters()}
    equal(gradients(model, [found]), want)
