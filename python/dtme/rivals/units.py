"""Choose parts of a backbone, evenly over its depth, that together have a given number of parameters."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

TOLERANCE = 0.02
"""How far from the budget a rival may be and still count as one of equal size."""


Unit = tuple[str, ...]
"""Names of the parameters that are chosen together."""


@dataclass(frozen=True)
class Kind:
    """Units that cost the same.

    Attributes:
        lanes: units by what they are in their block (queries, values), each in the order of the blocks: as many are
            chosen in every lane, up to one.
        cost: parameters that a unit adds.
        most: how many are chosen at most; a unit is chosen again when all of its lane are (a rank more).
    """

    lanes: tuple[tuple[Unit, ...], ...]
    cost: int
    most: int


def choose_units(kinds: Sequence[Kind], budget: int) -> dict[str, int]:
    """How often each parameter is chosen, so that all together cost as nearly ``budget`` as can be.

    Of equally near choices, the one with the most units of the first kind, then of the second. Units of a later kind
    are chosen among those that share no parameter with a chosen one of an earlier kind.

    Returns:
        ``{parameter: times}`` of those that are chosen.
    """
    first, *others = kinds
    best: tuple[int, ...] | None = None
    for counts in product(*(range(min(kind.most, budget // kind.cost + 1) + 1) for kind in others)):
        rest = budget - sum(count * kind.cost for count, kind in zip(counts, others, strict=True))
        for fit in {min(first.most, max(0, rest // first.cost + more)) for more in (0, 1)}:
            key = (abs(rest - fit * first.cost), *(-count for count in (fit, *counts)))
            best = key if best is None else min(best, key)
    assert best is not None
    chosen: dict[str, int] = {}
    for kind, count in zip(kinds, best[1:], strict=True):
        free = [tuple(unit for unit in lane if chosen.keys().isdisjoint(unit)) for lane in kind.lanes]
        for unit in list(_spread([lane for lane in free if lane], -count)):
            for name in unit:
                chosen[name] = chosen.get(name, 0) + 1
    return chosen


def spread(count: int, places: int, shift: float = 0.5) -> list[int]:
    """``count`` of ``places`` indices, evenly spaced; ``shift`` in [0, 1) moves them within their stretches."""
    return [int((i + shift) * places / count) for i in range(count)]


def _spread(lanes: Sequence[tuple[Unit, ...]], count: int) -> Iterator[Unit]:
    """``count`` units, evenly over the lanes and over each lane; lanes are shifted, so that they meet other blocks."""
    counts = [0] * len(lanes)
    for _ in range(count if lanes else 0):
        # no lane begins anew before all are through once
        counts[min(range(len(lanes)), key=lambda place: (counts[place] // len(lanes[place]), counts[place]))] += 1
    for place, (lane, taken) in enumerate(zip(lanes, counts, strict=True)):
        times, rest = divmod(taken, len(lane))
        for _ in range(times):
            yield from lane
        for index in spread(rest, len(lane), (place + 0.5) / len(lanes)):
            yield lane[index]


def deviation(added: int, budget: int) -> float:
    """By which share of the budget ``added`` is above (positive) or below it."""
    return added / budget - 1


def unmatched(name: str, added: int, budget: int) -> str | None:
    """What to say of a rival that is not of equal size; None of one that is."""
    off = deviation(added, budget)
    if abs(off) < TOLERANCE:
        return None
    return f"{name} has no choice of units within {TOLERANCE:.0%} of {budget:,} parameters: {added:,}, {off:+.1%}"
