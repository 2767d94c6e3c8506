"""One task's prediction by a model whose every second block is expanded, against the model that is not."""

from functools import cache, partial

import torch

from .conftest import Shape
from .device import ON_GPU
from .race import Rival, compiled
from .vit import concatenated, expanded_model, plain_model

RIVALS = ["plain", "plain, compiled", "concatenated", "exported", "ours, compiled", "ours"]
SHAPES = {"ViT-B, 224 px": Shape(64, 197, 768, 12), "ViT-B, 512 px": Shape(6, 1024, 768, 12)}
if not ON_GPU:
    SHAPES = {"ViT-T, 224 px": Shape(8, 197, 192, 3), "ViT-B, 224 px": Shape(2, 197, 768, 12)}


def test_inference(report, device, shape):
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    plain = plain_model(shape).to(device, dtype).eval()
    expanded = expanded_model(plain, shape, "every second block")
    x = torch.randn(shape.images, shape.tokens, shape.channels, device=device).to(dtype)
    task = next(iter(plain.heads))

    def make_rivals():
        single = cache(partial(expanded.export_task, task))
        ours_compiled, plain_compiled = compiled(expanded, None), compiled(plain, None)
        functions = {
            "plain": lambda: plain(x, task)[task],
            "plain, compiled": lambda: plain_compiled(x, task)[task],
            "concatenated": lambda: concatenated(plain, expanded, task, x),
            "exported": lambda: single()(x),
            "ours, compiled": lambda: ours_compiled(x, task)[task],
            "ours": lambda: expanded(x, task)[task],
        }

        @torch.no_grad()
        def check(name):
            want = functions["concatenated"]().float()
            error = (functions[name]().float() - want).abs().max() / want.abs().max()
            assert error < (0.1 if ON_GPU else 1e-4), f"{error:.2e}"

        rivals = {name: Rival(torch.no_grad()(function)) for name, function in functions.items()}
        for name in ("exported", "ours, compiled", "ours"):
            rivals[name] = rivals[name]._replace(check=partial(check, name))
        return rivals

    rows, p = shape.images * shape.tokens, shape.channels
    operations = shape.blocks * rows * (24 * p * p + 4 * shape.tokens * p)
    report(make_rivals, moved=sum(w.nbytes for w in plain.backbone.parameters()), operations=operations)
