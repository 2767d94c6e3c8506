"""All situations: the files that register them, in the order of the table."""

import importlib
from collections.abc import Iterator

from .situation import Situation, situations

FILES = (
    "mixed_rows",
    "trainers",
    "distributed",
    "gradients",
    "adapters",
    "quantised",
    "generation",
    "exported",
    "saved",
)


def rows() -> Iterator[Situation]:
    for name in FILES:
        importlib.import_module(f"{__package__}.{name}")
    yield from situations()
