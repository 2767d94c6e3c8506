"""Where in one picture or sentence do two tasks fight?"""

from collections.abc import Callable, Mapping
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from .analysis import prepared
from .analysis.arguments import check_model
from .analysis.losses import Step
from .analysis.masks import TokenMask
from .analysis.passes import Options
from .blocks import find_blocks
from .expansion import check_module
from .interrupts import Deferred
from .ranks import Ranks
from .report import ConflictReport
from .sharded import is_sharded
from .streams import is_expanded
from .trees import to_device
from .wrappers import backbone_of, resolve

Maps = dict[tuple[str, str], Tensor]


def conflict_map(
    model: nn.Module,
    batch: Any,
    losses: Mapping[str, Callable[[Any, Any], Tensor]] | Step,
    report: ConflictReport,
    block: str,
    space: str = "range",
    *,
    token_mask: TokenMask | None = None,
) -> Maps:
    """The cosine of every two tasks' gradients at each token of a batch, in one space of one block.

    Args:
        model, losses: as for ``analyze``, of the report's tasks.
        batch: one batch, as the loader yields it.
        report: whose bases and ranks say what the space is: of this model, from ``analyze`` or saved with its bases.
        block: its name, out of ``report.blocks``.
        space: ``"range"`` or ``"null"``.
        token_mask: ``f(batch) -> (B, N) bool``, the tokens that count; None takes the 2-D ``attention_mask`` of N
            columns of an input that is a mapping, if it has one.

    Returns:
        ``{(task, other task): (B, N) float64}`` in the report's order of tasks, for the tasks that have labels in the
        batch, on the CPU; -1 is the fiercest
        conflict. NaN where a task's gradient has no part in the space, and for tokens that do not count. N are all
        tokens that enter the block, class and register tokens included. The model is left exactly as it was.

    Raises:
        ValueError: an unknown block or space; a report without bases, or of another model; losses of other tasks; a
            mask of another shape, or that hides every token; or as ``analyze`` for the batch.
        TypeError: ``model`` is no module, or ``report`` no report.
        RuntimeError: ``model`` is shared among processes, by FSDP2 say.
    """
    check_module(model)
    if not isinstance(report, ConflictReport):
        raise TypeError(f"report must be a ConflictReport, got {type(report).__name__}")
    if is_sharded(model):
        raise RuntimeError(
            f"{type(model).__name__} is shared among processes, and a map is made by one alone: make it of a plain "
            "model, such as one that from_pretrained loads"
        )
    basis, rank = _space(report, block, space)
    if isinstance(losses, Mapping) and set(losses) != set(report.tasks):
        raise ValueError(f"losses must be of the report's tasks {list(report.tasks)}, got {list(losses)}")
    tasks, gradients, counts = _gradients_at(model, batch, losses, report, block, token_mask)
    if len(tasks) < 2 or not set(tasks) <= set(report.tasks):
        raise ValueError(
            f"a batch must have losses of two of the report's tasks {list(report.tasks)} at least, and of no others; "
            f"this one has those of {list(tasks)}"
        )
    if gradients.shape[-1] != basis.shape[0]:
        raise ValueError(
            f"report is of another model: its basis of block {block!r} has {basis.shape[0]} channels, where the tokens "
            f"have {gradients.shape[-1]}"
        )
    cosines = _cosines(gradients, basis, rank, space)
    found: Maps = {}
    for one, other in combinations([task for task in report.tasks if task in tasks], 2):
        cosine = cosines[tasks.index(one), tasks.index(other)]
        found[one, other] = cosine if counts is None else cosine.masked_fill(~counts, torch.nan)
    return found


def _space(report: ConflictReport, block: str, space: str) -> tuple[Tensor, int]:
    if space not in ("range", "null"):
        raise ValueError(f"space must be 'range' or 'null', got {space!r}")
    if block not in report.blocks:
        raise ValueError(f"block must be one of the report's {list(report.blocks)}, got {block!r}")
    if report.bases is None:
        raise ValueError("report has no bases, as one loaded from a file: analyze again, or save(path, bases=True)")
    d = report.blocks.index(block)
    return report.bases[d], int(report.ranks[d])


def _gradients_at(
    model: nn.Module, batch: Any, losses: Any, report: ConflictReport, block: str, token_mask: TokenMask | None
) -> tuple[tuple[str, ...], Tensor, Tensor | None]:
    """The tasks, their gradients (K, B, N, p) at the input of ``block``, and the tokens that count, on the CPU."""
    check_model(model, losses)
    backbone = backbone_of(model)
    # which tasks share the tokens of a block depends on the blocks before it
    blocks = find_blocks(backbone, list(report.blocks) if is_expanded(backbone) else [block])
    options = Options((report.ratio,), token_mask=token_mask, max_tasks=len(report.tasks))
    with Deferred() as signals, prepared(model, losses, blocks, options, Ranks(None, signals, alone=True)) as analysis:
        batch = to_device(batch, analysis.device)
        mask = analysis.masks.of(batch)
        analysis.masks.note(mask)
        analysis.check_masks()
        found = analysis.gradients(batch)
        d = found.names.index(resolve([block], found.names)[block])
        gradients = found.gradients[d]
        counts = analysis.masks.at(mask, block, gradients.shape[1:])
    return found.started.tasks, gradients, None if counts is None else counts.cpu()


def _cosines(gradients: Tensor, basis: Tensor, rank: int, space: str) -> Tensor:
    """(K, K, B, N) float64 on the CPU, of gradients (K, B, N, p)."""
    rounding = 4 * torch.finfo(gradients.dtype).eps
    rotated = gradients.double() @ basis.to(gradients.device, torch.float64)
    part = rotated[..., :rank] if space == "range" else rotated[..., rank:]
    size = part.norm(dim=-1)
    # what rounding leaves of a gradient that has no part here points nowhere
    size = size.masked_fill(size <= rounding * rotated.norm(dim=-1), torch.nan)
    unit = part / size[..., None]
    return torch.einsum("ibnp,jbnp->ijbn", unit, unit).clamp(-1, 1).cpu()
