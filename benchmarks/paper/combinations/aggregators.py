"""Combinations that make one gradient of the tasks' gradients, by torchjd's aggregators.

How long the combined gradient is, is each method's own, as it was published: of the size of the *sum* of the
gradients for PCGrad, ConFIG and GradDrop, of their *mean* for CAGrad and Aligned-MTL, a weighted mean for MGDA and
IMTL, and of length 1 at most for Nash-MTL. A head's gradient is its task's alone. To Adam that is no matter, because it
divides by the scale of each parameter's gradient; and an arm's learning rate is tuned.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from cvxpy.error import SolverError
from torch import Tensor, nn
from torchjd import aggregation
from torchjd.aggregation import Aggregator

from ..arms import Combination, Facts
from ..tasks import Tasks

Maker = Callable[[int], Aggregator]
"""From the number of gradients to a new aggregator of so many."""


def graddrop(rows: int) -> Aggregator:
    """Chen et al.: Just Pick a Sign (NeurIPS 2020): each entry keeps the gradients of one sign, drawn by their share.

    On gradients of parameters, as later comparisons have it; the paper's layer drops gradients of activations.
    """
    return aggregation.GradDrop()


def mgda(rows: int) -> Aggregator:
    """Sener, Koltun: Multi-Task Learning as Multi-Objective Optimization (NeurIPS 2018): a shortest convex combination.

    By Frank-Wolfe, until a step is shorter than 0.001, at most 100 steps; the gradients are not normalised before.
    """
    return aggregation.MGDA()


def pcgrad(rows: int) -> Aggregator:
    """Yu et al.: Gradient Surgery for Multi-Task Learning (NeurIPS 2020): a sum of projections, in an order drawn."""
    return aggregation.PCGrad()


def cagrad(rows: int) -> Aggregator:
    """Liu et al.: Conflict-Averse Gradient Descent (NeurIPS 2021), c = 0.4 as on NYUv2 there, not divided by 1 + c²."""
    return aggregation.CAGrad(c=0.4)


def imtl(rows: int) -> Aggregator:
    """Liu et al.: Towards Impartial Multi-Task Learning (ICLR 2021): equal projections on the tasks' unit gradients.

    This is IMTL-G, the part of the method that is about gradients, and what the comparisons that this one follows call
    IMTL. The paper's hybrid learns scales of the losses (IMTL-L) as well, which is not done here.
    """
    return aggregation.IMTLG()


def aligned(rows: int) -> Aggregator:
    """Senushkin et al.: Independent Component Alignment for Multi-Task Learning (CVPR 2023), with the smallest σ."""
    return aggregation.AlignedMTL()


def nash(rows: int) -> Aggregator:
    """Navon et al.: Multi-Task Learning as a Bargaining Game (ICML 2022): GᵀG α = 1/α, solved anew at every step.

    As in the authors' code: the solver begins at the last step's α and falls back on it where it fails, and a combined
    gradient longer than 1 is shortened to 1.
    """
    return NashMTL(rows)


def config(rows: int) -> Aggregator:
    """Liu, Chu, Thuerey: ConFIG (ICLR 2025): the direction with equal cosines to all gradients.

    Its length is the sum of the gradients' projections on it.
    """
    return aggregation.ConFIG()


class NashMTL(aggregation.NashMTL):
    """torchjd's, which counts where it found no solution, and goes on where it was when it is pickled.

    What it holds of cvxpy is numbered per process: in another one the numbers of a loaded problem would be given again.
    So the weights are kept, which the next solution begins at, and the problem is stated anew.
    """

    def __init__(self, rows: int) -> None:
        super().__init__(rows)
        self.unsolved = 0
        """Steps whose weights are more than a tenth off GᵀG α = 1/α: mostly the last step's, which it falls back on."""

    def forward(self, matrix: Tensor, /) -> Tensor:
        if len(matrix) == 1:  # whose solution is 1 over its length; cvxpy knows no products of 1 × 1 matrices
            return torch.nn.functional.normalize(matrix[0], dim=0)
        with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
            warnings.filterwarnings("ignore", message="You are solving a parameterized problem that is not DPP")
            combined = super().forward(matrix)
        weights = torch.as_tensor(self.weighting.prvs_alpha, dtype=matrix.dtype, device=matrix.device)
        products = weights * (matrix @ (matrix.mT @ weights))
        self.unsolved += not products.min() > 0.9 * products.max()
        return combined

    def __reduce__(self) -> tuple[Any, ...]:
        return _resumed_nash, (self.n_tasks, self.weighting.prvs_alpha, self.unsolved)


def _resumed_nash(rows: int, weights: Any, unsolved: int) -> NashMTL:
    aggregator = NashMTL(rows)
    aggregator.weighting.prvs_alpha, aggregator.unsolved = weights, unsolved
    return aggregator


