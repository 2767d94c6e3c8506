"""The state of a forward belongs to the thread, or the asyncio task, that runs it, and is gone when it ends."""

import asyncio
import random
import sys
import threading
from collections import Counter

import pytest
import torch

import dtme
from dtme import choices, streams
from tests.dtme.clients import TASKS

CHOICES = (None, *TASKS, TASKS[:2], (TASKS[2], TASKS[0]))


@pytest.fixture
def often():
    """Threads take turns a hundred times as often as usual."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-5)
    yield
    sys.setswitchinterval(before)


def predictions(model, x):
    """Calls of every kind, by name: what they return when nothing else runs."""

    def through_tasks(names):
        def call():
            with dtme.tasks(model.backbone, names):
                output = model.backbone(x)
            parts = dtme.split(getattr(output, "last_hidden_state", output), names)
            return {task: model.heads[task](part) for task, part in parts.items()}

        return call

    calls = {f"all of {names}": lambda names=names: model(x, names) for names in CHOICES}
    calls |= {f"with {names}": through_tasks(names) for names in CHOICES[1:]}
    singles = {task: model.export_task(task) for task in TASKS}
    return calls | {f"exported {task}": lambda task=task: {task: singles[task](x)} for task in TASKS}


def equal(got, want):
    return got.keys() == want.keys() and all(torch.allclose(got[task], want[task], atol=1e-10) for task in want)


@pytest.mark.parametrize("client", ["transformers ViT", "timm ViT", "own, generic seam"])
def test_eight_threads_get_what_they_get_alone(expanded, often, client):
    model, x = expanded(client)
    calls = predictions(model, x)
    with torch.no_grad():
        want = {name: call() for name, call in calls.items()}
    counts: Counter[str] = Counter()

    def work(seed):
        draw = random.Random(seed)
        found = []
        with torch.no_grad():
            for _ in range(25):
                name = draw.choice(list(calls))
                try:
                    found.append("right" if equal(calls[name](), want[name]) else f"wrong: {name}")
                except Exception as error:  # counted, or the test would pass without it
                    found.append(f"{name}: {error}")
        counts.update(found)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert counts == {"right": 200}


def test_first_calls_of_many_threads_at_once(expanded, often):
    model, x = expanded("timm ViT")
    other, _ = expanded("timm ViT")
    want = {names: other(x, names) for names in CHOICES}
    found = []
    threads = [
        threading.Thread(target=lambda names=names: found.append(equal(model(x, names), want[names])))
        for names in CHOICES * 2
    ]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert found == [True] * len(threads)


def test_training_in_one_thread_beside_predicting_in_others(expanded, often):
    model, x = expanded("own, generic seam")

    def gradients():
        loss = sum(p.square().sum() for p in model(x).values())
        return torch.autograd.grad(loss, list(model.parameters()))

    want, predicted, stop, found = gradients(), model(x, "depth"), threading.Event(), []

    def predict():
        while not stop.is_set():
            with torch.no_grad():
                found.append(equal(model(x, "depth"), predicted))

    threads = [threading.Thread(target=predict) for _ in range(2)]
    [thread.start() for thread in threads]
    try:
        for _ in range(10):
            for a, b in zip(gradients(), want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    finally:
        stop.set()
        [thread.join() for thread in threads]
    assert found and all(found)


def test_asyncio_tasks_choose_for_themselves(expanded):
    model, x = expanded("timm ViT")
    want = {names: model(x, names) for names in CHOICES}

    async def serve(names):
        for _ in range(5):
            with dtme.tasks(model.backbone, names):
                await asyncio.sleep(0)
                tokens = model.backbone.forward_features(x)
                await asyncio.sleep(0)
            got = {task: model.heads[task](part) for task, part in dtme.split(tokens, names).items()}
            assert equal(got, want[names])

    async def everybody():
        await asyncio.gather(*(serve(names) for names in CHOICES[1:] * 2))

    asyncio.run(everybody())


@pytest.mark.parametrize("client", ["transformers ViT", "own, generic seam"])
def test_exceptions_in_the_middle_leave_nothing_behind(expanded, client):
    model, x = expanded(client)
    want = {names: model(x, names) for names in CHOICES}
    draw = random.Random(0)
    modules = [module for module in model.backbone.modules() if module is not model.backbone]
    interrupted = 0
    for i in range(120):
        kind = draw.choice([KeyboardInterrupt, ValueError, asyncio.CancelledError])

        def interrupt(*_, kind=kind):
            raise kind

        handle = draw.choice(modules).register_forward_pre_hook(interrupt)
        try:
            with dtme.tasks(model.backbone, draw.choice(CHOICES[1:])):
                model.backbone(x) if i % 2 else model(x, draw.choice(CHOICES))
        except kind:
            interrupted += 1
        handle.remove()
        assert streams._forwards.get() == () == choices._choices.get()
        if i % 20 == 0:
            assert all(equal(model(x, names), want[names]) for names in CHOICES)
    assert interrupted > 60


def test_a_block_that_was_interrupted_alone_leaves_nothing_to_the_next(expanded):
    model, x = expanded("own, generic seam")
    first, second = model.backbone.layers[0], model.backbone.layers[1]
    want = model(x)

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = first.mlp.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), dtme.tasks(model.backbone, "depth"):
        first(x)
    handle.remove()
    with dtme.tasks(model.backbone, "semseg"):
        alone = second(x)
    assert alone.shape == x.shape and equal(model(x), want)
    with dtme.tasks(model.backbone, TASKS):
        assert len(second(x)) == 3 * len(x)
    with dtme.tasks(model.backbone, TASKS):
        assert len(first(x)) == 3 * len(x)
