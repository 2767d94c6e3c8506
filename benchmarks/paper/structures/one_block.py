"""One block at a time: what a plan of a single block really gains, beside what would have predicted it."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

import dtme
from dtme.blocks import find_blocks
from dtme.randomness import put_back

from ..arms import Batch, Facts, Setting
from ..tasks import Tasks
from .placements import rates_of

BATCHES = 8
"""That the norms of gradients are measured on."""


@dataclass(frozen=True)
class OneBlock:
    """Every task's own modulation, or task tokens, in one block and nowhere else.

    Args:
        kind: ``"modulation"`` or ``"expansion"``.
        index: of the block, from 0.

    Raises:
        ValueError: when applied, the backbone has no such block.
    """

    kind: str
    index: int

    def apply(self, setting: Setting) -> tuple[nn.Module, Facts]:
        if self.index >= len(setting.blocks):
            raise ValueError(f"an arm of block {self.index} needs that block: the backbone has {len(setting.blocks)}")
        chosen = {setting.blocks[self.index]: setting.model.tasks}
        modulation, expansion = (chosen, {}) if self.kind == "modulation" else ({}, chosen)
        widths = dict.fromkeys(setting.blocks, setting.width)
        plan = dtme.ExpansionPlan(setting.model.tasks, setting.num_tokens, modulation, expansion, widths)
        norms = gradient_norms(setting.model, setting.loader, setting.tasks)
        report = rates_of(setting.report) | {"gradient_norms": norms.tolist()}
        facts = {"added": plan.added_parameters(), "compute": plan.compute(), "plan": plan.as_dict(), "report": report}
        return dtme.expand(setting.model, plan), facts


def gradient_norms(model: dtme.MultiTaskModel, loader: Iterable[Batch], tasks: Tasks) -> Tensor:
    """(D,) float64: per block, the mean over tokens of Σ_i ‖∂L_i / ∂(block input)‖, in the first ``BATCHES`` batches.

    The model is left as it was.
    """
    inputs: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        tokens = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()
        inputs.append(tokens)
        return (tokens, *args[1:])

    blocks = find_blocks(model.backbone).values()
    total = torch.zeros(len(blocks), dtype=torch.float64)
    count = 0
    with put_back(model), torch.enable_grad():
        model.eval()
        handles = [block.register_forward_pre_hook(keep) for block in blocks]
        try:
            for x, labels in islice(loader, BATCHES):
                inputs.clear()
                predictions = model(x)
                for name in model.tasks:
                    loss = tasks[name].loss(predictions[name], labels[name])
                    gradients = torch.autograd.grad(loss, inputs, retain_graph=True, materialize_grads=True)
                    total += torch.stack([gradient.double().norm(dim=-1).sum() for gradient in gradients]).cpu()
                count += inputs[0].shape[:-1].numel()
        finally:
            for handle in handles:
                handle.remove()
    return total / count
