"""What the analysis found: conflict counts per block, shown as a table and a picture, turned into a plan."""

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import load_json, save_json, write_beside
from .plan import NUM_TOKENS, ExpansionPlan, check_tasks

KIND = "dtme.ConflictReport"
NOT_SHARED = "fewer than two tasks reach it"
# strategy: (space that ranks modulation, space that ranks expansion, highest rate first), Tables 2 and 13
STRATEGIES = {
    "conflict": ("range", "null", True),
    "reverse": ("range", "null", False),
    "swap": ("null", "range", True),
    "random": ("range", "null", True),
}


@dataclass(frozen=True, eq=False)
class ConflictReport:
    """Gradient conflicts of every block, in the range and in the null space of its tokens (method.md, section 2).

    Attributes:
        tasks: K names.
        blocks: D block names, in forward order.
        ranks: (D,) int64, dimension m of the range space.
        range_counts, null_counts, valid_counts: (D, K, K) int64, symmetric, zero diagonal: (token, pair)s that
            conflict, and those that could. A block where no pair could is one that fewer than two tasks reach, such as
            one of a task's own decoder: it has no rates, and no plan is made for it.
        eigenvalues: (D, p) float64, descending, of the uncentred second moment; a list of (p_d,) where widths differ.
        num_samples: images of the covariance pass.
        ratio: the r that split range from null.
    """

    tasks: tuple[str, ...]
    blocks: tuple[str, ...]
    ranks: Tensor
    range_counts: Tensor
    null_counts: Tensor
    valid_counts: Tensor
    eigenvalues: Tensor | list[Tensor]
    num_samples: int
    ratio: float = field(default=100.0)

    @property
    def range_rates(self) -> Tensor:
        """(D,) float64: Σ_{i<j} range counts / Σ_{i<j} valid; NaN where nothing is valid."""
        return _rates(self.range_counts, self.valid_counts)

    @property
    def null_rates(self) -> Tensor:
        """(D,) float64, as ``range_rates``."""
        return _rates(self.null_counts, self.valid_counts)

    @property
    def num_features(self) -> dict[str, int]:
        """Width p of every block."""
        return {block: len(values) for block, values in zip(self.blocks, self.eigenvalues, strict=True)}

    @property
    def shared_blocks(self) -> tuple[str, ...]:
        """The blocks that at least two tasks reach, in forward order: those that a plan is about."""
        return tuple(self.blocks[d] for d in self._shared())

    def _shared(self) -> list[int]:
        return self.valid_counts.flatten(1).any(1).nonzero().flatten().tolist()

    def plan(
        self,
        *,
        modulation: float = 0.5,
        expansion: float = 0.5,
        strategy: str = "conflict",
        num_tokens: int | str = 6,
        pair_threshold: float | None = None,
        seed: int = 0,
    ) -> ExpansionPlan:
        """Choose blocks by their conflict rates (Algorithm 1, Appendix B.3), of those that at least two tasks reach.

        Args:
            modulation: share of the blocks that get modulations, those with the highest range rate; 0 for none.
            expansion: share of the blocks that get task tokens, those with the highest null rate; 0 for none.
            strategy: ``"conflict"``, or its controls ``"reverse"`` (lowest rates), ``"random"`` and ``"swap"``
                (modulation by null, expansion by range).
            num_tokens: task tokens per task and block, or ``"text"`` (6) or ``"params"`` (1), the paper's two figures.
            pair_threshold: give a module only to tasks in some pair whose rate in that block and space reaches this;
                None gives one to every task.
            seed: of ``"random"``.
        """
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy must be one of {list(STRATEGIES)}, got {strategy!r}")
        if isinstance(num_tokens, str):
            if num_tokens not in NUM_TOKENS:
                raise ValueError(f"num_tokens must be an integer or one of {list(NUM_TOKENS)}, got {num_tokens!r}")
            num_tokens = NUM_TOKENS[num_tokens]
        if pair_threshold is not None and (not isinstance(pair_threshold, Real) or pair_threshold != pair_threshold):
            raise ValueError(f"pair_threshold must be None or a rate, got {pair_threshold!r}")
        spaces = STRATEGIES[strategy]
        generator = random.Random(seed)
        chosen = []
        for name, share, space in (("modulation", modulation, spaces[0]), ("expansion", expansion, spaces[1])):
            order = self._order(space, descending=spaces[2])
            if strategy == "random":
                generator.shuffle(order)
            picked = sorted(order[: _quota(name, share, len(order))])
            members = {self.blocks[d]: self._members(d, space, pair_threshold) for d in picked}
            chosen.append({block: tasks for block, tasks in members.items() if tasks})
        widths = self.num_features
        return ExpansionPlan(self.tasks, num_tokens, chosen[0], chosen[1], {b: widths[b] for b in self.shared_blocks})

    def _order(self, space: str, descending: bool) -> list[int]:
        """Blocks that at least two tasks reach by rate, ties to the earlier one."""
        rates = (self.range_rates if space == "range" else self.null_rates).tolist()
        return sorted(self._shared(), key=lambda d: (-rates[d] if descending else rates[d], d))

    def _members(self, d: int, space: str, threshold: float | None) -> tuple[str, ...]:
        if threshold is None:
            return self.tasks
        counts = self.range_counts if space == "range" else self.null_counts
        # 0 / 0 on the diagonal and for pairs that never met is NaN, and NaN reaches no threshold
        reached = (counts[d].double() / self.valid_counts[d].double() >= threshold).any(1).tolist()
        return tuple(task for task, hit in zip(self.tasks, reached, strict=True) if hit)

    def table(self, plan: ExpansionPlan | None = None) -> str:
        """One row per block: width, rank, both rates and, given a plan, what it puts there."""
        rows = [["block", "p", "rank", "range rate", "null rate", "plan" if plan else ""]]
        rates = list(zip(self.range_rates.tolist(), self.null_rates.tolist(), strict=True))
        shared = set(self._shared())
        for d, (block, width) in enumerate(self.num_features.items()):
            row = [block, str(width), str(self.ranks[d].item())]
            if d not in shared:
                rows.append([*row, "-", "-", NOT_SHARED])
                continue
            marks = [] if plan is None else [_mark("modulate", plan.modulation.get(block, ()), plan.tasks)]
            marks += [] if plan is None else [_mark("expand", plan.expansion.get(block, ()), plan.tasks)]
            rows.append([*row, *(f"{rate:.1%}" for rate in rates[d]), " + ".join(filter(None, marks))])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        align = ["<", ">", ">", ">", ">", "<"]
        lines = [
            "  ".join(f"{cell:{a}{w}}" for cell, a, w in zip(row, align, widths, strict=True)).rstrip() for row in rows
        ]
        return "\n".join([lines[0], "─" * max(map(len, lines)), *lines[1:]])

    def __str__(self) -> str:
        plan, num_shared = self.plan(), len(self._shared())
        tasks = ", ".join(self.tasks)
        head = f"Token-space gradient conflicts of {tasks} over {self.num_samples:,} samples (ratio {self.ratio:g})"
        blocks = f"{num_shared} blocks"
        if num_shared < len(self.blocks):
            blocks = f"the {num_shared} blocks (of {len(self.blocks)}) that two or more tasks reach"
        foot = (
            f"plan() modulates {len(plan.modulation)} and expands {len(plan.expansion)} of {blocks}: "
            f"{plan.added_parameters():,} parameters with {plan.num_tokens} task tokens"
        )
        return "\n".join([head, "", self.table(plan), "", foot])

    def plot(self, path: str | os.PathLike[str], plan: ExpansionPlan | None = None) -> None:
        """Draw both rates per block, and mark where ``plan`` (by default ``self.plan()``) modulates and expands."""
        from .plots import plot_report

        figure = plot_report(self, plan or self.plan())
        write_beside(Path(path), lambda beside: figure.savefig(beside, dpi=150))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON; floats survive exactly."""
        content: dict[str, Any] = {
            "tasks": list(self.tasks),
            "blocks": list(self.blocks),
            "num_samples": self.num_samples,
        }
        content |= {"ratio": self.ratio, "ranks": self.ranks.tolist()}
        content |= {name: getattr(self, name).tolist() for name in ("range_counts", "null_counts", "valid_counts")}
        content["eigenvalues"] = [values.tolist() for values in self.eigenvalues]
        save_json(path, KIND, content)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ConflictReport":
        """Read what ``save`` wrote; ValueError names the file and what is wrong with it."""
        names = set(cls.__dataclass_fields__)
        content = load_json(path, KIND, names)
        try:
            for name in ("ranks", "range_counts", "null_counts", "valid_counts"):
                content[name] = torch.tensor(content[name])
                if content[name].dtype != torch.int64:
                    raise ValueError(f"{name} must hold integers")
            values = [torch.tensor(row, dtype=torch.float64) for row in content["eigenvalues"]]
            content |= {"tasks": check_tasks(content["tasks"]), "blocks": tuple(content["blocks"])}
            if not isinstance(content["num_samples"], int):
                raise ValueError(f"num_samples must be an integer, got {content['num_samples']!r}")
            content["eigenvalues"] = stack_if_equal(values)
            report = cls(**content)
            report._check()
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        return report

    def _check(self) -> None:
        """ValueError where a file's figures cannot be those of an analysis."""
        num_blocks, num_tasks = len(self.blocks), len(self.tasks)
        if len(set(self.blocks)) != num_blocks or not all(isinstance(block, str) for block in self.blocks):
            raise ValueError(f"blocks must be different names, got {list(self.blocks)}")
        for name in ("range_counts", "null_counts", "valid_counts"):
            counts = getattr(self, name)
            if counts.shape != (num_blocks, num_tasks, num_tasks):
                raise ValueError(f"{name} must be ({num_blocks}, {num_tasks}, {num_tasks}), got {tuple(counts.shape)}")
            symmetric = torch.equal(counts, counts.mT) and not counts.diagonal(dim1=1, dim2=2).any()
            if not symmetric or (counts < 0).any() or (counts > self.valid_counts).any():
                raise ValueError(f"{name} must be symmetric counts with a zero diagonal, none above valid_counts")
        widths = list(self.num_features.values())
        if any(values.ndim != 1 or len(values) < 2 for values in self.eigenvalues):
            raise ValueError("eigenvalues must be a list of numbers a block")
        if self.ranks.shape != (num_blocks,) or not all(
            1 <= m < p for m, p in zip(self.ranks.tolist(), widths, strict=True)
        ):
            raise ValueError(
                f"ranks must be one in [1, p-1] for each of {num_blocks} blocks, got {self.ranks.tolist()}"
            )
        for name in ("num_samples", "ratio"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise ValueError(f"{name} must be a positive number, got {value!r}")


def stack_if_equal(values: Sequence[Tensor]) -> Tensor | list[Tensor]:
    """(D, p) where all blocks are p wide, else the list."""
    return torch.stack(list(values)) if len({len(v) for v in values}) == 1 else list(values)


def _rates(counts: Tensor, valid: Tensor) -> Tensor:
    # both sums count every pair twice
    return counts.sum((1, 2)).double() / valid.sum((1, 2)).double()


def _quota(name: str, share: float, num_blocks: int) -> int:
    if isinstance(share, bool) or not isinstance(share, Real) or not 0 <= share <= 1:
        raise ValueError(f"{name} must be a share of the blocks in [0, 1], got {share!r}")
    return max(1, round(share * num_blocks)) if share else 0


def _mark(word: str, tasks: Sequence[str], all_tasks: Sequence[str]) -> str:
    if not tasks:
        return ""
    return word if len(tasks) == len(all_tasks) else f"{word} ({', '.join(tasks)})"
