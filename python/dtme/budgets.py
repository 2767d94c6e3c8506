"""The best choice within a budget of parameters and of compute. Exact: every plan is looked at or ruled out."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import NamedTuple

MOST_SPLITS = 400_000  # of the owners of one block, on the way of one plan or another
EPSILON = 1e-12  # sums of rates that differ by less are equal: they were added up in another order


class Item(NamedTuple):
    """A module that may be chosen."""

    kind: int
    """0: modulation, 1: task tokens."""
    block: int
    value: float
    parameters: int
    owners: int
    """Who gets the module, one bit each."""


class Budget(NamedTuple):
    """What a plan of S blocks and G owners may add."""

    quotas: tuple[int, int]
    """At most so many modules of either kind."""
    max_parameters: float | None
    max_compute: float | None
    num_blocks: int
    num_owners: int

    def streams(self, apart: int) -> int:
        """Streams of a block where the owners in ``apart`` have one each; the others share one."""
        return apart.bit_count() + (apart.bit_count() < self.num_owners)

    def runs(self, items: Iterable[Item]) -> int:
        """Blocks that run in all streams: ``ExpansionPlan.compute`` times the number of blocks."""
        leaving = [0] * self.num_blocks
        for item in items:
            leaving[item.block] |= item.owners
        total = apart = 0
        for owners in leaving:
            apart |= owners
            total += self.streams(apart)
        return total

    def affords(self, runs: int) -> bool:
        # compared as ExpansionPlan.compute divides, so that what a plan says it takes is enough for it
        return self.max_compute is None or runs / self.num_blocks <= self.max_compute


def check_budget(items: Sequence[Item], budget: Budget) -> None:
    """ValueError saying the least that is needed, if not even one of ``items`` alone is within the budget."""
    if not items:
        if budget.max_compute is not None and budget.max_compute < 1:
            raise ValueError(f"max_compute={budget.max_compute!r} is below every plan: the plain model needs 1.0")
        return
    runs = [budget.runs([item]) for item in items]
    within = [budget.max_parameters is None or item.parameters <= budget.max_parameters for item in items]
    if any(fits and budget.affords(n) for fits, n in zip(within, runs, strict=True)):
        return
    least_parameters, least_compute = min(item.parameters for item in items), min(runs) / budget.num_blocks
    problems = []
    if budget.max_parameters is not None:
        problems.append(f"max_parameters={budget.max_parameters!r} (the least that a plan adds is {least_parameters})")
    if budget.max_compute is not None:
        problems.append(f"max_compute={budget.max_compute!r} (the least that a plan takes is {least_compute!r})")
    together = ", and no plan keeps within both" if len(problems) > 1 else ""
    raise ValueError(f"the budget is below every plan: {' and '.join(problems)}{together}")


def best_within(items: Sequence[Item], budget: Budget) -> list[Item]:
    """Those of ``items`` that together have the highest value, or of such the most, within the budget.

    Args:
        items: those of each kind with the best first, which is how equals are decided.
    """
    items = [item for item in items if item.value >= 0]  # no plan is better for what has a negative value
    if not items or budget.max_compute is None or budget.affords(budget.num_blocks * budget.num_owners):
        return _cheapest(items, budget)
    if len({item.owners for item in items}) <= 1:  # the first chosen block decides
        return _cheapest([item for item in items if budget.affords(budget.runs([item]))], budget)
    return _best_of_splits(items, budget)


def _best_of_splits(items: list[Item], budget: Budget) -> list[Item]:
    """The best choice where modules differ in who gets them, so that owners leave the shared stream one after another.

    Every way of letting them leave that the budget affords is tried: an item may be chosen where all its owners have
    left. What cannot be better than the best so far is not looked at.
    """
    order = {item: position for position, item in enumerate(items)}
    at = [[item for item in items if item.block == d] for d in range(budget.num_blocks)]
    later = [[item for item in items if item.block >= d] for d in range(budget.num_blocks + 1)]
    stack: list[tuple[int, int, int, list[Item]]] = [(0, 0, 0, [])]
    best: list[Item] = []
    merit, visited = (0.0, 0, 0), 0
    while stack:
        d, apart, runs, allowed = stack.pop()
        if not budget.affords(runs + (budget.num_blocks - d) * budget.streams(apart)):
            continue
        possible = sorted([*allowed, *later[d]], key=order.__getitem__)
        if _sum(_first(possible, budget)) < merit[0] - EPSILON:
            continue
        if all(item.owners | apart == apart for item in later[d]):  # nobody leaves any more
            chosen = _cheapest(possible, budget)
            reached = (_sum(chosen), len(chosen), -budget.runs(chosen))
            if _better(reached, merit):
                best, merit = chosen, reached
            continue
        unions = {apart}
        for owners in {item.owners for item in at[d]}:
            unions |= {union | owners for union in unions}
            if visited + len(unions) > MOST_SPLITS:
                raise ValueError(
                    "pair_threshold (or strategy='pairs', or tasks that do not reach all blocks) with max_compute "
                    "leaves too many plans to compare: give groups, or leave one of them out"
                )
        visited += len(unions)
        for union in sorted(unions, key=lambda mask: (mask.bit_count(), mask)):  # most first out: they have most choice
            fitting = [item for item in at[d] if item.owners | union == union]
            stack.append((d + 1, union, runs + budget.streams(union), allowed + fitting))
    return best


def _better(merit: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Whether the value is higher, or equal and what follows it is."""
    return merit[0] > other[0] + EPSILON or (merit[0] > other[0] - EPSILON and merit[1:] > other[1:])


