"""A shared backbone of which some parameters have a version per task, as in LoRA, BitFit, own norms and Recon.

The backbone runs once for every task, with that task's versions in place of its own parameters
(``torch.func.functional_call``); everything else is shared.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..model import MultiTaskModel
from ..plan import choose
from ..randomness import random_state, wind_back


class Copy(nn.Module):
    """A task's own copy of a parameter, which starts equal to it and takes its place."""

    replaces = True

    def __init__(self, original: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(original.detach().clone())

    def forward(self, original: Tensor) -> Tensor:
        return self.value


class LowRank(nn.Module):
    """A task's own change of a shared weight, W + B A, which starts as W (Hu et al., ICLR 2022, with alpha = rank).

    Args:
        original: W, (out, in), which goes on training.
        rank: of A (rank, in), drawn as ``nn.Linear`` draws its weight, and B (out, rank), zeros.
        generator: a CPU generator that A is drawn by.
    """

    replaces = False

    def __init__(self, original: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = original.shape
        bound = 1 / math.sqrt(columns)
        drawn = torch.empty(rank, columns).uniform_(-bound, bound, generator=generator)
        self.down = nn.Parameter(drawn.to(original))
        self.up = nn.Parameter(original.new_zeros(rows, rank))

    def forward(self, original: Tensor) -> Tensor:
        return original + self.up @ self.down


Versions = Mapping[str, Mapping[str, Copy | LowRank]]
"""``{task: {name of a parameter of the backbone: its version}}``; every task has the same names."""


class PerTask(nn.Module):
    """A multi-task model whose backbone has a version of some parameters for every task.

    It takes and returns what a ``MultiTaskModel`` does, and predicts at first exactly what the given one predicts,
    in training too: every task's run draws the same random numbers. Where heads draw some, as those with dropout do,
    every head draws as the first one, and in training only the first task's predictions are those of the given model.
    A parameter that all tasks have a copy of is used by none of them any more: it is *retired*, which is to say frozen,
    and neither shared nor any task's.

    Args:
        model: with a head per task, which this one keeps and trains.
        versions: of parameters of ``model.backbone``, for all of its tasks.

    Raises:
        ValueError: the model has a decoder that reads all tasks at once, or a batch norm in its backbone, whose
            statistics every task's run would update.
    """

    def __init__(self, model: MultiTaskModel, versions: Versions) -> None:
        super().__init__()
        if model.decoder is not None:
            raise ValueError("a version per task needs a model with a head per task and no decoder")
        for name, module in model.backbone.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                raise ValueError(f"the backbone's {name!r} is a batch norm, whose statistics every task would update")
        self.model = model
        self.names = tuple(versions[model.tasks[0]])
        self.retired = tuple(name for name, version in versions[model.tasks[0]].items() if version.replaces)
        for name in self.retired:
            model.backbone.get_parameter(name).requires_grad_(False)
        # a module's name holds no dots
        self.versions = nn.ModuleDict(
            {task: nn.ModuleDict({n.replace(".", "/"): v for n, v in versions[task].items()}) for task in model.tasks}
        )

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.model.tasks

    def values(self, task: str) -> dict[str, Tensor]:
        """``{name: value}`` of the parameters of the backbone that ``task`` has versions of."""
        versions = self.versions[task].values()  # type: ignore[operator]  # of a ModuleDict
        return {
            name: version(self.model.backbone.get_parameter(name))
            for name, version in zip(self.names, versions, strict=True)
        }

    def forward(self, x: Any, tasks: str | Sequence[str] | None = None) -> dict[str, Any]:
        """``{task: prediction}`` of a task's name or several, None for all, in the order asked for."""
        predictions: dict[str, Any] = {}
        state = random_state()
        for task in choose(tasks, self.tasks):
            wind_back(state)
            values = {f"backbone.{name}": value for name, value in self.values(task).items()}
            predictions |= functional_call(self.model, values, (x,), {"tasks": task})
        return predictions

    def shared_parameters(self) -> list[nn.Parameter]:
        """All that several tasks use: without the retired ones."""
        retired = {id(self.model.backbone.get_parameter(name)) for name in self.retired}
        return [parameter for parameter in self.model.shared_parameters() if id(parameter) not in retired]

    def task_parameters(self, task: str) -> list[nn.Parameter]:
        """Those of a task's head and versions."""
        return [*self.model.task_parameters(task), *self.versions[task].parameters()]

    def parameter_groups(self, lr: float = 2e-5, weight_decay: float = 1e-6) -> list[dict[str, Any]]:
        """For an optimizer; like what ``dtme.expand`` adds, versions are not decayed."""
        base = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return [
            {"params": base, "lr": lr, "weight_decay": weight_decay},
            {"params": list(self.versions.parameters()), "lr": lr, "weight_decay": 0.0},
        ]

    def added(self) -> int:
        """New parameters, of all tasks together."""
        return sum(parameter.numel() for parameter in self.versions.parameters())

    def num_retired(self) -> int:
        """Parameters of the backbone that no task uses any more, by which the model is smaller."""
        return sum(self.model.backbone.get_parameter(name).numel() for name in self.retired)


def with_copies(model: MultiTaskModel, names: Iterable[str]) -> PerTask:
    """``model`` with a copy per task of the named parameters of its backbone."""
    names = list(names)
    copies = {task: {name: Copy(model.backbone.get_parameter(name)) for name in names} for task in model.tasks}
    return PerTask(model, copies)


def with_low_rank(model: MultiTaskModel, ranks: Mapping[str, int], seed: int) -> PerTask:
    """``model`` with a change per task of the named weights (out, in) of its backbone, each of its rank."""
    generator = torch.Generator().manual_seed(seed)
    changes = {
        task: {name: LowRank(model.backbone.get_parameter(name), r, generator) for name, r in ranks.items()}
        for task in model.tasks
    }
    return PerTask(model, changes)
