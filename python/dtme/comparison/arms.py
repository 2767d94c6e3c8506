"""The arms of a comparison by name: how each makes its model of the jointly trained one."""

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import nn

from ..expansion import expand
from ..grouping import group_of_all
from ..model import MultiTaskModel
from ..plan import ExpansionPlan
from ..report import ConflictReport
from ..rivals import BitFit, LoRA, NormAffine, Prompts, Rival
from .batches import seed_of

if TYPE_CHECKING:
    from .options import Options

JOINT, LONGER, CONFLICT = "joint", "longer", "conflict"
BY_RATES = (CONFLICT, "gain", "pairs", "reverse")
BY_PLACE = ("first", "last")
"""Strategies of ``ConflictReport.plan``, as are random ones."""
BY_ANALYSIS = (*BY_RATES, "shared")
"""Arms that could not be without an analysis; the others only take a number of blocks or of parameters from it."""
ADAPTERS: dict[str, type[Rival]] = {"lora": LoRA, "bitfit": BitFit, "norm-affine": NormAffine, "prompts": Prompts}
ARMS = (JOINT, LONGER, *BY_RATES, "random", *BY_PLACE, "all", "shared", *ADAPTERS)


@dataclass(frozen=True)
class Built:
    """The model of an arm."""

    model: nn.Module
    plan: ExpansionPlan | None
    """Of what was expanded."""
    compute: float | None
    """Passes through the blocks in a step, over those of the plain model; None where that is not known."""
    note: str | None = None


@dataclass(frozen=True)
class Setting:
    """What arms are made of at the end of the joint part: one analysis, which all arms of the seed share."""

    report: ConflictReport
    options: "Options"
    seed: int

    @cached_property
    def reference(self) -> ExpansionPlan:
        """The conflict plan: what the others match."""
        return self._by_report(CONFLICT)

    def plan(self, arm: str) -> ExpansionPlan | None:
        """The plan of a built-in arm; None where it has none."""
        if arm == CONFLICT:
            return self.reference
        if arm in BY_RATES + BY_PLACE:
            return self._by_report(arm)
        if is_random(arm):
            return self._by_report("random", seed=seed_of(self.seed, "random-1" if arm == "random" else arm))
        if arm == "shared":
            return self._by_report(CONFLICT, groups=group_of_all(self.report.tasks))
        if arm == "all":
            shares = {name: float(getattr(self.options, name) > 0) for name in ("modulation", "expansion")}
            return self._by_report(CONFLICT, **shares)
        return None

    def steps(self, arm: str) -> int:
        """Of its whole training: the budget, but of longer joint training as many as the conflict plan's compute."""
        budget, start = self.options.budget, self.options.start
        return budget if arm != LONGER else start + round((budget - start) * self.reference.compute())

    def _by_report(self, strategy: str, **more: Any) -> ExpansionPlan:
        given = {"modulation": self.options.modulation, "expansion": self.options.expansion}
        return self.report.plan(strategy=strategy, num_tokens=self.options.num_tokens, **{**given, **more})


def build(arm: str, own: Any, model: MultiTaskModel, setting: Setting | None) -> Built:
    """Make the model of an arm, in place where that can be.

    Args:
        arm: its name.
        own: the plan or the function of a user's arm; None for a built-in one.
        model: jointly trained.
        setting: None where all that is asked for is joint training.

    Raises:
        ValueError: the arm cannot be built for this model; the message says which and why.
    """
    if arm in (JOINT, LONGER):
        return Built(model, None, 1.0)
    assert setting is not None
    try:
        if own is not None:
            return _build_own(arm, own, model, setting)
        if arm in ADAPTERS:
            return _build_adapter(arm, model, setting)
        plan = setting.plan(arm)
        assert plan is not None
        return Built(expand(model, plan), plan, plan.compute())
    except ValueError as error:
        raise ValueError(f"arm {arm!r} cannot be built: {error}") from error


def _build_adapter(arm: str, model: MultiTaskModel, setting: Setting) -> Built:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what it says is noted, and printed with the results
        built, facts = ADAPTERS[arm]().fit(model, setting.reference.added_parameters(), setting.seed)
    plan = ExpansionPlan(**facts["plan"]) if "plan" in facts else None
    # without a plan, the backbone runs once for each task
    return Built(built, plan, float(len(model.tasks)) if plan is None else plan.compute(), facts["unmatched"])


def _build_own(arm: str, own: Any, model: MultiTaskModel, setting: Setting) -> Built:
    made = own if isinstance(own, ExpansionPlan) else own(model, setting.report, setting.seed)
    if isinstance(made, ExpansionPlan):
        if not made.num_features:
            made = replace(made, num_features=setting.reference.num_features)
        return Built(expand(model, made), made, made.compute())
    if not isinstance(made, nn.Module):
        raise ValueError(f"its function must return an ExpansionPlan or a model, got {type(made).__name__}")
    return Built(made, None, None)


def is_random(arm: str) -> bool:
    return re.fullmatch(r"random(-[1-9]\d?)?", arm) is not None


OwnArm = ExpansionPlan | Callable[[MultiTaskModel, ConflictReport, int], Any]
