"""Signals wait while a model is half changed; whenever they come, it is as before, or done."""

import importlib
import random
import signal
import sys
import threading
import time
import weakref

import pytest
import torch
import torch.nn.functional as F

import dtme
from dtme.interrupts import Deferred
from tests.dtme.clients import TASKS
from tests.dtme.snapshots import same, snapshot


@pytest.fixture
def dropped(monkeypatch):
    """What Python drops because it was raised in a destructor, or in the callback of a weak reference."""
    errors = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: errors.append(unraisable.exc_value))
    return errors


@pytest.fixture
def interrupt(dropped):
    """interrupt(seconds, function): run it, and press Ctrl-C after so long, in it or in the wait behind it."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGALRM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))

    def run(seconds, function):
        with pytest.raises(KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, seconds)
            function()
            if dropped:  # as this function was left: nobody could have helped
                raise dropped.pop()
            time.sleep(5)
        dropped.clear()

    yield run
    signal.setitimer(signal.ITIMER_REAL, 0)  # of a function that was interrupted earlier by itself
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_signals_wait_until_they_are_allowed(interrupt):
    steps = []

    def work():
        with Deferred() as signals:
            time.sleep(0.05)
            steps.append("put off")
            try:
                with signals.allowed():
                    steps.append("never")
            finally:
                signal.raise_signal(signal.SIGINT)
                steps.append("cleaned up")

    interrupt(0.01, work)
    assert steps == ["put off", "cleaned up"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_inner_one_waits_with_the_outer_one(interrupt):
    steps = []

    def work():
        with Deferred(), Deferred() as inner:
            with inner.allowed():
                time.sleep(0.05)
            steps.append("inner")

    interrupt(0.01, work)
    assert steps == ["inner"]

    def inside_of_what_lets_them_through():
        with Deferred() as outer, outer.allowed():
            with Deferred():
                time.sleep(0.05)
                steps.append("whole")
            steps.append("never")

    steps.clear()
    interrupt(0.01, inside_of_what_lets_them_through)
    assert steps == ["whole"]


class Weak:
    """Something to point at weakly."""


def interrupt_where_it_is_dropped():
    thing = Weak()
    reference = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGINT))
    del thing
    assert reference() is None


def test_a_signal_that_python_drops_is_handled_again(dropped):
    steps = []
    with Deferred() as signals:
        with pytest.raises(KeyboardInterrupt), signals.allowed():
            interrupt_where_it_is_dropped()
            assert [type(error) for error in dropped] == [KeyboardInterrupt]
            signal.raise_signal(signal.SIGINT)  # waits behind the first
            steps.append("to the end")
        with pytest.raises(KeyboardInterrupt), signals.allowed():
            steps.append("never")
        with signals.allowed():
            steps.append("cleaned up")
    assert steps == ["to the end", "cleaned up"]


def test_an_analysis_ends_by_a_signal_that_python_dropped(problem, dropped):
    model, loader = problem()
    seen = []

    def loss(prediction, target):
        seen.append(len(prediction))
        if len(seen) == 2 * len(model.tasks):
            interrupt_where_it_is_dropped()
        return F.mse_loss(prediction, target)

    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        dtme.analyze(model, loader, dict.fromkeys(model.tasks, loss), progress=False)
    assert dropped and len(seen) == 2 * len(model.tasks)
    same(before, snapshot(model))


def test_other_handlers_and_threads_are_left_alone():
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("term"))
    try:
        with Deferred() as signals:
            signal.raise_signal(signal.SIGTERM)
            assert not heard
            with signals.allowed():
                assert heard == ["term"]
                signal.raise_signal(signal.SIGTERM)
                assert heard == ["term"] * 2
            signal.signal(signal.SIGINT, kept := lambda *_: None)
        assert signal.getsignal(signal.SIGINT) is kept
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    handler = []
    thread = threading.Thread(target=lambda: Deferred().__enter__() and handler.append(signal.getsignal(signal.SIGINT)))
    thread.start()
    thread.join()
    assert handler == [signal.default_int_handler]


def test_one_that_is_over_hands_signals_on():
    """A handler that was set meanwhile, by torch's workers say, goes on to the one it found."""
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("user"))
    try:
        with Deferred():
            found = signal.getsignal(signal.SIGTERM)
            signal.signal(signal.SIGTERM, lambda *args: (heard.append("new"), found(*args)))
        signal.raise_signal(signal.SIGTERM)
        assert heard == ["new", "user"]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_all_handlers_are_given_back_though_one_of_them_raises(monkeypatch):
    """The one of SIGTERM, given back first, is called before that of SIGINT is given back."""

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    before = signal.signal(signal.SIGTERM, stop)
    set_handler = signal.signal

    def raising(number, handler):
        set_handler(number, handler)
        if handler is stop:
            signal.raise_signal(signal.SIGTERM)

    try:
        with pytest.raises(Stop), Deferred():
            monkeypatch.setattr("dtme.interrupts.signal.signal", raising)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        monkeypatch.undo()
        signal.signal(signal.SIGTERM, before)


def test_a_signal_waits_until_a_model_has_its_new_plan(build, interrupt, monkeypatch):
    model, _ = build("own, generic seam")
    first, second = (dtme.ExpansionPlan(TASKS, 2, {}, {block: TASKS}) for block in ("layers.0", "layers.2"))
    dtme.expand(model, first)
    optimizer = torch.optim.Adam(model.parameter_groups())
    module = importlib.import_module("dtme.replan")  # whose name in dtme is the function's
    attach = module.attach

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        attach(*arguments)

    monkeypatch.setattr(module, "attach", interrupted)
    interrupt(5, lambda: dtme.replan(model, second, optimizer))
    added = {name: p for name, p in model.named_parameters() if ".dtme." in name}
    assert set(added) == {f"backbone.layers.2.dtme.tokens.{task}" for task in TASKS}
    assert {id(p) for p in added.values()} == {id(p) for p in optimizer.param_groups[1]["params"]}


def test_an_analysis_leaves_the_model_whenever_it_is_interrupted(problem, interrupt):
    model, loader = problem()
    losses = dict.fromkeys(model.tasks, F.mse_loss)

    def work():
        dtme.analyze(model, loader, losses, train_mode=True, progress=False)

    start = time.perf_counter()
    work()
    duration = time.perf_counter() - start
    before, dice = snapshot(model), random.Random(0)
    for _ in range(60):
        interrupt(dice.uniform(1e-4, 1.1 * duration), work)
        same(before, snapshot(model))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
