"""Conflicts of one model at one moment of its training, image by image, and the file that keeps them."""

import hashlib
import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from dtme.files import write_beside

SPACES = ("range", "null")
TOKENS, OWN_SPACE, OVER_TOKENS, OVER_IMAGES, PERMUTED = (
    "tokens",
    "own space",
    "mean over tokens",
    "mean over images",
    "permuted labels",
)
VIEWS = {
    TOKENS: "every token's gradients, in the token space of all images: what the analysis counts",
    OWN_SPACE: "the same in the token space of the image's own sample",
    OVER_TOKENS: "the gradients of an image, averaged over its tokens before the sign",
    OVER_IMAGES: "the gradients at a position, averaged over the images of a batch before the sign",
    PERMUTED: "every token's gradients, every task with the labels of another image: no task knows of the other",
}
"""What is counted. Units are images, in the order they were read; of ``OVER_IMAGES``, batches."""


@dataclass(frozen=True)
class Counts:
    """Of U units, D blocks and P pairs of tasks, in the order of ``itertools.combinations``."""

    negative: np.ndarray
    """(U, D, P, R, 2) uint16: (token, pair)s whose dot product is < 0, at R ratios, in the range and the null space."""
    zero: np.ndarray
    """Likewise, exactly 0 although both gradients have a non-zero entry."""
    valid: np.ndarray
    """(U, D, P) uint16: (token, pair)s of which both gradients have a non-zero entry."""
    absent: np.ndarray
    """(U, D, P) uint16: those of which one has none: Algorithm 1's letter counts them as conflicts."""


@dataclass(frozen=True)
class Measurement:
    """One model, one moment."""

    seed: int
    share: float
    """Of the training that was behind it."""
    tasks: tuple[str, ...]
    blocks: tuple[str, ...]
    ratios: tuple[float, ...]
    batch: int
    """Images of a batch."""
    sample: int
    """Images of each of the samples that have a token space of their own."""
    ranks: np.ndarray
    """(R, D) int64, of the token spaces of all images."""
    sample_ranks: np.ndarray
    """(S, R, D) int64, of each sample's own."""
    views: Mapping[str, Counts]
    """By a key of ``VIEWS``."""

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        return tuple(combinations(self.tasks, 2))

    @property
    def digest(self) -> str:
        """First digits of the SHA-256 of everything that was counted."""
        sha = hashlib.sha256(_header(self).encode())
        for name, array in sorted(_arrays(self).items()):
            sha.update(f"{name} {array.dtype} {array.shape}".encode())
            sha.update(np.ascontiguousarray(array).tobytes())
        return sha.hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Whole or not at all."""

        def write(beside: Path) -> None:
            with beside.open("wb") as file:
                np.savez_compressed(file, header=np.array(_header(self)), **_arrays(self))  # type: ignore[arg-type]

        write_beside(path, write)

    @classmethod
    def load(cls, path: Path) -> "Measurement":
        """What ``save`` wrote.

        Raises:
            ValueError: it is something else; the message names it.
        """
        try:
            with np.load(path) as arrays:
                header = json.loads(str(arrays["header"]))
                views = {
                    view: Counts(*(arrays[f"{view}/{part}"] for part in Counts.__dataclass_fields__))
                    for view in header["views"]
                }
                ranks, sample_ranks = arrays["ranks"], arrays["sample_ranks"]
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise ValueError(f"{path} is no measurement: {error}. Remove it to measure again") from error
        return cls(
            header["seed"],
            header["share"],
            *(tuple(header[name]) for name in ("tasks", "blocks", "ratios")),
            header["batch"],
            header["sample"],
            ranks,
            sample_ranks,
            views,
        )


def _header(found: Measurement) -> str:
    names = ("seed", "share", "tasks", "blocks", "ratios", "batch", "sample")
    return json.dumps({name: getattr(found, name) for name in names} | {"views": list(found.views)})


def _arrays(found: Measurement) -> dict[str, np.ndarray]:
    arrays = {"ranks": found.ranks, "sample_ranks": found.sample_ranks}
    for view, counts in found.views.items():
        arrays |= {f"{view}/{part}": getattr(counts, part) for part in Counts.__dataclass_fields__}
    return arrays