class Aggregated(Combination):
    """An aggregator combines the tasks' gradients of the parameters that they share; the others get their task's.

    Shared is what ``model.shared_parameters()`` says, of which the frozen ones take no part, nor those without a
    gradient of any task, whose ``.grad`` stays None. Tasks are differentiated one after the other, shared and own
    parameters in one backward pass: as many passes as tasks. Aggregators that draw do so from torch's global generator.

    A task whose gradient is exactly zero, such as one without labels in the batch, takes no part in the step: the
    aggregator gets the gradients of the others. The shortest convex combination, for one, would else be no step at all.

    The gradients are scaled to an overall norm of about 1 before, by a power of two, and back after: torchjd takes
    gradients for zero where CAGrad's squares sum up to less than 0.0001.

    Args:
        make: the aggregator.
        degree: how its result scales with the gradients: 1, or 0 where it does not.

    Raises:
        FloatingPointError: at a step, the gradient of a task is not finite, or the aggregator failed on finite ones or
            made something else of them; the message names the task, or the aggregator.
    """

    one_device_only = "it combines whole gradients of the tasks, before devices could average theirs"

    def __init__(self, tasks: Tasks, make: Maker, degree: int = 1) -> None:
        super().__init__(tasks)
        self.make, self.degree = make, degree
        self.aggregators: dict[tuple[str, ...], Aggregator] = {}
        """By the tasks that take part: some keep a state for each of them."""

    def backward(self, model: nn.Module, losses: dict[str, Tensor]) -> None:
        shared = [parameter for parameter in model.shared_parameters() if parameter.requires_grad]
        rows: dict[str, list[Tensor | None]] = {}
        for position, (name, loss) in enumerate(losses.items(), 1):
            own = [parameter for parameter in model.task_parameters(name) if parameter.requires_grad]
            if not loss.requires_grad or not shared + own:
                continue
            gradients = torch.autograd.grad(loss, shared + own, retain_graph=position < len(losses), allow_unused=True)
            rows[name] = list(gradients[: len(shared)])
            for parameter, gradient in zip(own, gradients[len(shared) :], strict=True):
                parameter.grad = gradient
        used = [column for column in range(len(shared)) if any(row[column] is not None for row in rows.values())]
        if used:
            chosen = [shared[column] for column in used]
            self._aggregate(chosen, {name: [row[column] for column in used] for name, row in rows.items()})

    def facts(self) -> Facts:
        """Of Nash-MTL, the number of steps without a solution."""
        found = [aggregator for aggregator in self.aggregators.values() if isinstance(aggregator, NashMTL)]
        return {"unsolved_steps": sum(aggregator.unsolved for aggregator in found)} if found else {}

    def _aggregate(self, parameters: list[nn.Parameter], rows: Mapping[str, list[Tensor | None]]) -> None:
        matrix = _matrix(parameters, rows)
        norms = torch.linalg.vector_norm(matrix, dim=1)
        for name, norm in zip(rows, norms.tolist(), strict=True):
            if not norm < float("inf"):
                raise FloatingPointError(f"the gradient of {name!r} is not finite")
        names = [name for name, norm in zip(rows, norms.tolist(), strict=True) if norm]
        if not names:
            combined = torch.zeros_like(matrix[0])
        else:
            matrix = matrix if len(names) == len(rows) else matrix[norms > 0]
            exponent = torch.frexp(torch.linalg.vector_norm(norms)).exponent
            combined = torch.ldexp(self._combine(tuple(names), matrix.ldexp_(-exponent)), exponent * self.degree)
        pieces = combined.split([parameter.numel() for parameter in parameters])
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.grad = piece.view_as(parameter).to(parameter.dtype)

    def _combine(self, names: tuple[str, ...], matrix: Tensor) -> Tensor:
        aggregator = self.aggregators.get(names)
        if aggregator is None:
            aggregator = self.aggregators[names] = self.make(len(names))
        what = f"{self.make.__name__} of the gradients of {', '.join(names)}"
        try:
            combined = aggregator(matrix)
        except (SolverError, RuntimeError, ValueError, TypeError, ArithmeticError) as error:
            raise FloatingPointError(f"{what} failed: {error}") from error  # finite rows, so its solver's fault
        if not combined.isfinite().all():
            raise FloatingPointError(f"{what} is not finite")
        return combined


def _matrix(parameters: list[nn.Parameter], rows: Mapping[str, list[Tensor | None]]) -> Tensor:
    """(tasks, numbers in all parameters), zero where a task has no gradient."""
    sizes = [parameter.numel() for parameter in parameters]
    dtype = max((parameter.dtype for parameter in parameters), key=lambda dtype: torch.finfo(dtype).bits)
    matrix = parameters[0].new_zeros(len(rows), sum(sizes), dtype=dtype)
    for line, row in zip(matrix, rows.values(), strict=True):
        for piece, gradient in zip(line.split(sizes), row, strict=True):
            if gradient is not None:
                piece.copy_(gradient.reshape(-1))
    return matrix
