"""Rivals of equal size on the same backbone: what else a task could have of its own for as many parameters.

Each has ``fit(model, budget, seed)``, which chooses its units evenly over the blocks so that what the tasks have of
their own, all tasks together, is as many parameters as ``budget``, and says in its facts how near it came. Where a
task's copies take the place of shared parameters, these are not trained any more (``"retired"``): a copy counts in full
all the same, because it is what the task has of its own. All the rest of the backbone goes on training, as with ours.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from torch import nn

from ..blocks import find_blocks
from ..expansion import expand
from ..model import MultiTaskModel
from ..plan import ExpansionPlan
from .units import TOLERANCE, Kind, Unit, choose_units, deviation, spread, unmatched
from .versions import PerTask, with_copies, with_low_rank

QUERY, KEY, VALUE = ("q_proj", "query", "q"), ("k_proj", "key", "k"), ("v_proj", "value", "v")
"""What libraries call an attention's linear layers."""
MOST_RANK = 64

Facts = dict[str, Any]
"""What was built: only what JSON holds."""

Lanes = dict[str, tuple[Unit, ...]]
"""``{name of a parameter within its block: the units that it is the first of, in the order of the blocks}``."""


class Rival(Protocol):
    """What can be built to a size."""

    def fit(self, model: MultiTaskModel, budget: int, seed: int) -> tuple[nn.Module, Facts]:
        """Turn ``model``, which may be changed in place, into the rival with about ``budget`` parameters of tasks' own.

        Raises:
            ValueError: the backbone has no such units; the message names the rival or the block.
        """
        ...


class LoRA:
    """W + B_i A_i for task i: rank 1 or more in the queries and values, then in the block's other linear layers."""

    def fit(self, model: MultiTaskModel, budget: int, seed: int) -> tuple[nn.Module, Facts]:
        lanes = _lanes(_blocks(model), nn.Linear, "weight")
        attention = {name: units for name, units in lanes.items() if _layer(name) in QUERY + VALUE}
        others = {name: units for name, units in lanes.items() if name not in attention}
        kinds = [
            kind
            for some in (attention, others)
            for kind in _kinds(some, lambda name: len(model.tasks) * sum(_shape(model, name)), MOST_RANK)
        ]
        ranks = choose_units(kinds, budget)
        return _fitted("LoRA", with_low_rank(model, ranks, seed), budget, ranks)


class BitFit:
    """A task's own biases of a block's linear layers and norms (Ben Zaken et al., ACL 2022) in place of shared ones.

    Those of the keys are left out: they add the same to all scores of a query, and so change nothing.
    """

    def fit(self, model: MultiTaskModel, budget: int, seed: int) -> tuple[nn.Module, Facts]:
        lanes = _lanes(_blocks(model), (nn.Linear, nn.LayerNorm), "bias")
        lanes = {name: units for name, units in lanes.items() if _layer(name) not in KEY}
        chosen = choose_units(_kinds(lanes, lambda name: len(model.tasks) * sum(_shape(model, name))), budget)
        return _fitted("BitFit", with_copies(model, chosen), budget, chosen)


