"""Ctrl-C and other signals, put off while a model is half changed."""

import functools
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Deferred:
    """Inside of it, signals that Python code handles wait: Ctrl-C and, where somebody handles it, SIGTERM.

    They are handled when it is left, or inside ``allowed()``, where they come through as ever. From the first one that
    raised there, later ones wait again, so that what cleans up is not interrupted. Python drops what is raised in a
    destructor or in the callback of a weak reference; a signal whose error did not get out of ``allowed()`` is handled
    again at its end. Signals reach the main thread only: in other threads, nothing happens here.

    >>> with Deferred() as signals:
    ...     change_the_model()
    ...     try:
    ...         with signals.allowed():
    ...             work_for_minutes()
    ...     finally:
    ...         put_it_back()
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Any] = {}
        self._waiting: list[tuple[int, Any]] = []
        self._raised: tuple[int, Any] | None = None
        self._open = False
        self._is_over = False
        self._outer: Deferred | None = None
        self._outer_was_open = False

    def __enter__(self) -> "Deferred":
        if threading.current_thread() is not threading.main_thread():
            return self
        outer = getattr(signal.getsignal(signal.SIGINT), "__self__", None)
        if isinstance(outer, Deferred):
            self._outer, self._outer_was_open, outer._open = outer, outer._open, False
            return self
        try:
            for number in signal.valid_signals():  # SIGINT is among the first
                if callable(handler := signal.getsignal(number)) and not isinstance(handler, signal.Handlers):
                    self._handlers[number] = handler
                    signal.signal(number, self._handle)
        except BaseException:
            self._restore()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        if self._outer is not None:
            self._outer._open = self._outer_was_open
            if self._outer_was_open:
                self._outer._deliver()
            return
        self._restore()
        self._is_over = True
        self._deliver()

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """Signals come through here, unless this is part of a larger ``Deferred``."""
        if self._outer is not None:
            yield
            return
        was_open, self._open = self._open, True
        try:
            self._deliver()
            yield
            if self._raised is not None:
                self._waiting.insert(0, self._raised)
                self._deliver()
        except BaseException:
            self._raised = None
            raise
        finally:
            self._open = was_open

    def _handle(self, number: int, frame: Any) -> None:
        if self._is_over:  # somebody set a handler meanwhile that goes on to this one
            self._handlers[number](number, frame)
            return
        self._waiting.append((number, frame))
        if self._open:
            self._deliver()

    def _deliver(self) -> None:
        was_open = self._open
        while self._waiting:
            number, frame = self._waiting.pop(0)
            self._open, self._raised = False, (number, frame)  # until it is known that it did not raise
            self._handlers[number](number, frame)
            self._raised = None
        self._open = was_open

    def _restore(self) -> None:
        numbers = list(self._handlers)
        try:
            while numbers:
                if signal.getsignal(numbers[-1]) == self._handle:  # else somebody has set another one meanwhile
                    signal.signal(numbers[-1], self._handlers[numbers[-1]])
                numbers.pop()
        finally:
            if numbers:  # one that was given back raised already
                self._restore()


def all_or_nothing(function: Callable[P, T]) -> Callable[P, T]:
    """A function in which signals wait until it is done, or has put back what it changed."""

    @functools.wraps(function)
    def whole(*args: P.args, **kwargs: P.kwargs) -> T:
        with Deferred():
            return function(*args, **kwargs)

    return whole
