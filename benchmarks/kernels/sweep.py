"""Other tiles than those that ship: every candidate is our rival once more, with a launcher's choice replaced.

A launcher finds its tile by a function of its module, ``target``; the named tuple that it returns gets other fields.
What another version of a kernel calls its tile, or the fields of it, is one line of ``SWEEPS``.
"""

from collections.abc import Callable
from functools import cache
from pkgutil import resolve_name
from typing import Any, NamedTuple
from unittest import mock


class Sweep(NamedTuple):
    """Candidates for one choice."""

    report: str
    """The report whose rival it is: ``test_<report>``."""
    group: str
    """Only in the groups of that report whose name this regular expression matches."""
    target: str
    """The function that a launcher asks, as ``unittest.mock.patch`` names it."""
    when: Any
    """Only if this is the first argument that it is asked with; None: always."""
    fields: tuple[str, ...]
    values: tuple[tuple[Any, ...], ...]
    """One candidate each, in the order of the fields."""

    def names(self) -> dict[str, dict[str, Any]]:
        """{candidate: its fields}."""
        found = (dict(zip(self.fields, values, strict=True)) for values in self.values)
        return {" ".join(["ours:", *([self.when] if self.when else []), _text(fields)]): fields for fields in found}

    def patched(self, name: str, function: Callable[[], Any]) -> Callable[[], Any]:
        """The function, with this candidate chosen while it runs."""
        module, attribute = self.target.rsplit(".", 1)
        fields = self.names()[name]

        def run() -> Any:
            original = getattr(resolve_name(module), attribute)

            def choose(*args: Any, **options: Any) -> Any:
                tile = original(*args, **options)
                return tile if self.when not in (None, args[0]) else tile._replace(**fields)

            with mock.patch(self.target, choose):
                return function()

        return run


def _text(fields: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in fields.items())


TILE = ("queries", "keys", "warps", "stages")
ATTENTION, CONFLICTS = "dtme_kernels.attention.kernel.tile", "dtme_kernels.conflicts.kernel.tile"
COVARIANCE, MODULATION = "dtme_kernels.covariance.kernel.tile", "dtme_kernels.modulation.kernel.tile"
SWEEPS = (
    Sweep(
        *("attention", "backward$", ATTENTION, "key gradients", TILE),
        ((64, 64, 4, 2), (64, 64, 8, 2), (32, 128, 8, 2), (64, 128, 8, 3), (128, 64, 8, 2), (128, 128, 8, 2)),
    ),
    Sweep(
        *("attention", "backward$", ATTENTION, "query gradients", TILE),
        ((64, 64, 4, 2), (64, 128, 4, 2), (128, 32, 8, 2), (128, 64, 8, 3), (64, 64, 4, 3)),
    ),
    Sweep(
        *("attention", "forward$", ATTENTION, "forward", TILE),
        ((128, 64, 4, 3), (128, 128, 8, 2), (64, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 4)),
    ),
    Sweep(
        *("conflicts", "512 px$", CONFLICTS, "rotation", ("coordinates", "channels", "warps", "stages")),
        ((64, 32, 8, 3), (64, 32, 4, 2), (64, 64, 4, 2), (64, 16, 4, 4), (32, 64, 4, 3), (32, 32, 4, 4)),
    ),
    Sweep(  # how many programs share the rows
        *("modulate_layer_norm", "backward$", "dtme_kernels.modulation.kernel.chip", None, ("multiprocessors",)),
        ((66,), (264,), (396,)),
    ),
    Sweep(
        *("modulate_layer_norm", "backward$", MODULATION, "backward"),
        ("rows", "width", "warps", "resident"),
        ((1, 256, 8, 1), (2, 256, 4, 2), (2, 256, 8, 1), (4, 256, 8, 1)),
    ),
    Sweep(
        *("covariance", "512 px$", COVARIANCE, "covariance"),
        ("tokens", "promote", "stages"),
        ((32, 32, 3), (64, 8, 3), (64, 32, 3), (128, 8, 2), (64, 16, 2)),
    ),
)


@cache
def candidates(report: str = "", name: str = "") -> dict[str, Sweep]:
    """{candidate: its sweep} of a report, or of one name."""
    found = {candidate: sweep for sweep in SWEEPS if report in ("", sweep.report) for candidate in sweep.names()}
    return {candidate: sweep for candidate, sweep in found.items() if name in ("", candidate)}
