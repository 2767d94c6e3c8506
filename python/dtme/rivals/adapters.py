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

from ..blocks import block_widths, find_blocks
from ..expansion import expand
from ..model import MultiTaskModel
from ..plan import ExpansionPlan
from .units import TOLERANCE, Kind, Unit, choose_units, deviation, spread, unmatched
from .versions import PerTask, with_copies, with_low_rank

QUERY, KEY, VALUE = ("q_proj", "query", "q"), ("k_proj", "key", "k"), ("v_proj", "value", "v")
"""What libraries call an attention's linear layers."""
FUSED = ("qkv", "qkv_proj", "in_proj", "Wqkv", "query_key_value", "c_attn")
"""What they call one linear layer of queries, keys and values together."""
IN_PROJ = {"weight": "in_proj_weight", "bias": "in_proj_bias"}
"""What ``nn.MultiheadAttention`` calls the parameters of its fused projection, which is no layer."""
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
    """A change of low rank per task, W + B_i A_i for task i (Hu et al., ICLR 2022).

    It goes to the queries and values first, with rank 1 or more, and then to the block's other linear layers. Where
    queries, keys and values are one layer, or the one matrix of ``nn.MultiheadAttention``, the change is of that.
    """

    def fit(self, model: MultiTaskModel, budget: int, seed: int) -> tuple[nn.Module, Facts]:
        """Give the tasks changes with about ``budget`` parameters in all; A is drawn by ``seed``, B starts at zero.

        Returns:
            the model, which starts as ``model``, and facts: ``"added"``, ``"budget"``, ``"deviation"`` (a share of it),
            ``"unmatched"`` (what to say where it is 2 % or more, else None), ``"retired"``, and ``"chosen"``
            ``{weight: rank}``.

        Raises:
            ValueError: no block has projections that are known by their names.
        """
        blocks = find_blocks(model.backbone)
        lanes = _lanes(blocks, nn.Linear, "weight")
        attention = {name: units for name, units in lanes.items() if _is_attention(name)}
        if not attention:
            name = next(iter(blocks))
            raise ValueError(
                f"block {name!r} of {type(model.backbone).__name__} has no linear layers of queries and values, or of "
                f"both and keys, that are known by their names, as LoRA needs them: it has {', '.join(lanes)}"
            )
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

    Those of the keys are left out: they add the same to all scores of a query, and so change nothing. Where queries,
    keys and values are one layer they cannot be, and a third of such a bias is spent on nothing.
    """

    def fit(self, model: MultiTaskModel, budget: int, seed: int) -> tuple[nn.Module, Facts]:
        """Give the tasks biases with about ``budget`` parameters in all.

        Returns:
            the model, which starts as ``model``, and facts as of ``LoRA.fit``, ``"chosen"`` being ``{bias: 1}``.

        Raises:
            ValueError: no block has a linear layer or a layer norm with a bias.
        """
        lanes = _lanes(find_blocks(model.backbone), (nn.Linear, nn.LayerNorm), "bias")
        lanes = {name: units for name, units in lanes.items() if _layer(name) not in KEY}
        chosen = choose_units(_kinds(lanes, lambda name: len(model.tasks) * sum(_shape(model, name))), budget)
        return _fitted("BitFit", with_copies(model, chosen), budget, chosen)


class NormAffine:
    """A task's own weight and bias of a block's layer norms in place of the shared ones."""

    def fit(self, model: MultiTaskModel, budget: int, seed: int) -> tuple[nn.Module, Facts]:
        """Give the tasks weights and biases with about ``budget`` parameters in all.

        Returns:
            the model, which starts as ``model``, and facts as of ``LoRA.fit``, ``"chosen"`` being ``{parameter: 1}``.

        Raises:
            ValueError: no block has a layer norm with weight and bias.
        """
        lanes = _lanes(find_blocks(model.backbone), nn.LayerNorm, "weight", "bias")
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
        """Expand ``model`` in place by task tokens with about ``budget`` parameters in all, drawn as others are.

        Returns:
            the model, and facts as of ``LoRA.fit``, with ``"plan"`` in place of ``"retired"`` and ``"chosen"``.

        Raises:
            ValueError: no blocks are recognised, or task tokens cannot join their attention.
        """
        plan = self.plan(model, budget)
        facts = _facts("prompts", plan.added_parameters(), budget) | {"plan": plan.as_dict()}
        return expand(model, plan), facts

    def plan(self, model: MultiTaskModel, budget: int) -> ExpansionPlan:
        """The plan of task tokens alone that adds as nearly ``budget`` parameters as can be."""
        widths = {name: _width(name, block) for name, block in find_blocks(model.backbone).items()}
        blocks = tuple(widths)
        costs = {
            count: len(model.tasks) * sum(widths[blocks[index]] for index in spread(count, len(blocks)))
            for count in range(1, len(blocks) + 1)
        }
        options = [(count, max(1, budget // cost + more)) for count, cost in costs.items() for more in (0, 1)]

        def worth(option: tuple[int, int]) -> tuple[bool, float, float]:
            off = abs(deviation(option[1] * costs[option[0]], budget))
            return off < TOLERANCE, option[0] if off < TOLERANCE else 0, -off

        count, tokens = max(options, key=worth)
        chosen = dict.fromkeys((blocks[index] for index in spread(count, len(blocks))), model.tasks)
        return ExpansionPlan(model.tasks, tokens, {}, chosen, widths)


def width_of(backbone: nn.Module) -> int:
    """p of a backbone's first block, by the layers that it has.

    Raises:
        ValueError: no blocks are recognised, or nothing in the first tells its width.
    """
    return _width(*next(iter(find_blocks(backbone).items())))


def _width(name: str, block: nn.Module) -> int:
    widths = block_widths(block)
    if not widths:
        raise ValueError(f"the width of block {name!r} ({type(block).__name__}) is not known from its layers")
    return widths[0]


def _is_attention(parameter: str) -> bool:
    """Whether it projects to queries or values, by its name within its block."""
    return _layer(parameter) in QUERY + VALUE + FUSED or parameter.rpartition(".")[2] in IN_PROJ.values()


def _lanes(
    blocks: Mapping[str, nn.Module], kinds: type[nn.Module] | tuple[type[nn.Module], ...], *parameters: str
) -> Lanes:
    """Units of the parameters of that name, together, of all modules of these kinds in the blocks.

    Where linear layers are among the kinds, ``nn.MultiheadAttention``'s fused projection is one too.
    """
    with_fused = issubclass(nn.Linear, kinds)
    lanes: dict[str, list[Unit]] = {}
    for name, block in blocks.items():
        for inner, module in block.named_modules():
            named = parameters
            if with_fused and isinstance(module, nn.MultiheadAttention):
                named = tuple(IN_PROJ[each] for each in parameters)
            elif not isinstance(module, kinds):
                continue
            if all(getattr(module, each, None) is not None for each in named):
                unit = tuple(f"{name}.{inner}.{each}" for each in named)
                lanes.setdefault(f"{inner}.{named[0]}", []).append(unit)
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
