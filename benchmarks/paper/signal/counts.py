"""Count the conflicts of a model image by image, in several views of the same gradients."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import dtme
from dtme.analysis import prepared
from dtme.analysis.passes import Analysis, Options
from dtme.analysis.spaces import Space, TokenSpaces
from dtme.blocks import find_blocks
from dtme.interrupts import Deferred
from dtme.ranks import Ranks

from ..arms import Batch
from ..tasks import Tasks, losses_of
from .measurement import OVER_IMAGES, OVER_TOKENS, OWN_SPACE, PERMUTED, TOKENS, VIEWS, Counts, Measurement

Spaces = Mapping[str, Space]


class Reading(NamedTuple):
    """What is read, and how."""

    loader: Iterable[Batch]
    """The same at every iteration."""
    batches: int
    """Of the loader."""
    batch: int
    """Images of each."""
    sample: int
    """Images of each of the samples that have a token space of their own: a multiple of ``batch``."""
    permuted: int
    """Images, the first ones, that are read once more with the labels of others."""
    ratios: tuple[float, ...]


def measure(
    model: dtme.MultiTaskModel, tasks: Tasks, reading: Reading, seed: int, share: float, tell: Callable[[int], None]
) -> Measurement:
    """All views of a model as it is evaluated; it is left as it was.

    Args:
        seed, share: what the file is to say of the model.
        tell: called with the number of images that were read, of both passes.

    Raises:
        ValueError: as ``dtme.analyze``.
    """
    options = Options(reading.ratios, max_tasks=len(tasks))
    blocks = find_blocks(model.backbone)
    with Deferred() as signals:
        ranks = Ranks(None, signals, alone=True)
        with prepared(model, losses_of(tasks), blocks, options, ranks) as analysis:
            whole, samples = _token_spaces(analysis, reading, ranks, tell)
            views = _count_all(analysis, reading, tuple(tasks), whole, samples, tell)
    names = tuple(whole)
    return Measurement(
        seed,
        share,
        tuple(tasks),
        names,
        reading.ratios,
        reading.batch,
        reading.sample,
        _ranks(whole),
        np.stack([_ranks(space) for space in samples]),
        views,
    )


def _ranks(spaces: Spaces) -> np.ndarray:
    """(R, D)."""
    return np.array([space.ranks for space in spaces.values()]).T


def _token_spaces(
    analysis: Analysis, reading: Reading, ranks: Ranks, tell: Callable[[int], None]
) -> tuple[Spaces, list[Spaces]]:
    """That of all images, and those of the samples."""
    whole, samples = TokenSpaces(reading.ratios, ranks), []
    batches = iter(reading.loader)
    for first in range(0, reading.batches, reading.sample // reading.batch):
        analysis.spaces = TokenSpaces(reading.ratios, ranks)
        for number, batch in enumerate(islice(batches, reading.sample // reading.batch), first):
            analysis.add_tokens(batch)
            tell((number + 1) * reading.batch)
        samples.append(analysis.spaces.split()[0])
        if whole.moments:
            for p, moment in analysis.spaces.moments.items():
                whole.moments[p].merge_(moment)
        else:
            whole.names, whole.widths, whole.moments = (
                analysis.spaces.names,
                analysis.spaces.widths,
                analysis.spaces.moments,
            )
    return whole.split()[0], samples


def _count_all(
    analysis: Analysis,
    reading: Reading,
    tasks: tuple[str, ...],
    whole: Spaces,
    samples: list[Spaces],
    tell: Callable[[int], None],
) -> dict[str, Counts]:
    analysis.spaces.names = list(whole)  # in the order they ran, which gradients are to have
    found: dict[str, list[list[Tensor]]] = {view: [] for view in VIEWS}
    for number, batch in enumerate(reading.loader):
        gradients = Gradients(analysis, batch, tasks)
        found[TOKENS].append(gradients.count(whole))
        found[OWN_SPACE].append(gradients.count(samples[number * reading.batch // reading.sample]))
        found[OVER_TOKENS].append(gradients.count(whole, over=2))
        found[OVER_IMAGES].append(gradients.count(whole, over=1))
        if number * reading.batch < reading.permuted:
            found[PERMUTED].append(Gradients(analysis, permuted(batch, tasks), tasks).count(whole))
        tell((reading.batches + number + 1) * reading.batch)
    return {view: _joined(parts) for view, parts in found.items() if parts}


def permuted(batch: Batch, tasks: Iterable[str]) -> Batch:
    """The images of a batch with the labels of others; of no two tasks with those of the same other image."""
    x, targets = batch
    return x, {task: targets[task].roll(by, 0) for by, task in enumerate(tasks, 1)}


def _joined(parts: list[list[Tensor]]) -> Counts:
    return Counts(*(torch.cat(arrays).numpy().astype(np.uint16) for arrays in zip(*parts, strict=True)))


class Gradients:
    """Of all tasks at the tokens of one batch."""

    def __init__(self, analysis: Analysis, batch: Any, tasks: tuple[str, ...]) -> None:
        found = analysis.gradients(batch)
        mask = analysis.masks.of(batch)
        self.of_block: dict[str, tuple[Tensor, Tensor]] = {}
        """Gradients (K, B, N, p), and the tokens (B, N) that count."""
        rows = [tasks.index(task) for task in found.started.tasks]
        for name, gradient in zip(found.names, found.gradients, strict=True):
            every = gradient.new_zeros(len(tasks), *gradient.shape[1:])
            every[rows] = gradient
            at = analysis.masks.at(mask, name, every.shape[1:])
            counts = every.new_ones(every.shape[1:3], dtype=torch.bool) if at is None else at.to(every.device)
            self.of_block[name] = every * counts[..., None], counts

    def count(self, spaces: Spaces, over: int | None = None) -> list[Tensor]:
        """The parts of ``Counts``, each (U, D, ...).

        Args:
            over: sum the gradients before the sign over this axis of (K, B, N, p), which does what an average would.
        """
        blocks = []
        for name, (gradients, counts) in self.of_block.items():
            if over is not None:
                gradients, counts = gradients.sum(over, keepdim=True), counts.any(over - 1, keepdim=True)
            blocks.append(count(gradients, spaces[name], counts))
        return [torch.stack(parts, 1).cpu() for parts in zip(*blocks, strict=True)]


def count(gradients: Tensor, space: Space, counts: Tensor) -> list[Tensor]:
    """Conflicts of one block.

    Args:
        gradients: (K, B, N, p), zero at tokens that do not count.
        counts: (B, N) bool, which tokens do.

    Returns:
        int64: negative and zero (B, P, R, 2), valid and absent (B, P).
    """
    largest = gradients.abs().amax(-1, keepdim=True)
    alive = largest.squeeze(-1) > 0
    # the sign of a product is not that of its factors where it underflows
    unit = gradients / torch.where(largest > 0, largest, 1)
    rotated = unit @ space.basis.to(unit)
    i, j = torch.triu_indices(len(gradients), len(gradients), 1)
    both = alive[i] & alive[j]
    dots = (rotated[i] * rotated[j]) @ _sides(space, rotated)
    dots = dots.unflatten(-1, (-1, 2))
    valid = (both & counts)[..., None, None]
    parts = [((dots < 0) & valid).sum(2), ((dots == 0) & valid).sum(2), (both & counts).sum(2), (~both & counts).sum(2)]
    return [part.transpose(0, 1) for part in parts]


def _sides(space: Space, like: Tensor) -> Tensor:
    """(p, 2 R) of 0 and 1: which coordinates make the range and the null space at each ratio."""
    at = torch.arange(like.shape[-1], device=like.device)
    columns: Iterator[Tensor] = (side for rank in space.ranks for side in (at < rank, at >= rank))
    return torch.stack([*columns], 1).to(like)
