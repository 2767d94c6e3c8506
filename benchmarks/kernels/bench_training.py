"""Forward and backward of all tasks of a model with half of its blocks expanded."""

from functools import cache, partial

import pytest
import torch

from . import invpt
from .conftest import Shape
from .device import ON_GPU
from .race import Rival, compiled
from .vit import WHERE, concatenated, expanded_model, plain_model

RIVALS = ["concatenated", "concatenated, compiled", "ours, compiled", "ours"]
SHAPES = {"ViT-B, 512 px": Shape(6, 1024, 768, 12, tasks=5)} if ON_GPU else {"ViT-T, 224 px": Shape(4, 197, 192, 3)}


def mean_square(predictions):
    return sum(prediction.float().square().mean() for prediction in predictions)


@pytest.mark.parametrize("where", WHERE)
def test_training_step(report, device, shape, where):
    def losses(predict, plain, expanded, x):
        """Every task's forward on its own, one backward: what the rest of the model would wait for."""
        return mean_square(predict(plain, expanded, task, x) for task in plain.heads)

    race(report, device, shape, where, plain_model(shape), concatenated, losses)


@pytest.mark.parametrize("where", WHERE)
def test_training_step_of_a_model_like_invpt(report, device, shape, where):
    def losses(predict, plain, expanded, x):
        return mean_square(predict(plain, expanded, x).values())

    race(report, device, shape, where, invpt.plain_model(shape), invpt.concatenated, losses)


def race(report, device, shape, where, plain, naive, losses):
    """Loss and gradients of all tasks, ours in one pass, against ``losses`` of what is ``naive``."""
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    plain = plain.to(device, dtype)
    expanded = expanded_model(plain, shape, where)
    x = torch.randn(shape.images, shape.tokens, shape.channels, device=device).to(dtype)

    def one_by_one(predict):
        loss = losses(predict, plain, expanded, x)
        loss.backward()
        return loss.detach()

    def batched(model):
        loss = mean_square(model(x).values())
        loss.backward()
        return loss.detach()

    def make_rivals():
        compiled_naive, compiled_model = compiled(naive, None), compiled(expanded, None)
        functions = {
            "concatenated": lambda: one_by_one(naive),
            "concatenated, compiled": lambda: one_by_one(compiled_naive),
            "ours, compiled": lambda: batched(compiled_model),
            "ours": lambda: batched(expanded),
        }
        tokens = expanded.backbone.blocks[shape.blocks - 2].dtme.tokens["task0"]

        def loss_and_gradient(function):
            for model in (plain, expanded):
                for parameter in model.parameters():
                    parameter.grad = torch.zeros_like(parameter)  # there before and after, in every rival's memory
            return function(), tokens.grad.clone()

        @cache
        def plainly():
            return loss_and_gradient(functions["concatenated"])

        def check(function):
            want, gradient = plainly()
            got, found = loss_and_gradient(function)
            torch.testing.assert_close(got, want, rtol=2e-2 if ON_GPU else 1e-4, atol=0)
            error = (found - gradient).abs().max() / gradient.abs().max()
            assert error < (0.1 if ON_GPU else 1e-3), f"{error:.2e}"

        return {name: Rival(function, partial(check, function)) for name, function in functions.items()}

    rows, p = shape.images * shape.tokens, shape.channels
    operations = 3 * shape.tasks * shape.blocks * rows * (24 * p * p + 4 * shape.tokens * p)
    report(make_rivals, moved=3 * sum(w.nbytes for w in plain.backbone.parameters()), operations=operations)
