"""What the operators of attention cost, for ``torch.utils.flop_counter.FlopCounterMode``.

As torch counts its own: two operations per multiplication of a matrix product, the scores once more in the backward
pass, masks and causality left out of account. Modulation and norms hold no matrix product and count as nothing, like
torch's.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from math import prod
from types import ModuleType
from typing import Any

import torch

MODULE = "torch.utils.flop_counter"


class _AfterImport(MetaPathFinder):
    """Registers the formulas as soon as ``torch.utils.flop_counter`` is imported by whoever wants to count.

    To import it here would import Triton, a quarter of a second for everybody; to wait for the first operator would be
    too late, for a counter copies the formulas when it is made.
    """

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != MODULE:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register(module)
                sys.meta_path.remove(self)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register_formulas() -> None:
    """Now, if the counter is imported already, or when it is."""
    if MODULE in sys.modules:
        _register(sys.modules[MODULE])
    else:
        sys.meta_path.insert(0, _AfterImport())


def _register(counter: ModuleType) -> None:
    for name, formula in FORMULAS.items():
        counter.register_flop_formula(getattr(torch.ops.dtme, name))(formula)


def _product(query: Any, key: Any, task_key: Any) -> int:
    """One of the matrix products between (..., H, N, d) queries and the keys of an image and of its task."""
    return 2 * prod(query) * (key[-2] + task_key[-2])


def _attention(query: Any, key: Any, value: Any, task_key: Any, *args: Any, **options: Any) -> int:
    return 2 * _product(query, key, task_key)


def _attention_backward(grad: Any, output: Any, statistics: Any, *args: Any, **options: Any) -> int:
    return _attention(*args) // 2 * 5


def _packed_product(qkv: Any, task_kv: Any) -> int:
    """The same of (T, B, N, 3, H, d) and (T, t, 2, H, d)."""
    return 2 * prod(qkv) // 3 * (qkv[2] + task_kv[1])


def _packed_attention(qkv: Any, task_kv: Any, *args: Any, **options: Any) -> int:
    return 2 * _packed_product(qkv, task_kv)


def _packed_attention_backward(grad: Any, output: Any, statistics: Any, *args: Any, **options: Any) -> int:
    return _packed_attention(*args) // 2 * 5


FORMULAS = {
    "expanded_attention_forward": _attention,
    "expanded_attention_backward": _attention_backward,
    "packed_attention": _packed_attention,
    "packed_attention_backward": _packed_attention_backward,
}
