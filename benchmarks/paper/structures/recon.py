"""Recon (Shi et al., ICLR 2023): layers in which gradients of tasks conflict the most become every task's own."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor, nn

import dtme
from dtme.randomness import put_back
from dtme.rivals.versions import with_copies

from ..arms import Batch, Facts, Setting
from ..tasks import Task

SEVERITY = -0.02
"""S of its NYUv2 experiment: a pair of tasks conflicts where the cosine of its gradients is below."""
SHARE = 15 / 72
"""Of the layers that become tasks' own: 15 of the 72 shared layers of its NYUv2 network, MTAN."""


@dataclass(frozen=True)
class Recon:
    """Turn the layers with the highest conflict scores into one per task, each a copy to begin with.

    A layer is a module of the backbone with parameters of its own, all of them together. Its score is the number of
    pairs of tasks, over batches, whose gradients have a cosine below ``severity``. Recon takes the batches of the first
    part of a joint training; here they are those that an analysis of ours reads, all at the weights of the moment, so
    that both look at the same data. It is as large as its share of the layers makes it, and not of equal size.

    Args:
        share: of the layers that become tasks' own, in (0, 1].
        severity: S, in [-1, 0] as in the paper.
    """

    share: float = SHARE
    severity: float = SEVERITY

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be in (0, 1], got {self.share!r}")
        if not -1 <= self.severity <= 0:
            raise ValueError(f"severity must be a cosine in [-1, 0], got {self.severity!r}")

    def apply(self, setting: Setting) -> tuple[nn.Module, Facts]:
        scores = conflict_scores(setting.model, setting.loader, setting.tasks, self.severity)
        ranked = sorted(scores, key=lambda layer: -scores[layer])  # of equal scores, the earlier layer first
        chosen = ranked[: max(1, round(self.share * len(ranked)))]
        layers = _layers(setting.model.backbone)
        model = with_copies(setting.model, [name for layer in scores if layer in chosen for name in layers[layer]])
        facts = {
            "added": model.added(),
            "retired": model.num_retired(),
            "chosen": chosen,
            "severity": self.severity,
            "scores": scores,
        }
        return model, facts


def conflict_scores(
    model: dtme.MultiTaskModel, loader: Iterable[Batch], tasks: Mapping[str, Task], severity: float
) -> dict[str, int]:
    """``{layer: pairs of tasks, over all batches, whose gradients of the layer have a cosine below severity}``.

    Of layers of the backbone that train and that some loss reaches, in their order. A pair does not count where one of
    the two gradients is zero, as where nothing is labelled. The model is left as it was.

    Raises:
        ValueError: the loader is empty; a loss is not finite.
    """
    layers = _layers(model.backbone)
    parameters = {name: model.backbone.get_parameter(name) for names in layers.values() for name in names}
    scores: dict[str, int] = dict.fromkeys(layers, 0)
    reached: set[str] = set()
    is_empty = True
    with put_back(model), torch.enable_grad():
        model.eval()
        for x, labels in loader:
            is_empty = False
            predictions = model(x)
            gradients = []
            for task in model.tasks:
                loss = tasks[task].loss(predictions[task], labels[task])
                if not loss.isfinite():
                    raise ValueError(f"the loss of {task!r} is {loss.item()}: Recon's scores are not defined")
                found = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, materialize_grads=True)
                gradients.append(dict(zip(parameters, found, strict=True)))
            for layer, names in layers.items():
                rows = torch.stack([torch.cat([of_task[name].flatten() for name in names]) for of_task in gradients])
                scores[layer] += _conflicts(rows, severity)
                if rows.any():
                    reached.add(layer)
    if is_empty:
        raise ValueError("the loader gave no batch to measure Recon's conflict scores on")
    return {layer: score for layer, score in scores.items() if layer in reached}


def _layers(backbone: nn.Module) -> dict[str, list[str]]:
    """``{module: names of the parameters that it holds itself and that train}``, each parameter once."""
    layers: dict[str, list[str]] = {}
    for name, parameter in backbone.named_parameters():
        if parameter.requires_grad:
            layers.setdefault(name.rpartition(".")[0], []).append(name)
    return layers


def _conflicts(gradients: Tensor, severity: float) -> int:
    """Pairs of rows of (K, n) whose cosine is below ``severity``; rows of zeros are in none."""
    gradients = gradients.double()
    norms = gradients.norm(dim=1, keepdim=True)
    cosines = (gradients / norms) @ (gradients / norms).T  # 0 / 0 is NaN, and NaN is below nothing
    return sum(bool(cosines[i, j] < severity) for i, j in combinations(range(len(gradients)), 2))
