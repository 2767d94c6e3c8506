"""One model and one plan: expanded, compared with itself task by task and with the oracle, collapsed."""

import copy
import math
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dtme
from dtme.blocks import find_blocks

from .oracle import (
    KeysValues,
    NoOracle,
    channels_first,
    concatenated,
    joined,
    keys_values,
    let_torch_attend,
    modulated,
    tokens_of,
)
from .subject import TASKS, NotBuilt, Subject

PLANS = ("modulation", "task tokens")
NUM_TOKENS = 2
TOLERANCES = {"float64": (1e-8, 1e-6), "float32 inside": (1e-4, 1e-2), "float32": (1e-4, 1e-2)}
"""For outputs and gradients; some models round to float32 whatever the dtype of their weights."""
Row = dict[str, Any]
Predictions = dict[str, list[Tensor]]


class Wrong(Exception):
    """A check that failed, with what it found."""


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest difference relative to the largest value of ``b``, tensor by tensor; inf where they do not match."""
    if len(a) != len(b) or any(x.shape != y.shape for x, y in zip(a, b, strict=False)):
        return math.inf
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if not x.numel() or not x.is_floating_point():
            continue
        if not torch.equal(x.isfinite(), y.isfinite()):
            return math.inf
        x, y = x[x.isfinite()], y[y.isfinite()]  # a hidden row of a mask may be NaN
        if x.numel():
            worst = max(worst, float((x - y).abs().max() / y.abs().max().clamp_min(1e-12)))
    return worst


def check(subject: Subject, kind: str) -> Row:
    """Every check of one plan; the row says how it ended, with the largest error found."""
    row: Row = {"model": subject.name, "plan": kind, "dtype": str(subject.dtype).split(".")[1]}
    row["class"] = type(subject.backbone).__name__
    blocks: dict[str, int] = {}
    try:
        found = find_blocks(subject.backbone)
        row["found"] = len(found)
        noise, blocks, arithmetic = _plain(subject, found)
        row |= {"noise": noise, "blocks": len(blocks), "arithmetic": arithmetic}
        _Check(subject, kind, blocks, row).run()
        row.setdefault("outcome", "right")
    except NotBuilt:
        raise
    except Wrong as error:
        row |= {"outcome": "wrong", "reason": str(error)}
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        row |= {"outcome": "refused" if is_refusal(error, list(blocks)) else "crash", "reason": reason[:400]}
        if row["outcome"] == "crash":
            last = traceback.extract_tb(error.__traceback__)[-1]
            row["where"] = f"{last.filename.split('/')[-1]}:{last.lineno} {last.name}"
    return row


def is_refusal(error: Exception, blocks: list[str]) -> bool:
    """An error that tells the user what is not supported, rather than one from somewhere inside."""
    text = str(error)
    said = "no transformer blocks were recognised" in text or "made for another model" in text
    named = any(f"'{name}'" in text for name in blocks) or text.startswith(("block ", "blocks "))
    return isinstance(error, (ValueError, RuntimeError)) and (said or named)


def _plain(subject: Subject, found: dict[str, nn.Module]) -> tuple[float, dict[str, int], str]:
    """How far a row's output depends on its batch, the width of each block that runs, in their order, and TOLERANCES'
    name of the arithmetic."""
    widths: dict[str, int] = {}
    handles = []
    for name, block in found.items():

        def seen(block, args, kwargs, name=name):
            if (tokens := tokens_of(args, kwargs)) is not None:
                x = tokens[1]
                widths.setdefault(name, x.shape[1] if channels_first(block, x) else x.shape[-1])

        handles.append(block.register_forward_pre_hook(seen, with_kwargs=True))
    with torch.no_grad():
        x = subject.inputs(3)
        with _Rounding() as rounding:
            subject.call(subject.backbone, x)
        for handle in handles:
            handle.remove()
        full = subject.call(subject.backbone, x)
        if not any(tensor.isfinite().any() for tensor in full):
            raise NotBuilt("what the plain model returns is not finite")
        if difference(full, subject.call(subject.backbone, x)) > 0:
            raise Wrong("the plain model does not repeat itself")
        try:
            alone = subject.call(subject.backbone, _rows(x, 2, 3))
        except Exception:  # a group norm of one value, for instance
            alone = [tensor[2:3] for tensor in full]
    if not widths:
        raise ValueError("no transformer blocks were recognised: those found do not run, or take no tokens")
    noise = difference([tensor[2:3] if len(tensor) == 3 else tensor for tensor in full], alone)
    arithmetic = "float32" if subject.dtype == torch.float32 else "float32 inside" if rounding.seen else "float64"
    return noise, widths, arithmetic


class _Rounding(TorchDispatchMode):
    """Whether an operation under it returns float32."""

    seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.seen |= isinstance(output, Tensor) and output.dtype in (torch.float32, torch.bfloat16, torch.float16)
        return output


def _rows(x: Any, start: int, end: int) -> Any:
    return {name: value[start:end] for name, value in x.items()} if isinstance(x, dict) else x[start:end]


def make_plan(kind: str, widths: dict[str, int]) -> dtme.ExpansionPlan:
    """Two tasks at the first block, all three at the middle one."""
    names = list(widths)
    where = {names[0]: TASKS[:2], names[len(names) // 2]: TASKS}
    modulation, expansion = (where, {}) if kind == "modulation" else ({}, where)
    return dtme.ExpansionPlan(TASKS, NUM_TOKENS, modulation, expansion, widths)


class _Check:
    def __init__(self, subject: Subject, kind: str, widths: dict[str, int], row: Row) -> None:
        self.subject, self.kind, self.row = subject, kind, row
        self.backbone, self.plan = subject.backbone, make_plan(kind, widths)
        self.naive = copy.deepcopy(subject.backbone)
        self.tolerance, self.gradient_tolerance = TOLERANCES[row["arithmetic"]]
        row["notes"] = ["rows depend on their batch"] if row["noise"] > 1e-3 else []

    def run(self) -> None:
        x, keys = self.subject.inputs(3), list(self.backbone.state_dict())
        trained = [p.requires_grad for p in self.backbone.parameters()]
        with torch.no_grad():
            before = self.subject.call(self.backbone, x)
        try:
            reached = self.gradients(lambda: self.subject.call(self.backbone, x), self.backbone)
        except Exception as error:
            raise NotBuilt(f"the plain model has no gradients in evaluation mode: {error}") from error
        model = dtme.MultiTaskModel(self.backbone, {task: nn.Identity() for task in TASKS}, self.subject.call)
        dtme.expand(model, self.plan)
        try:
            self.expanded(model, reached)
        finally:
            for parameter in model.parameters():
                parameter.grad = None
            dtme.collapse(model)
        self.collapsed(before, keys, trained)

    def expanded(self, model: dtme.MultiTaskModel, reached: dict[str, Tensor]) -> None:
        added = {name: p for name, p in self.backbone.named_parameters() if ".dtme." in name}
        if not added:
            raise Wrong("expand added no parameters")
        generator = torch.Generator().manual_seed(1)
        for parameter in added.values():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.add_(0.3 * noise.to(parameter))
        values = {name: parameter.detach() for name, parameter in added.items()}
        naive = self.oracle(values)
        for rows in self.subject.sizes:
            self.outputs(model, rows, naive)
        self.row["sharing"] = dtme.sharing_of(model)
        blocks = {name for name in self.plan.num_features if any(other.startswith(f"{name}.") for other in reached)}
        self.trained(model, reached, [name for name in added if name.partition(".dtme.")[0] in blocks])

    # --- outputs --------------------------------------------------------------------------------------------------

    def outputs(self, model: dtme.MultiTaskModel, rows: int, naive: Callable[[str, Any], list[Tensor]] | None) -> None:
        x = self.subject.inputs(rows)
        with torch.no_grad():
            try:
                plain = self.subject.call(self.naive, x)
            except Exception:  # a group norm of one value, for instance
                self.remark(f"the plain model does not take {rows} rows")
                return
            together = model(x)
            for task in TASKS:
                alone = model(x, tasks=task)[task]
                self.note("error", difference(together[task], alone), f"{rows} rows: {task} together and alone differ")
                if naive is None:
                    continue
                expected = naive(task, x)
                self.note("oracle_error", difference(alone, expected), f"{rows} rows: {task} and the oracle differ")
                if difference(expected, plain) < 1e-9:
                    self.remark(f"{task} is the plain model's output")

    def note(self, name: str, error: float, text: str) -> None:
        self.row[name] = max(self.row.get(name, 0.0), error)
        if not error <= self.tolerance:
            raise Wrong(f"{text} by {error:.2g}")

    def remark(self, text: str) -> None:
        if text not in self.row["notes"]:
            self.row["notes"].append(text)

    # --- the oracle -----------------------------------------------------------------------------------------------

    def oracle(self, added: dict[str, Tensor]) -> Callable[[str, Any], list[Tensor]] | None:
        if self.kind == "modulation":
            self.row["oracle"] = "hook"
            return lambda task, x: self.naively(modulated(self.naive, added, task), x)
        try:
            with _slow_path(), torch.no_grad():
                extra = self.projected(added)
                self.row["oracle"] = "keys and values" + self.against_concatenation(added, extra)
        except NoOracle as error:
            self.row["oracle"] = f"no oracle: {error}"
            return None
        except Exception as error:
            self.row["oracle"] = f"no oracle: {type(error).__name__}: {error}"[:200]
            return None
        return lambda task, x: self.naively(joined(self.naive, extra[task]), x)

    def projected(self, added: dict[str, Tensor]) -> dict[str, dict[str, KeysValues]]:
        """{task: {block: its keys and values there}}"""
        inputs = [self.subject.inputs(rows) for rows in self.subject.sizes]  # with and without anything hidden
        before = [self.subject.call(self.naive, x) for x in inputs]
        undo = let_torch_attend(self.naive)
        try:
            after = [self.subject.call(self.naive, x) for x in inputs]
            same = all(difference(a, b) <= self.tolerance for a, b in zip(after, before, strict=True))
        except Exception:
            same = False
        if not same:
            undo()
        return {
            task: {
                block: keys_values(self.subject, self.naive, block, added[f"{block}.dtme.tokens.{task}"])
                for block, tasks in self.plan.expansion.items()
                if task in tasks
            }
            for task in TASKS
        }

    def against_concatenation(self, added: dict[str, Tensor], extra: dict[str, dict[str, KeysValues]]) -> str:
        """Where the model also takes concatenated tokens, both must agree: ", concatenation"."""
        x, task = self.subject.inputs(1), TASKS[0]
        try:
            long = self.naively(concatenated(self.naive, added, task), x)
        except Exception:
            return ""
        same = difference(long, self.naively(joined(self.naive, extra[task]), x)) <= self.tolerance
        return ", concatenation" if same else ""

    def naively(self, hooks: Any, x: Any) -> list[Tensor]:
        with hooks, _slow_path(), torch.no_grad():
            return self.subject.call(self.naive, x)

    # --- gradients ------------------------------------------------------------------------------------------------

    def gradients(self, run: Callable[[], list[Tensor]], module: nn.Module) -> dict[str, Tensor]:
        """{parameter: gradient} of a fixed linear function of what ``run`` returns."""
        for parameter in module.parameters():
            parameter.grad = None
        generator = torch.Generator().manual_seed(2)
        total: Tensor | float = 0.0
        for tensor in run():
            if tensor.requires_grad:
                weight = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
                total = total + (torch.where(tensor.isfinite(), tensor, 0) * weight).sum()
        if isinstance(total, Tensor):
            total.backward()
        return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}

    def trained(self, model: dtme.MultiTaskModel, reached: dict[str, Tensor], added: list[str]) -> None:
        x = self.subject.inputs(3)
        separate = [self.gradients(lambda task=task: model(x, tasks=task)[task], self.backbone) for task in TASKS]
        total: dict[str, Tensor] = {}
        for gradients in separate:
            for name, gradient in gradients.items():
                total[name] = total[name] + gradient if name in total else gradient
        for parameter in model.parameters():
            parameter.grad = None
        together = self.together(model, x)
        for name in [*reached, *added]:
            if name not in together:
                raise Wrong(f"{name} has no gradient")
            beside = [g for other, g in reached.items() if other.startswith(f"{name.partition('.dtme.')[0]}.")]
            plain = beside if name in added else [reached[name]]
            if not together[name].isfinite().all() and all(gradient.isfinite().all() for gradient in plain):
                raise Wrong(f"the gradient of {name} is not finite")
        scale = max((float(g.abs().nan_to_num().max()) for g in total.values() if g.numel()), default=1.0)
        for name, gradient in together.items():
            if not gradient.numel() or not gradient.isfinite().all():
                continue
            size = max(float(gradient.abs().max()), 1e-6 * scale, 1e-12)
            error = float((gradient - total.get(name, torch.zeros_like(gradient))).abs().max()) / size
            self.row["gradient_error"] = max(self.row.get("gradient_error", 0.0), error)
            if not error <= self.gradient_tolerance:
                raise Wrong(f"the gradient of {name} is not the sum of its tasks' by {error:.2g}")

    def together(self, model: dtme.MultiTaskModel, x: Any) -> dict[str, Tensor]:
        """Gradients of all tasks in one pass, each with the weights that it has alone."""
        for parameter in model.parameters():
            parameter.grad = None
        predictions = model(x)
        total: Tensor | float = 0.0
        for task in TASKS:
            generator = torch.Generator().manual_seed(2)
            for tensor in predictions[task]:
                if tensor.requires_grad:
                    weight = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
                    total = total + (torch.where(tensor.isfinite(), tensor, 0) * weight).sum()
        if isinstance(total, Tensor):
            total.backward()
        return {name: p.grad.clone() for name, p in self.backbone.named_parameters() if p.grad is not None}

    # --- collapse -------------------------------------------------------------------------------------------------

    def collapsed(self, before: list[Tensor], keys: list[str], trained: list[bool]) -> None:
        with torch.no_grad():
            after = self.subject.call(self.backbone, self.subject.inputs(3))
        same = [torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, after, strict=True)]
        if not all(same):
            raise Wrong("collapse does not give the outputs back bit for bit")
        if list(self.backbone.state_dict()) != keys:
            raise Wrong("collapse does not give the names of the state back")
        if [p.requires_grad for p in self.backbone.parameters()] != trained:
            raise Wrong("collapse does not give requires_grad back")


class _slow_path(nullcontext):
    """torch's encoder layers call scaled_dot_product_attention, which their fused fast path does not."""

    def __enter__(self) -> None:
        self.was = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)

    def __exit__(self, *error: object) -> None:
        torch.backends.mha.set_fastpath_enabled(self.was)
