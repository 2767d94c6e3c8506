"""What all adapters of one ``expand`` share, and which tasks it tells apart."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from .pickles import Stamped
from .plan import ExpansionPlan

if TYPE_CHECKING:
    from .streams import Forward


class Expansion(Stamped):
    """One call of ``expand``: what all its adapters share. Nothing in it belongs to a forward.

    Args:
        tasks: all tasks of the model, those too that the plan does not know.
        frozen: parameters of the backbone that ``freeze_backbone`` found trained; None where it was not asked for.
    """

    def __init__(
        self,
        tasks: Iterable[str],
        plan: ExpansionPlan,
        modulator: str,
        shared_prefix: bool | str,
        frozen: list[str] | None,
    ) -> None:
        self.tasks = tuple(tasks)
        self.plan, self.modulator, self.shared_prefix, self.frozen = plan, modulator, shared_prefix, frozen
        # Where torch.compile, which cannot read a ContextVar, finds the forward that it traces: None again when the
        # compiled code has run. For compiled parts of an eager forward threads wait for each other (forwards.Opening).
        self.traced: Forward | None = None
        self.has_warned_of_rows = False  # to whoever chose no tasks: those of all come back
        self.has_warned_of_frozen = False  # to whoever trains without training what was added

    @property
    def plan(self) -> ExpansionPlan:
        return self._plan

    @plan.setter
    def plan(self, plan: ExpansionPlan) -> None:
        if taken := [group for group, some in plan.groups.items() if group in self.tasks and group not in some]:
            raise ValueError(f"the plan's group {taken[0]!r} has the name of another task of the model: choose another")
        self._plan = plan
        self.owner_of = {task: plan.owner(task) for task in self.tasks}
        """Of every task, whose modules it has where it has some."""
        self.owners = plan.owners(self.tasks)
        fields = (plan.num_tokens, dict(plan.modulation), dict(plan.expansion), dict(plan.groups))
        self.fingerprint = hashlib.sha256(repr(fields).encode()).hexdigest()
        """Of the modules that the plan adds: another if they are others."""
        self.changed = {x for blocks in (plan.modulation, plan.expansion) for tasks in blocks.values() for x in tasks}
        """Tasks that have modules in some block."""


def alike(tasks: Iterable[str], expansions: Sequence[Expansion]) -> dict[tuple[str, ...], tuple[str, ...]]:
    """``tasks`` in sets of those that no block tells apart, by the owner of their modules in every expansion, or ""."""
    found: dict[tuple[str, ...], tuple[str, ...]] = {}
    for task in tasks:
        key = tuple([one.owner_of[task] if task in one.changed else "" for one in expansions])
        found[key] = (*found.get(key, ()), task)
    return found
