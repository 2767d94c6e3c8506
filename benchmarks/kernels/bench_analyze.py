"""A whole analysis, both passes and the eigen-decompositions, of a backbone in the dtype that it is trained in."""

from functools import partial

import torch
import torch.nn.functional as F

import dtme
from dtme_kernels import split_token_space

from .bench_conflicts import printed
from .conftest import Shape
from .device import ON_GPU
from .race import Rival
from .vit import plain_model

RIVALS = ["printed", "ours"]
SHAPES = {"ViT-B, 512 px": Shape(6, 1024, 768, 12, tasks=5)} if ON_GPU else {"ViT-T, 224 px": Shape(4, 197, 192, 3)}
BATCHES = 2


def by_the_paper(model, loader, losses, ratio=100.0):
    """One backward pass a task that keeps the blocks' gradients, then Eq. 4; weights get their gradients too."""
    backbone, tasks = model.backbone, list(losses)
    kept = []
    hooks = [b.register_forward_pre_hook(lambda _, args: kept.append(args[0])) for b in backbone.blocks]
    covariance = [0.0] * len(hooks)
    for x, _ in loader:
        kept.clear()
        with torch.no_grad():
            backbone(x)
        for d, tokens in enumerate(kept):
            rows = tokens.flatten(0, 1).float()
            covariance[d] = covariance[d] + rows.T @ rows
    spaces = [split_token_space(c.double(), ratio) for c in covariance]
    counts = [0] * len(hooks)
    for x, targets in loader:
        kept.clear()
        features = backbone(x.requires_grad_())
        values = [losses[task](model.heads[task](features), targets[task]) for task in tasks]
        for tokens in kept:
            tokens.retain_grad()
        grads = []
        for value in values:
            value.backward(retain_graph=True)
            grads.append([tokens.grad for tokens in kept])
            for tokens in kept:
                tokens.grad = None
            model.zero_grad()
        for d, space in enumerate(spaces):
            stacked = torch.stack([own[d].flatten(0, 1) for own in grads])
            counts[d] = counts[d] + printed(stacked, space.basis.to(stacked.dtype), space.rank)
    for hook in hooks:
        hook.remove()
    return [count.cpu() for count in counts]


def test_analyze(report, device, shape):
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    model = plain_model(shape).to(device, dtype)
    losses = {task: lambda prediction, target: F.mse_loss(prediction.float(), target) for task in model.heads}
    size = shape.images, shape.tokens

    def make_rivals():
        loader = [
            (
                torch.randn(*size, shape.channels, device=device).to(dtype),
                {task: torch.randn(*size, 4, device=device) for task in losses},
            )
            for _ in range(BATCHES)
        ]
        arguments = model, loader, losses
        printed, ours = partial(by_the_paper, *arguments), partial(dtme.analyze, *arguments, progress=False)

        def check():
            found = ours()
            first, second = torch.triu_indices(shape.tasks, shape.tasks, 1)
            for d, counts in enumerate(printed()):
                own = torch.stack([found.range_counts[d][first, second], found.null_counts[d][first, second]])
                wrong = (counts - own).abs().sum() / (own.numel() * BATCHES * shape.images * shape.tokens)
                assert wrong <= (0.05 if ON_GPU else 1e-3), f"block {d}: {wrong:.2%} of the signs differ"

        return {"printed": Rival(printed), "ours": Rival(ours, check)}

    rows, p = BATCHES * shape.images * shape.tokens, shape.channels
    operations = shape.blocks * (rows * p * p + 2 * shape.tasks * rows * p * p)  # of the analysis, not of the model
    report(make_rivals, moved=shape.blocks * rows * p * (1 + shape.tasks) * 2, operations=operations, host=True)