def _first(items: Iterable[Item], budget: Budget) -> list[Item]:
    """The best of each kind, as many as the quotas let."""
    kinds: tuple[list[Item], list[Item]] = ([], [])
    for item in items:
        if len(kinds[item.kind]) < budget.quotas[item.kind]:
            kinds[item.kind].append(item)
    return [*kinds[0], *kinds[1]]


def _cheapest(items: list[Item], budget: Budget) -> list[Item]:
    """The best choice of ``items`` by parameters alone."""
    chosen = _first(items, budget)
    if budget.max_parameters is None or sum(item.parameters for item in chosen) <= budget.max_parameters:
        return chosen
    fronts = [_front([item for item in items if item.kind == kind], budget, kind) for kind in (0, 1)]
    costs = [cost for cost, _, _ in fronts[1]]
    best: tuple[Item, ...] = ()
    merit = (0.0, 0)
    for cost, value, first in fronts[0]:
        affordable = bisect_right(costs, budget.max_parameters - cost) - 1
        if affordable < 0:
            continue
        _, more, second = fronts[1][affordable]
        reached = (value + more, len(first) + len(second))
        if _better(reached, merit):
            best, merit = first + second, reached
    return list(best)


def _front(items: list[Item], budget: Budget, kind: int) -> list[tuple[int, float, tuple[Item, ...]]]:
    """(parameters, value, items) of the best choices of one kind, both ascending: more value for more parameters.

    Of items of the same price a best choice takes the best ones, so only how many of each price is left to try.
    """
    assert budget.max_parameters is not None
    states: dict[tuple[int, int], tuple[float, tuple[Item, ...]]] = {(0, 0): (0.0, ())}
    for price in sorted({item.parameters for item in items}):
        same = [item for item in items if item.parameters == price][: budget.quotas[kind]]
        reached = dict(states)
        for (count, cost), (value, chosen) in states.items():
            for k in range(1, min(len(same), budget.quotas[kind] - count) + 1):
                if cost + k * price > budget.max_parameters:
                    break
                value += same[k - 1].value
                key = (count + k, cost + k * price)
                if key not in reached or value > reached[key][0]:
                    reached[key] = (value, chosen + tuple(same[:k]))
        states = reached
    front: list[tuple[int, float, tuple[Item, ...]]] = []
    for (_, cost), (value, chosen) in sorted(states.items(), key=lambda state: (state[0][1], -state[1][0])):
        if not front or (value, len(chosen)) > (front[-1][1], len(front[-1][2])):
            front.append((cost, value, chosen))
    return front


def _sum(items: Iterable[Item]) -> float:
    return sum(item.value for item in items)
