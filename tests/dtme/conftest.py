"""Fixtures: small multi-task models on real transformers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dtme
from tests.dtme.clients import CLIENTS, TASKS, WIDTH, concatenated, make_input, mixed_plan


@pytest.fixture
def build() -> Callable[..., tuple[dtme.MultiTaskModel, Any]]:
    """build(client, tasks) → (MultiTaskModel in float64 and evaluation mode, an input)."""

    def make(
        name: str = "transformers ViT", tasks: tuple[str, ...] = TASKS, seed: int = 0
    ) -> tuple[dtme.MultiTaskModel, Any]:
        torch.manual_seed(seed)
        model = dtme.MultiTaskModel(CLIENTS[name](), {task: nn.Linear(WIDTH, 2 + i) for i, task in enumerate(tasks)})
        with torch.no_grad():  # weights large enough that attention is far from uniform
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        return model.double().eval(), make_input(name)

    return make


@pytest.fixture
def randomise() -> Callable[[nn.Module], None]:
    """Move what expand added away from the identity."""

    def move(model: nn.Module) -> None:
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".dtme." in name:
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))

    return move


@pytest.fixture
def naive() -> Callable[..., Any]:
    """naive(model, added, task, x): a plain model's prediction with an expanded one's parameters concatenated in."""

    def predict(model: dtme.MultiTaskModel, added: dict[str, Tensor], task: str, x: Any) -> Tensor:
        with concatenated(model.backbone, added, task):
            return model(x, task)[task]

    return predict


@pytest.fixture
def expanded(build, randomise) -> Callable[..., tuple[dtme.MultiTaskModel, Any]]:
    """expanded(client) → a model expanded by ``mixed_plan``, away from the identity, and an input."""

    def make(client: str = "transformers ViT") -> tuple[dtme.MultiTaskModel, Any]:
        model, x = build(client)
        dtme.expand(model, mixed_plan(model))
        randomise(model)
        return model, x

    return make


@pytest.fixture
def problem(build):
    """problem(client) → model, loader of three uneven batches, of which some labels give no gradient at all."""

    def make(client="own, generic seam"):
        model, _ = build(client)
        generator = torch.Generator().manual_seed(3)
        loader = []
        for i, rows in enumerate((3, 2, 1)):
            x = make_input(client, rows, seed=i)
            tokens = model.extract(x, TASKS)["depth"]
            target = {
                t: torch.randn(*tokens.shape[:2], 2 + k, generator=generator, dtype=torch.float64)
                for k, t in enumerate(TASKS)
            }
            loader.append((x, target))
        return model, loader

    return make
