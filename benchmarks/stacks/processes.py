"""A small model and its data for several processes, and their gradients against those of one process."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import dtme
from benchmarks.clients import import_torchvision

TASKS = ("semseg", "depth", "normals")
WIDTH, LENGTH, ROWS = 24, 5, 3


class Attention(nn.Module):
    """Of as many heads as its projections are wide for, so that tensor parallelism may take some away."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (project(x).unflatten(-1, (-1, WIDTH // 4)).transpose(1, 2) for project in (self.q, self.k, self.v))
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(WIDTH), Attention(), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Somebody's own: tokens in, tokens out."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block() for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class Mixing(Transformer):
    """Rows of one batch are not independent: its tasks run one after the other."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks(x)
        return y - y.mean(0)


def timm_vit() -> nn.Module:
    import_torchvision()
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(img_size=16, patch_size=8, embed_dim=WIDTH, depth=3, num_heads=3, mlp_ratio=2)


def transformers_vit() -> nn.Module:
    import_torchvision()
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    return ViTModel(ViTConfig(**sizes, image_size=16, patch_size=8), add_pooling_layer=False)


def model_of(backbone: Callable[[], nn.Module] = Transformer, *, is_expanded: bool = True) -> Any:
    """A model in float64 whose weights are far from their first values; the same in every process."""
    torch.manual_seed(0)
    model = dtme.MultiTaskModel(backbone(), {task: nn.Linear(WIDTH, 2) for task in TASKS}).double()
    _move(model.parameters(), 0.2)
    if is_expanded:
        dtme.expand(model, plan_of(model))
        _move([parameter for name, parameter in model.named_parameters() if ".dtme." in name], 0.3)
    return model


def _move(parameters: Any, size: float) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(size * torch.randn_like(parameter))


def plan_of(model: Any) -> dtme.ExpansionPlan:
    """Streams part at different blocks, and not every task has every module."""
    first, second, third = blocks_of(model)
    modulation = {first: ("depth",), second: TASKS}
    return dtme.ExpansionPlan(TASKS, 2, modulation, {second: TASKS, third: ("depth", "normals")})


def blocks_of(model: Any) -> dict[str, nn.Module]:
    from dtme.blocks import find_blocks

    return find_blocks(model.backbone)


def input_of(backbone: Callable[[], nn.Module], number: int, rows: int = ROWS) -> Tensor:
    is_own = isinstance(backbone, type) and issubclass(backbone, Transformer)
    shape = (LENGTH, WIDTH) if is_own else (3, 16, 16)
    generator = torch.Generator().manual_seed(number)
    return torch.randn(rows, *shape, generator=generator, dtype=torch.float64)


def loss_of(predictions: Mapping[str, Tensor]) -> Tensor:
    return sum(((TASKS.index(task) + 1) * y.square().mean() for task, y in predictions.items()), torch.zeros(()))


def labelled(predictions: Mapping[str, Tensor], tasks: Sequence[str]) -> dict[str, Tensor]:
    """What a batch that has labels of some tasks only is trained on."""
    return {task: predictions[task] for task in tasks}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Whole ones, by the names that parameters have without wrappers."""
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    for part in ("_checkpoint_wrapped_module.", "module.", "_orig_mod."):
        found = {name.replace(part, ""): gradient for name, gradient in found.items()}
    return {name: whole(gradient) for name, gradient in found.items()}


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def mean_gradients(model: nn.Module, losses: Sequence[Callable[[nn.Module], Tensor]]) -> dict[str, Tensor]:
    """Of one process that does what every rank does, one after the other."""
    model = copy.deepcopy(model)
    for loss in losses:
        (loss(model) / len(losses)).backward()
    return gradients(model)


def largest_difference(found: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> float:
    """Relative to the largest entry of its tensor, or to 1e-3 of that of all: some are zero but for rounding.

    Infinite where names differ.
    """
    if found.keys() != want.keys():
        return float("inf")
    floor = 1e-3 * max(value.abs().max().item() for value in want.values())
    worst = [((found[name] - want[name]).abs().max() / want[name].abs().max().clamp(min=floor)).item() for name in want]
    return max(worst) if all(one == one for one in worst) else float("inf")


def on_all(value: float) -> float:
    """The largest of what the ranks have."""
    state = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(state, dist.ReduceOp.MAX)
    return state.item()


def alone(function: Callable[[], Any]) -> Any:
    """What a process does as if there were no others."""
    initialized = dist.is_initialized
    dist.is_initialized = lambda: False
    try:
        return function()
    finally:
        dist.is_initialized = initialized


def counts_that_differ(found: Any, want: Any) -> int:
    names = ("ranks", "range_counts", "null_counts", "valid_counts")
    differ = sum(int((getattr(found, name) != getattr(want, name)).sum()) for name in names)
    return differ + (found.skipped != want.skipped) + (found.num_samples != want.num_samples)
