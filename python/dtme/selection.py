"""Which blocks a plan chooses, from the rates of the report or from those of each of its resamples."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .budgets import Budget, Item, best_within, check_budget
from .plan import NUM_TOKENS, ExpansionPlan
from .resampling import LEVEL, deviations, stretch

if TYPE_CHECKING:
    from .report import ConflictReport

# strategy: (what ranks modulation, what ranks expansion, highest first), Tables 2 and 13; gains are not in the paper
STRATEGIES = {
    "conflict": ("range", "null", True),
    "reverse": ("range", "null", False),
    "swap": ("null", "range", True),
    "random": ("range", "null", True),
    "gain": ("gain", "null", True),
    "pairs": ("range", "null", True),
    "first": ("range", "null", True),
    "last": ("range", "null", True),
}
WITHOUT_RATES = ("random", "first", "last")
"""Strategies that take blocks by their place, or by lot."""
BUDGETS = ("max_parameters", "max_compute")


@dataclass(frozen=True)
class Rules:
    """The arguments of ``ConflictReport.plan``, checked."""

    modulation: float
    expansion: float
    strategy: str
    num_tokens: int | str
    pair_threshold: float | None
    seed: int
    groups: Mapping[str, Sequence[str]] | bool | None
    max_parameters: float | None
    max_compute: float | None

    def __post_init__(self) -> None:
        if not isinstance(self.strategy, str) or self.strategy not in STRATEGIES:
            raise ValueError(f"strategy must be one of {list(STRATEGIES)}, got {self.strategy!r}")
        if isinstance(self.num_tokens, str):
            if self.num_tokens not in NUM_TOKENS:
                raise ValueError(f"num_tokens must be an integer or one of {list(NUM_TOKENS)}, got {self.num_tokens!r}")
            object.__setattr__(self, "num_tokens", NUM_TOKENS[self.num_tokens])
        if isinstance(self.seed, bool) or not isinstance(self.seed, Integral):
            raise ValueError(f"seed must be an integer, got {self.seed!r}")
        object.__setattr__(self, "seed", int(self.seed))  # random.Random takes no other kind of integer
        for name, wanted in (("pair_threshold", "rate"), *((n, "number of at least 0") for n in BUDGETS)):
            value, least = getattr(self, name), 0 if name in BUDGETS else -math.inf
            if value is not None and (isinstance(value, bool) or not isinstance(value, Real) or not value >= least):
                raise ValueError(f"{name} must be None or a {wanted}, got {value!r}")
        for name, share in (("modulation", self.modulation), ("expansion", self.expansion)):
            if isinstance(share, bool) or not isinstance(share, Real) or not 0 <= share <= 1:
                raise ValueError(f"{name} must be a share of the blocks in [0, 1], got {share!r}")

    @property
    def sources(self) -> tuple[str, str]:
        """What ranks blocks for modulation and for expansion: ``"range"``, ``"null"`` or ``"gain"``."""
        first, second, _ = STRATEGIES[self.strategy]
        # where nothing is to be chosen by gains, they need not be known
        return ("range" if first == "gain" and not self.modulation else first), second

    @property
    def limited(self) -> bool:
        return self.max_parameters is not None or self.max_compute is not None

    def quotas(self, num_blocks: int) -> tuple[int, int]:
        """How many of the blocks may get a modulation, and how many task tokens."""
        first, second = (
            max(1, round(share * num_blocks)) if share else 0 for share in (self.modulation, self.expansion)
        )
        return first, second


class Choice(NamedTuple):
    """Who gets what, of S blocks that a plan is about and G owners (groups, or tasks that are in none)."""

    modulation: Tensor
    """(R, S, G) bool, for each of R resamples; R = 1 for the report itself."""
    expansion: Tensor
    """(R, S, G) bool."""


class Candidates:
    """The blocks that ``report.plan`` chooses from by ``rules``, and what choosing each of them would add."""

    def __init__(self, report: "ConflictReport", rules: Rules) -> None:
        self.report, self.rules, self.shared = report, rules, report._shared()
        widths = report.num_features
        groups = report.groups() if rules.groups is True else {} if rules.groups is None else rules.groups
        self.nothing = ExpansionPlan(
            report.tasks,
            rules.num_tokens,  # type: ignore[arg-type]  # anything but a positive integer is refused there
            num_features={block: widths[block] for block in report.shared_blocks},
            groups=groups,  # type: ignore[arg-type]  # anything but a mapping is refused there
        )
        self.owners = self.nothing.owners(report.tasks)
        column = [self.owners.index(self.nothing.owner(task)) for task in report.tasks]
        self.belongs = torch.nn.functional.one_hot(torch.tensor(column), len(self.owners)).float()
        self.apart = rules.strategy == "pairs"
        """Whether the owners of a block are chosen one by one."""
        self.slots = len(self.owners) if self.apart else 1
        """Of a block; what is chosen is slots."""
        self.quotas = self._quotas()
        """How many slots may get a modulation, and how many task tokens."""
        if "gain" in rules.sources and report.gains[self.shared].isnan().any():
            unknown = next(report.blocks[d] for d in self.shared if report.gains[d].isnan())
            raise ValueError(
                f"strategy='gain' needs the gains of all blocks; this report has none of block {unknown!r}"
            )

    def _quotas(self) -> tuple[int, int]:
        if not self.apart:
            return self.rules.quotas(len(self.shared))
        limits = dict.fromkeys(("pair_threshold", *BUDGETS))
        usual = replace(self.rules, strategy="conflict", groups=self.nothing.groups, **limits)  # type: ignore[arg-type]
        first, second = (int(added.sum()) for added in Candidates(self.report, usual).choose())
        return first, second

    def choose(self, weights: Tensor | None = None, scale: float = 1.0) -> Choice:
        """The choice of the report itself, or with ``weights`` (R, n) of every resample.

        ``scale`` multiplies the deviations of the resamples: 0.5 stands for four times as many units.
        """
        num_blocks, quotas = len(self.shared), self.quotas
        generator = random.Random(self.rules.seed)
        orders, values, members = [], [], []
        for source in self.rules.sources:
            scores = self._scores(source, weights, scale)
            order = self._order(scores)
            if self.rules.strategy in WITHOUT_RATES:
                order = self._places(generator).expand(len(order), num_blocks)
            orders.append(order)
            values.append(self._values(source, order, scores))
            members.append(self._members("null" if source == "null" else "range", weights, scale))
        if self.rules.limited:
            picked = self._within_budget(orders, values, members, quotas, resampled=weights is not None)
        else:
            picked = [
                torch.zeros(order.shape, dtype=torch.bool).scatter_(1, order[:, :quota], True) & (worth >= 0)
                for order, worth, quota in zip(orders, values, quotas, strict=True)
            ]
        slots = [p.unflatten(1, (num_blocks, self.slots)) for p in picked]
        return Choice(*(p & m for p, m in zip(slots, members, strict=True)))

    def plan(self) -> ExpansionPlan:
        """The plan of the report itself."""
        report, chosen = self.report, []
        for added in self.choose():
            tasks = (added[0].float() @ self.belongs.T).bool().tolist()  # all tasks of an owner, or none
            members = [tuple(t for t, hit in zip(report.tasks, row, strict=True) if hit) for row in tasks]
            chosen.append({report.blocks[d]: row for d, row in zip(self.shared, members, strict=True) if row})
        nothing = self.nothing
        return ExpansionPlan(
            nothing.tasks, nothing.num_tokens, chosen[0], chosen[1], nothing.num_features, nothing.groups
        )

    # --- what ranks blocks --------------------------------------------------------------------------------------------

    def _scores(self, source: str, weights: Tensor | None, scale: float) -> Tensor:
        """(R, S) rates or gains; (R, S G) where owners are chosen one by one."""
        report, shared = self.report, self.shared
        if self.apart:
            return self._highest_of_pairs(source, weights, scale)
        if source == "gain":
            estimate = report.gains[shared][None]
            return estimate if weights is None else estimate + scale * gain_deviations(report)[: len(weights), shared]
        estimate = (report.range_rates if source == "range" else report.null_rates)[shared][None]
        if weights is None:
            return estimate
        counts, valid = report.units_of(source)
        return estimate + scale * deviations(counts.sum(2)[:, shared], valid.sum(2)[:, shared], weights)

    def _highest_of_pairs(self, space: str, weights: Tensor | None, scale: float) -> Tensor:
        """(R, S G): of the pairs of an owner and any other, the highest rate; -Inf where it meets none."""
        first, second = torch.triu_indices(len(self.report.tasks), len(self.report.tasks), 1)
        parted = self.belongs[first] != self.belongs[second]  # tasks of one owner keep sharing
        columns = []
        for d in self.shared:
            rates = self._rates_of_pairs(space, d, weights, scale).nan_to_num(-math.inf)
            columns += [
                rates[:, pairs].amax(1) if pairs.any() else rates.new_full((len(rates),), -math.inf)
                for pairs in parted.T
            ]
        return torch.stack(columns, 1)

    def _rates_of_pairs(self, space: str, d: int, weights: Tensor | None, scale: float) -> Tensor:
        """(R, P) of one block; NaN for pairs that never met there."""
        first, second = torch.triu_indices(len(self.report.tasks), len(self.report.tasks), 1)
        rates = self.report.pair_rates(space)[d, first, second][None]
        if weights is None:
            return rates
        counts, valid = self.report.units_of(space)
        return rates + scale * deviations(counts[:, d], valid[:, d], weights)

    def _order(self, scores: Tensor) -> Tensor:
        """(R, S): the blocks of each resample, best first; equals go to the earlier, under ``max_compute`` the later.

        Splitting late is cheap, which is why a budget of compute turns ties around.
        """
        best_first = scores if STRATEGIES[self.rules.strategy][2] else -scores
        if self.rules.max_compute is None:
            return best_first.argsort(dim=1, descending=True, stable=True)
        return scores.shape[1] - 1 - best_first.flip(1).argsort(dim=1, descending=True, stable=True)

    def _places(self, generator: random.Random) -> Tensor:
        """(S,): all blocks in the order in which a strategy takes them that looks at no rates."""
        places = list(range(len(self.shared)))
        if self.rules.strategy == "random":
            generator.shuffle(places)
        return torch.tensor(places[::-1] if self.rules.strategy == "last" else places)

    def _values(self, source: str, order: Tensor, scores: Tensor) -> Tensor:
        """(R, S): what a budget's choice maximises the sum of. What is negative is not chosen, also without one.

        Gains can be, and so is what there is for an owner that meets no other.
        """
        if self.rules.strategy in WITHOUT_RATES:  # the earlier taken, the better
            return torch.linspace(1, 0.5, order.shape[1], dtype=torch.float64)[order.argsort(1)]
        if source == "gain":
            return scores / scores.clamp(min=0).mean(1, keepdim=True).clamp(min=1e-300)
        rates = scores.clamp(0, 1)  # that of a resample is stretched, and can lie outside
        if self.apart:
            return rates.masked_fill(scores == -math.inf, -1)
        if "gain" in self.rules.sources:  # beside gains, which are another measure
            return rates / rates.mean(1, keepdim=True).clamp(min=1e-300)
        return rates if STRATEGIES[self.rules.strategy][2] else 1 - rates

    # --- who gets a module --------------------------------------------------------------------------------------------

    def _members(self, space: str, weights: Tensor | None, scale: float) -> Tensor:
        """(R or 1, S, G) bool: the owners that get a module if the block is chosen."""
        report, threshold = self.report, self.rules.pair_threshold
        reached = torch.ones(len(self.shared), len(report.tasks), dtype=torch.bool)
        if report.reached is not None:
            reached = report.reached[self.shared]
        if threshold is None:
            return (reached.float() @ self.belongs).bool()[None]
        first, second = torch.triu_indices(len(report.tasks), len(report.tasks), 1)
        rows = torch.arange(len(first))
        touches = torch.zeros(len(first), len(report.tasks))
        touches[rows, first] = touches[rows, second] = 1
        members = []
        for s, d in enumerate(self.shared):  # block by block: the pairs of many tasks are many
            # the rate of a pair that never met is NaN, and NaN reaches no threshold
            rates = self._rates_of_pairs(space, d, weights, scale)
            hit = ((rates >= threshold).float() @ touches).bool() & reached[s]
            members.append((hit.float() @ self.belongs).bool())
        return torch.stack(members, 1) if members else torch.zeros(1, 0, len(self.owners), dtype=torch.bool)

    # --- budgets ------------------------------------------------------------------------------------------------------

    def _within_budget(
        self,
        orders: list[Tensor],
        values: list[Tensor],
        members: list[Tensor],
        quotas: tuple[int, int],
        resampled: bool,
    ) -> list[Tensor]:
        budget = Budget(quotas, self.rules.max_parameters, self.rules.max_compute, len(self.shared), len(self.owners))
        picked = [torch.zeros(order.shape, dtype=torch.bool) for order in orders]
        per_owner = [
            [factor * p for p in self.nothing.num_features.values()] for factor in (2, self.nothing.num_tokens)
        ]
        masks = [[[_bits(row) for row in rows] for rows in who.tolist()] for who in members]
        for r in range(len(orders[0])):
            items = []
            for kind, quota in enumerate(quotas):
                who = masks[kind][r if len(masks[kind]) > 1 else 0]
                worth = values[kind][r].tolist()
                for slot in orders[kind][r].tolist() if quota else ():
                    s, g = divmod(slot, self.slots)
                    owners = who[s] & 1 << g if self.apart else who[s]
                    if owners:
                        parameters = owners.bit_count() * per_owner[kind][s]
                        items.append(Item(kind, s, worth[slot], parameters, owners))
            if not resampled:
                check_budget(items, budget)
            for item in best_within(items, budget):
                g = item.owners.bit_length() - 1 if self.apart else 0
                picked[item.kind][r, item.block * self.slots + g] = True
        return picked


def gain_deviations(report: "ConflictReport") -> Tensor:
    """(R, D) float64: how far the gains of resamples are from the gains, stretched as those of rates are."""
    assert report.units is not None and report.gain_resamples is not None
    return (report.gain_resamples - report.gains) * stretch(len(report.units.batches), LEVEL)


def _bits(members: list[bool]) -> int:
    return sum(1 << g for g, member in enumerate(members) if member)
