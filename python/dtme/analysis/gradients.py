"""Every task's gradient at the input of every block, and which tasks reach which block."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..layouts import Layout
from .capture import Entered

NO_GRADIENT = (
    "no gradient reaches them. (Activation checkpointing hides them with use_reentrant=True, and does not with "
    "use_reentrant=False.)"
)


def token_gradients(
    tasks: Sequence[str],
    entered: Sequence[list[Entered]],
    outputs: Sequence[Tensor],
    seeds: Sequence[Sequence[Tensor | None]],
    sharing: Sequence[Layout] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Differentiate ``outputs`` for each of K tasks.

    Args:
        entered: what entered each of D blocks.
        seeds: per task its gradients at ``outputs``.
        sharing: the streams that an expanded backbone has before each block, also where it ran once for every task:
            what a decoder reads of other tasks depends on the tokens that they share. None where nothing is expanded.

    Returns:
        Per block (K, B, N, p), of each task in its own stream if it has one; and (D, K) bool, whether the task
        reaches the block at all, be its gradient zero. One that uses the tokens beside the block only, as the decoders
        of other tasks do, does not reach it.

    Raises:
        ValueError: a task reaches no block.
    """
    tokens = [tensor for runs in entered for run in runs for tensor in (run.tokens, run.inside)]
    shapes = [runs[0].in_streams(runs[0].tokens).shape[1:] for runs in entered]
    found = [runs[0].tokens.new_empty((len(tasks), *shape)) for runs, shape in zip(entered, shapes, strict=True)]
    reached = torch.zeros(len(entered), len(tasks), dtype=torch.bool)
    for i, (task, seed) in enumerate(zip(tasks, seeds, strict=True)):
        pairs = [(output, gradient) for output, gradient in zip(outputs, seed, strict=True) if gradient is not None]
        gradients: Sequence[Tensor | None] = [None] * len(tokens)
        if pairs:
            heads, starts = zip(*pairs, strict=True)
            last = i == len(tasks) - 1
            gradients = torch.autograd.grad(heads, tokens, starts, retain_graph=not last, allow_unused=True)
        rest = iter(gradients)
        for d, runs in enumerate(entered):
            for run in runs:
                gradient, inside = next(rest), next(rest)
                if gradient is None or inside is None:
                    continue
                together = sharing[d].stream_of(task) if sharing is not None and run.layout.tasks else ()
                for stream, part in zip(run.layout.streams, run.in_streams(gradient), strict=True):
                    if run.layout.tasks and set(together).isdisjoint(stream):
                        continue
                    if reached[d, i]:
                        found[d][i] += part
                    else:
                        found[d][i] = part
                    reached[d, i] = True
            if not reached[d, i]:
                found[d][i] = 0
        if not reached[:, i].any():
            raise ValueError(f"the loss of task {task!r} is not connected to the blocks: {NO_GRADIENT}")
    return found, reached


def tokens_of_tasks(tasks: Sequence[str], runs: Sequence[Entered]) -> list[Tensor]:
    """Of each task the tokens of its stream at one block, (B, N, p)."""
    of_task: dict[str, Tensor] = {}
    for run in runs:
        streams = run.in_streams(run.tokens)
        for stream, part in zip(run.layout.streams, streams, strict=True):
            of_task |= dict.fromkeys(stream or tasks, part)
    return [of_task[task] for task in tasks]


def any_gradient(gradients: Sequence[Tensor], reached: Tensor) -> Tensor:
    """(K,) bool: whether a task's gradient has a non-zero entry, looked for where it begins.

    Args:
        gradients, reached: as ``token_gradients`` returns them.
    """
    nearest = [max(row.nonzero().flatten().tolist(), default=0) for row in reached.T]
    return torch.stack([gradients[d][i].any() for i, d in enumerate(nearest)])


def nothing_shared(blocks: Sequence[str], tasks: Sequence[str], reached: Tensor) -> str:
    """Why no two tasks were compared anywhere: what to tell whoever asked."""
    if (reached.sum(1) > 1).any():
        return (
            "no two tasks have a gradient at the same token, so that none can conflict: does every image have labels "
            "of one task only?"
        )
    reaching = [[task for task, is_in in zip(tasks, row, strict=True) if is_in] for row in reached.tolist()]
    shown = [
        f"{block!r} by {' and '.join(map(repr, some)) or 'none'}" for block, some in zip(blocks, reaching, strict=True)
    ]
    shown = [*shown[:4], "…"] if len(shown) > 5 else shown
    return (
        f"no block is reached by the losses of two tasks, so that none can conflict ({', '.join(shown)}): name the "
        "blocks that the tasks share by blocks="
    )
