"""Numbers and tables as Markdown. What is not known is a dash."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import PurePath
from typing import Any

from dtme.comparison.statistics import Estimate

DASH = "–"


def plain(value: float, decimals: int, sign: bool = False) -> str:
    """A number; never "-0.00"."""
    if math.isnan(value):
        return DASH
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    value = round(value, decimals) + 0.0
    return f"{value:{'+' if sign and value else ''}.{decimals}f}"


def interval(e: Estimate, decimals: int, sign: bool = False, of: int | None = None) -> str:
    """Mean ± half-width of the 95 % interval; with how many numbers it is of, where these are not ``of``."""
    if not e.n:
        return DASH
    count = "" if of in (None, e.n) else f" ({e.n})"
    return f"{plain(e.mean, decimals, sign)} ± {plain(e.half_width, decimals)}{count}"


def bracket(of: Sequence[float] | None, digits: int = 2, times: float = 1, sign: bool = False) -> str:
    """A number and the ends of its interval, each ``times`` a factor; without ends that are NaN."""
    if of is None or math.isnan(of[0]):
        return DASH
    value, low, high = (plain(times * x, digits, sign) for x in of)
    return value if math.isnan(of[1]) else f"{value} [{low}, {high}]"


def percent(of: Sequence[float] | None, digits: int = 1, sign: bool = False) -> str:
    return bracket(of, digits, 100, sign)


def decimals(values: Iterable[float]) -> int:
    """As many as give the largest of ``values`` four digits."""
    known = [abs(value) for value in values if math.isfinite(value) and value]
    return min(6, max(0, 3 - math.floor(math.log10(max(known))))) if known else 2


def integer(value: float) -> str:
    return plain(value, 0) if not math.isfinite(value) else f"{round(value):,}"


def memory(size: float) -> str:
    """Bytes in MiB, or GiB from 10 GiB on."""
    mebi = size / 2**20
    return DASH if math.isnan(size) else f"{mebi / 1024:.1f} GiB" if mebi >= 10240 else f"{mebi:,.0f} MiB"


def seconds(value: float) -> str:
    return DASH if math.isnan(value) else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def duration(value: float) -> str:
    """Seconds, minutes or hours, whichever reads best."""
    if math.isnan(value):
        return DASH
    return f"{value:.0f} s" if value < 120 else f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


def listed(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))


def setting(value: Any) -> str:
    """A setting's value in one line; of a file or folder its name, as where it lies is nobody else's matter."""
    value = without_place(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)


def without_place(value: Any) -> Any:
    """The same settings with the names of files and folders instead of where they lie, also behind ``untrained:``."""
    if isinstance(value, dict):
        return {key: without_place(item) for key, item in value.items()}
    if not isinstance(value, str):
        return value
    kind, colon, path = value.rpartition(":")
    return kind + colon + PurePath(path).name if PurePath(path).is_absolute() else value


def bold(text: str, is_bold: bool) -> str:
    return f"**{text}**" if is_bold else text


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table: the first ``left`` columns flush left, the others right."""
    lines = [head, *rows]
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * width if i < left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    lines = [cells[0], rule, *cells[1:]]
    padded = [
        [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        for line in lines
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)
