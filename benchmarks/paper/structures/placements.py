"""Where modulations and task tokens go: the method of the paper, and its controls and ablations."""

import math
import random
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

import dtme
from dtme.grouping import group_of_all

from ..arms import Facts, Setting

BY_REPORT = ("conflict", "gain", "pairs", "reverse", "swap")
"""Strategies that look at gradients: those of ``dtme.ConflictReport.plan``."""
WITHOUT_REPORT = ("random", "first", "last")


@dataclass(frozen=True)
class Placement:
    """``dtme.expand`` by a plan that gives every task modules in a share of the blocks.

    Args:
        modulation: share of the blocks that get a modulation, 0 for none; None for that of the reference plan.
        expansion: likewise for task tokens.
        strategy: which blocks. By the rates of all tasks (``"conflict"``, ``"gain"``, ``"reverse"``, ``"swap"``), at
            random (``"random"``, modulations and tokens independently, by the setting's seed), or the first or last
            ones (``"first"``, ``"last"``). By the rates of pairs (``"pairs"``) as many modules are given, but not to
            all tasks of a block.
        num_tokens: task tokens per task and block; None for those of the reference plan.
        ratio: r, which splits range from null space, where rates are looked at.
        modulator: ``"affine"`` or ``"batch_norm"``.
        freeze_backbone: whether only what is added, and the heads, train on.
        shared: whether all tasks share one set of modules in the chosen blocks: as much change, and no task's own.
        draw: which of the random plans of a seed.
        max_groups: at most so many groups of tasks that hardly conflict share modules (``report.groups``); None for
            modules of every task's own.

    Raises:
        ValueError: an unknown strategy. (The rest is checked where the plan is made.)
    """

    modulation: float | None = None
    expansion: float | None = None
    strategy: str = "conflict"
    num_tokens: int | None = None
    ratio: float = 100.0
    modulator: str = "affine"
    freeze_backbone: bool = False
    shared: bool = False
    draw: int = 0
    max_groups: int | None = None

    def __post_init__(self) -> None:
        if self.strategy not in BY_REPORT + WITHOUT_REPORT:
            known = ", ".join(BY_REPORT + WITHOUT_REPORT)
            raise ValueError(f"strategy must be one of {known}, got {self.strategy!r}")

    def apply(self, setting: Setting) -> tuple[nn.Module, Facts]:
        plan, seen = self.plan(setting)
        model = dtme.expand(setting.model, plan, modulator=self.modulator, freeze_backbone=self.freeze_backbone)
        facts = {
            "added": plan.added_parameters(),
            "compute": plan.compute(),
            "plan": plan.as_dict(),
            "strategy": self.strategy,
            "modulator": self.modulator,
            "freeze_backbone": self.freeze_backbone,
        }
        return model, facts | seen

    def plan(self, setting: Setting) -> tuple[dtme.ExpansionPlan, Facts]:
        """The plan, and what of the gradients it was made from: nothing where the strategy needs none."""
        tasks = setting.model.tasks
        modulation, expansion = self._shares(setting)
        num_tokens = setting.num_tokens if self.num_tokens is None else self.num_tokens
        groups = group_of_all(tasks) if self.shared else {}
        if self.strategy in BY_REPORT:
            report = setting.report.at(self.ratio)
            if self.max_groups is not None:
                groups = report.groups(max_groups=self.max_groups)
            plan = report.plan(
                modulation=modulation,
                expansion=expansion,
                strategy=self.strategy,
                num_tokens=num_tokens,
                groups=groups,
            )
            return plan, {"report": rates_of(report)}
        modulated, expanded = (
            dict.fromkeys(self._blocks(setting, share, what), tasks)
            for what, share in (("modulation", modulation), ("expansion", expansion))
        )
        widths = dict.fromkeys(setting.blocks, setting.width)
        return dtme.ExpansionPlan(tasks, num_tokens, modulated, expanded, widths, groups), {}

    def _shares(self, setting: Setting) -> tuple[float, float]:
        modulation = setting.modulation if self.modulation is None else self.modulation
        expansion = setting.expansion if self.expansion is None else self.expansion
        for name, share in (("modulation", modulation), ("expansion", expansion)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must be a share of the blocks in [0, 1], got {share!r}")
        return modulation, expansion

    def _blocks(self, setting: Setting, share: float, what: str) -> list[str]:
        """As many blocks as a report's plan would choose; ``what`` tells apart what is drawn of one seed."""
        blocks = list(setting.blocks)
        count = max(1, round(share * len(blocks))) if share else 0
        if self.strategy == "random":
            draw = f" {self.draw}" if self.draw else ""
            taken = set(random.Random(f"{setting.seed}{draw} {what}").sample(blocks, count))
            return [block for block in blocks if block in taken]
        return blocks[:count] if self.strategy == "first" else blocks[len(blocks) - count :]


def rates_of(report: dtme.ConflictReport) -> Facts:
    """What a plan was made from, block by block; null where a number is not known."""
    return {
        "ratio": report.ratio,
        "blocks": list(report.blocks),
        "range": _numbers(report.range_rates),
        "null": _numbers(report.null_rates),
        "gains": _numbers(report.gains),
        "ranks": report.ranks.tolist(),
        "num_batches": report.num_batches,
    }


def _numbers(values: Tensor) -> list[Any]:
    return [value if math.isfinite(value) else None for value in values.tolist()]
