"""The tests that every implementation has to pass: those that take the fixture ``impl``."""

from collections.abc import Callable
from inspect import signature
from types import ModuleType

from tests.kernels import (
    test_attention,
    test_conflicts,
    test_covariance,
    test_modulate_concat_attention,
    test_modulation,
)

MODULES = (test_covariance, test_conflicts, test_modulation, test_attention, test_modulate_concat_attention)


def collect(modules: tuple[ModuleType, ...] = MODULES) -> dict[str, Callable[..., None]]:
    """By name, for the namespace of a test file that has an ``impl`` of its own."""
    return {
        f"{name}_of_{module.__name__.rpartition('test_')[2]}": test
        for module in modules
        for name, test in vars(module).items()
        if name.startswith("test_") and "impl" in signature(test).parameters
    }