class NormAffine:
    """A task's own weight and bias of a block's layer norms in place of the shared ones."""

    def fit(self, model: MultiTaskModel, budget: int, seed: int) -> tuple[nn.Module, Facts]:
        lanes = _lanes(_blocks(model), nn.LayerNorm, "weight", "bias")
        pairs = _kinds(lanes, lambda name: 2 * len(model.tasks) * sum(_shape(model, name)))
        # where pairs alone do not come near enough, one norm more has a weight of the task's own and no bias
        weight = Kind(tuple(tuple(unit[:1] for unit in lane) for lane in pairs[0].lanes), pairs[0].cost // 2, 1)
        chosen = choose_units([*pairs, weight], budget)
        return _fitted("norm affine", with_copies(model, chosen), budget, chosen)


class Prompts:
    """Deep visual prompts per task (Jia et al., ECCV 2022): task tokens in every block, dropped at its output.

    Where no number of tokens in all blocks is within 2 % of the budget, in as many of them as one is, evenly spaced.
    """

    def fit(self, model: MultiTaskModel, budget: int, seed: int) -> tuple[nn.Module, Facts]:
        plan = self.plan(model, budget)
        facts = _facts("prompts", plan.added_parameters(), budget) | {"plan": plan.as_dict()}
        return expand(model, plan), facts

    def plan(self, model: MultiTaskModel, budget: int) -> ExpansionPlan:
        """The plan of task tokens alone that adds as nearly ``budget`` parameters as can be."""
        blocks, width = tuple(find_blocks(model.backbone)), width_of(model.backbone)
        cost = width * len(model.tasks)
        options = [
            (count, max(1, int(budget / (count * cost)) + more))
            for count in range(1, len(blocks) + 1)
            for more in (0, 1)
        ]

        def worth(option: tuple[int, int]) -> tuple[bool, float, float]:
            off = abs(deviation(option[0] * option[1] * cost, budget))
            return off < TOLERANCE, option[0] if off < TOLERANCE else 0, -off

        count, tokens = max(options, key=worth)
        chosen = dict.fromkeys((blocks[index] for index in spread(count, len(blocks))), model.tasks)
        return ExpansionPlan(model.tasks, tokens, {}, chosen, dict.fromkeys(blocks, width))


def width_of(backbone: nn.Module) -> int:
    """p of a transformers model."""
    config: Any = backbone.config
    return int(config.hidden_size)


def _blocks(model: MultiTaskModel) -> dict[str, nn.Module]:
    """The backbone's blocks.

    Raises:
        ValueError: queries, keys and values of a block are not layers of their own.
    """
    blocks = find_blocks(model.backbone)
    for name, block in blocks.items():
        linear = [inner for inner, module in block.named_modules() if isinstance(module, nn.Linear)]
        last = {inner.rpartition(".")[2] for inner in linear}
        if any(last.isdisjoint(names) for names in (QUERY, KEY, VALUE)):
            raise ValueError(
                f"block {name!r} of {type(model.backbone).__name__} has no linear layers of queries, keys and values "
                f"that are known by their names, as LoRA and BitFit need them: it has {', '.join(linear) or 'none'}"
            )
    return blocks


def _lanes(
    blocks: Mapping[str, nn.Module], kinds: type[nn.Module] | tuple[type[nn.Module], ...], *parameters: str
) -> Lanes:
    """Units of the parameters of that name, together, of all modules of these kinds in the blocks."""
    lanes: dict[str, list[Unit]] = {}
    for name, block in blocks.items():
        for inner, module in block.named_modules():
            if isinstance(module, kinds) and all(getattr(module, each, None) is not None for each in parameters):
                unit = tuple(f"{name}.{inner}.{each}" for each in parameters)
                lanes.setdefault(f"{inner}.{parameters[0]}", []).append(unit)
    if not lanes:
        raise ValueError(f"no block has a layer with {' and '.join(parameters)}: {', '.join(blocks)}")
    return {inner: tuple(units) for inner, units in lanes.items()}


def _kinds(lanes: Lanes, cost: Callable[[str], int], repeats: int = 1) -> list[Kind]:
    """The lanes by what a unit costs, which ``cost(its first parameter)`` says; the cheapest first."""
    costs = {inner: cost(units[0][0]) for inner, units in lanes.items()}
    kinds = []
    for each in sorted(set(costs.values())):
        alike = tuple(units for inner, units in lanes.items() if costs[inner] == each)
        kinds.append(Kind(alike, each, repeats * sum(map(len, alike))))
    return kinds


def _layer(parameter: str) -> str:
    """What the module that holds a parameter is called."""
    return parameter.split(".")[-2]


def _shape(model: MultiTaskModel, name: str) -> Iterable[int]:
    return model.backbone.get_parameter(name).shape


def _fitted(rival: str, model: PerTask, budget: int, chosen: Mapping[str, int]) -> tuple[PerTask, Facts]:
    facts = _facts(rival, model.added(), budget) | {"retired": model.num_retired(), "chosen": dict(chosen)}
    return model, facts


def _facts(rival: str, added: int, budget: int) -> Facts:
    if (problem := unmatched(rival, added, budget)) is not None:
        warnings.warn(problem, stacklevel=2)
    return {"added": added, "budget": budget, "deviation": deviation(added, budget), "unmatched": problem}
