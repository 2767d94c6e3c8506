"""Forward and backward of all tasks of a model with half of its blocks expanded."""

from functools import cache, partial

import pytest
import torch

from .conftest import Shape
from .device import ON_GPU
from .race import Rival, compiled
from .vit import WHERE, concatenated, expanded_model, plain_model

RIVALS = ["concatenated", "concatenated, compiled", "ours, compiled", "ours"]
SHAPES = {"ViT-B, 512 px": Shape(6, 1024, 768, 12, tasks=5)} if ON_GPU else {"ViT-T, 224 px": Shape(4, 197, 192, 3)}


@pytest.mark.parametrize("where", WHERE)
def test_training_step(report, device, shape, where):
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    plain = plain_model(shape).to(device, dtype)
    expanded = expanded_model(plain, shape, where)
    x = torch.randn(shape.images, shape.tokens, shape.channels, device=device).to(dtype)

    def loop(predict):
        """Every task's forward on its own, one backward: what the rest of the model would wait for."""
        loss = sum(predict(plain, expanded, task, x).float().square().mean() for task in plain.heads)
        loss.backward()
        return loss.detach()

    def batched(model):
        loss = sum(prediction.float().square().mean() for prediction in model(x).values())
        loss.backward()
        return loss.detach()

    def make_rivals():
        compiled_loop, compiled_model = compiled(concatenated, None), compiled(expanded, None)
        functions = {
            "concatenated": lambda: loop(concatenated),
            "concatenated, compiled": lambda: loop(compiled_loop),
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
