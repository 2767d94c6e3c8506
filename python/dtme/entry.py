"""Where a forward of an expanded backbone begins and ends: at its ``forward``, and at methods that stand in for it."""

import inspect
import re
from functools import partial
from typing import Any

import torch
from torch import nn

from . import nested_tensors
from .sharing import Call, Opening, UnknownArgument, Ways, run_folded
from .streams import Expansion, chosen, running, survey
from .torch_private import calls_compiler, eagerly, stay_eager

_STANDS_IN = re.compile(r"forward\w*|(encode|extract)_\w+|get_(intermediate|image|text|audio|video)\w*")


class Root:
    """What ``expand`` hangs on the module it was given; ``root._dtme``."""

    def __init__(self, module: nn.Module, expansion: Expansion) -> None:
        self.module, self.expansion = (module,), expansion
        self.entries: dict[str, Entry] = {}
        self.nested: list[tuple[nn.Module, str, bool]] = []

    def attach(self) -> None:
        module = self.module[0]
        for name in dir(type(module)):
            if not _STANDS_IN.fullmatch(name) or not inspect.isfunction(inspect.getattr_static(type(module), name)):
                continue
            if getattr(nn.Module, name, None) is getattr(type(module), name):
                continue
            self.entries[name] = Entry(module, name, self.expansion)
            setattr(module, name, self.entries[name])
        self.nested = nested_tensors.switch_off(module)
        module._dtme = self  # type: ignore[assignment]

    def detach(self) -> None:
        module = self.module[0]
        for name, entry in self.entries.items():
            if vars(module).get(name) is not entry:
                raise RuntimeError(
                    f"{type(module).__name__}.{name} was replaced after it was expanded: undo that first, or go on with "
                    "the expanded model"
                )
        for name, entry in self.entries.items():
            if entry.replaced is None:
                delattr(module, name)
            else:
                setattr(module, name, entry.replaced)
        nested_tensors.switch_back(self.nested)
        del module._dtme


class Entry:
    """Stands in for one method of an expanded backbone; opens a forward around it, if none is open yet."""

    def __init__(self, module: nn.Module, name: str, expansion: Expansion) -> None:
        self.module, self.name, self.expansion = module, name, expansion
        self.replaced = vars(module).get(name)  # somebody's own, as accelerate's hooks
        self.ways = Ways(module, (expansion,), name)
        function = self.replaced or getattr(type(module), name)
        self.__signature__ = inspect.signature(function if self.replaced else getattr(module, name))
        self.__doc__, self.__name__ = getattr(function, "__doc__", None), name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            if running(self.expansion) is None:
                torch._dynamo.graph_break()  # which tasks this thread chose is not known to the compiler
            return self._function()(*args, **kwargs)
        opening = eagerly(self._open, Call(self._function(), args, kwargs), calls_compiler())
        if opening is None:
            return self._function()(*args, **kwargs)
        try:
            return run_folded(opening.forward, opening.way, opening.tasks, opening.call)
        except UnknownArgument:
            eagerly(opening.compare_again)
            return run_folded(opening.forward, opening.way, opening.tasks, opening.call)
        finally:
            eagerly(opening.close)

    stay_eager(__call__)

    @stay_eager
    def _function(self) -> Any:
        return self.replaced or partial(getattr(type(self.module), self.name), self.module)

    def _open(self, call: Call, is_compiled: bool) -> Opening | None:
        if running(self.expansion) is not None:
            return None
        tasks, _ = chosen(self.expansion)
        parts = survey(self.module)[1]
        return Opening(
            self.ways, (self.expansion,), tasks, call, has_compiled_parts=parts, is_compiled=is_compiled
        )
