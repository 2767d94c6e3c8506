"""The backbone of the reports that run a model: timm's blocks on tokens that are there already, plain or expanded."""

import copy

import torch
from torch import Tensor, nn

import dtme
from benchmarks.clients import import_torchvision

from .conftest import Shape


class Backbone(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        import_torchvision()
        from timm.models.vision_transformer import Block

        self.blocks = nn.Sequential(*(Block(shape.channels, shape.heads, qkv_bias=True) for _ in range(shape.blocks)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


def plain_model(shape: Shape, outputs: int = 4) -> dtme.MultiTaskModel:
    tasks = [f"task{i}" for i in range(shape.tasks)]
    return dtme.MultiTaskModel(Backbone(shape), heads={task: nn.Linear(shape.channels, outputs) for task in tasks})


# half of the blocks; where the last are chosen, all tasks share the tokens of the first
WHERE = {"every second block": lambda count: range(0, count, 2), "last half": lambda count: range(count // 2, count)}


def expanded_model(model: dtme.MultiTaskModel, shape: Shape, where: str) -> dtme.MultiTaskModel:
    """A copy with half of the blocks modulated and expanded for every task, away from the identity."""
    blocks = [f"blocks.{i}" for i in WHERE[where](shape.blocks)]
    chosen = dict.fromkeys(blocks, tuple(model.heads))
    plan = dtme.ExpansionPlan(tuple(model.heads), shape.task_tokens, chosen, chosen)
    model = dtme.expand(copy.deepcopy(model), plan)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".dtme." in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def concatenated(plain: dtme.MultiTaskModel, expanded: dtme.MultiTaskModel, task: str, x: Tensor) -> Tensor:
    """One task's prediction as one would write it: modulate, append the task's tokens, run the block, drop them."""
    for block, other in zip(plain.backbone.blocks, expanded.backbone.blocks, strict=True):
        num_tokens = x.shape[1]
        if hasattr(other, "dtme") and task in other.dtme.tokens:
            x = x * other.dtme.weight[task] + other.dtme.bias[task]
            x = torch.cat([x, other.dtme.tokens[task].expand(len(x), -1, -1)], 1)
        x = block(x)[:, :num_tokens]
    return plain.heads[task](x)
