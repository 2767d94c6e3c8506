"""Where a forward of an expanded backbone begins and ends: at its ``forward``, and at methods that stand in for it."""

import inspect
import re
import warnings
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from . import nested_tensors
from .choices import chosen, chosen_by_row, chosen_for_part
from .expanded import Expansion
from .forwards import Opening, run_folded
from .mixed_rows import RowWays, call_mixed_rows
from .output import remember_tasks
from .sharded import entrance
from .sharing import Call, Ways, caller_level
from .streams import running, survey
from .torch_private import calls_compiler, eagerly, is_outside_fsdp, recomputing, stay_eager

_STANDS_IN = re.compile(r"(?!forward_head)forward\w*|(encode|extract)_\w+|get_(intermediate|image|text|audio|video)\w*")


class Root:
    """What ``expand`` hangs on the module it was given, as ``root._dtme``: the places where a forward may begin.

    Args:
        module: the backbone.
        blocks: names of the blocks that have modules of tasks. What holds some of them may be called by itself.
    """

    def __init__(self, module: nn.Module, expansion: Expansion, blocks: Iterable[str]) -> None:
        self.module, self.expansion = (module,), expansion
        names = [name for name in dir(type(module)) if _STANDS_IN.fullmatch(name)]
        self.entries = [Entry(module, name, expansion) for name in names if _is_method(module, name)]
        paths = [block.split(".") for block in blocks]
        holders = dict.fromkeys(".".join(path[:i]) for path in paths for i in range(1, len(path)))
        self.entries += [
            Entry(part, "forward", expansion, name)
            for name in holders
            if _is_method(part := module.get_submodule(name), "forward")
        ]
        self.nested: list[tuple[nn.Module, str, bool]] = []

    def attach(self) -> None:
        for entry in self.entries:
            setattr(entry.module, entry.name, entry)
        self.nested = nested_tensors.switch_off(self.module[0])
        self.handle = self.module[0].register_forward_pre_hook(self.refuse_replicas)
        self.module[0]._dtme = self  # type: ignore[assignment]

    def refuse_replicas(self, module: nn.Module, args: Any = ()) -> None:
        """A shallow copy, as DataParallel makes them, would run the weights that it was copied from."""
        if module is not self.module[0]:
            raise RuntimeError(
                f"this {type(module).__name__} is a shallow copy of one that was expanded (a replica of DataParallel, "
                "say), whose methods are still the original's: use DistributedDataParallel, or copy.deepcopy"
            )

    def check(self) -> None:
        """RuntimeError where somebody has put something else over an entry."""
        for entry in self.entries:
            if vars(entry.module).get(entry.name) is not entry:
                raise RuntimeError(
                    f"{type(entry.module).__name__}.{entry.name} was replaced after it was expanded: undo that first, "
                    "or go on with the expanded model"
                )

    def detach(self) -> None:
        for entry in self.entries:
            if entry.replaced is None:
                delattr(entry.module, entry.name)
            else:
                setattr(entry.module, entry.name, entry.replaced)
        nested_tensors.switch_back(self.nested)
        self.handle.remove()
        del self.module[0]._dtme


def _is_method(module: nn.Module, name: str) -> bool:
    """Of the module's own class, and no name that every module has."""
    method = getattr(type(module), name)
    return inspect.isfunction(inspect.getattr_static(type(module), name)) and method is not getattr(
        nn.Module, name, None
    )


class Entry:
    """Stands in for one method of an expanded backbone; opens a forward around it, if none is open yet.

    Args:
        part: the name of ``module``, where it is a part of the backbone.
    """

    def __init__(self, module: nn.Module, name: str, expansion: Expansion, part: str | None = None) -> None:
        self.module, self.name, self.expansion, self.part = module, name, expansion, part
        self.replaced = vars(module).get(name)  # somebody's own, as accelerate's hooks
        self.ways, self.row_ways = Ways(module, (expansion,), name), RowWays(module, (expansion,), name)
        function = self.replaced or getattr(module, name)
        self.__signature__ = inspect.signature(function)
        self.__doc__, self.__name__ = getattr(function, "__doc__", None), name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            if running(self.expansion) is None:
                torch._dynamo.graph_break()  # which tasks this thread chose is not known to the compiler
            return self._function()(*args, **kwargs)
        if self.name != "forward" and eagerly(is_outside_fsdp, self.module):
            return eagerly(entrance, self.module, self.name)(*args, **kwargs)
        call = Call(self._function(), args, kwargs)
        rows = eagerly(chosen_by_row, self.expansion)
        if rows is not None and len(set(rows)) > 1 and eagerly(running, self.expansion) is None and not recomputing():
            output = eagerly(call_mixed_rows, self.row_ways, rows, call)
            eagerly(remember_tasks, output, rows)
            return output
        opening = eagerly(self._open, call, calls_compiler())
        if opening is None:
            return self._function()(*args, **kwargs)
        opening.forward.num_named = None if rows is None else len(rows)
        output = opening.carry_out(run_folded)
        eagerly(remember_tasks, output, opening.asked)
        return output

    stay_eager(__call__)

    @stay_eager
    def _function(self) -> Any:
        return self.replaced or partial(getattr(type(self.module), self.name), self.module)

    def _open(self, call: Call, is_compiled: bool) -> Opening | None:
        if running(self.expansion) is not None or recomputing():
            return None
        if self.part is None:
            tasks, choice = chosen(self.expansion)
            if choice is None and len(tasks) > 1:
                self._say_what_comes_back(tasks)
        else:
            tasks = chosen_for_part(self.expansion, self.part)
        return Opening(self.ways, tasks, call, survey(self.module), is_compiled=is_compiled)

    def _say_what_comes_back(self, tasks: tuple[str, ...]) -> None:
        """Once: whoever calls the backbone as before gets more rows than before, and nothing else would tell."""
        if self.expansion.has_warned_of_rows:
            return
        self.expansion.has_warned_of_rows = True
        kind = type(self.module).__name__
        message = (
            f"{kind} is expanded, and returns {len(tasks)} * B rows for B that go in, those of {list(tasks)} one task "
            "after the other. Choose tasks by `with dtme.tasks(backbone, [...])` and take the rows apart by "
            "`dtme.split(output, tasks)`, or use a dtme.MultiTaskModel"
        )
        warnings.warn(message, stacklevel=caller_level())
