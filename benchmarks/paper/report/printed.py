"""The paper's printed numbers as rows, and whether they agree with each other."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from dtme.comparison.delta import delta_m

from .printed_numbers import LOWER_IS_BETTER, REFERENCE, TABLES, PrintedTable

NONE = "-"


@dataclass(frozen=True)
class PrintedRow:
    """One arm in one table of the paper; every number as text, with the digits that are printed."""

    table: int
    backbone: str
    arm: str
    metrics: Mapping[str, str]
    """Empty where the table has Δm alone, or where the arm did not converge."""
    delta_m: str | None


@dataclass(frozen=True)
class DeltaCheck:
    """A printed Δm beside the one that follows from the printed metrics of the same arm."""

    table: int
    backbone: str
    arm: str
    printed: float
    recomputed: float
    low: float
    high: float
    """What Δm can be, given how far the printed metrics were rounded."""

    @property
    def agrees(self) -> bool:
        return self.low <= self.printed <= self.high


def rows(table: PrintedTable) -> list[PrintedRow]:
    found = []
    for line in table.rows.strip().splitlines():
        arm, *cells = line.split()
        *metrics, total = cells
        if len(metrics) != len(table.tasks):
            raise ValueError(f"Table {table.number}, {arm}: {len(metrics)} numbers for {len(table.tasks)} tasks")
        known = {task: text for task, text in zip(table.tasks, metrics, strict=True) if text != NONE}
        found.append(PrintedRow(table.number, table.backbone, arm, known, None if total == NONE else total))
    return found


def all_rows(data: str) -> list[PrintedRow]:
    """All rows about a data set, in the order of the tables; none for a data set that is not the paper's."""
    return [row for table in TABLES.get(data, ()) for row in rows(table)]


def half_unit(text: str) -> float:
    """Half a unit of the last digit that is printed: how far rounding may have moved the number."""
    return 0.5 * 10.0 ** -len(text.partition(".")[2])


def check_delta_m(data: str) -> list[DeltaCheck]:
    """Every printed Δm of a data set beside the one that its arm's printed metrics give, with its bounds."""
    return list(_checks(all_rows(data)))


def _checks(printed: list[PrintedRow]) -> Iterator[DeltaCheck]:
    for row in printed:
        reference = _metrics(printed, row, REFERENCE)
        metrics = row.metrics or _metrics(printed, row, row.arm)
        if row.delta_m is None or not metrics or not reference or row.arm == REFERENCE:
            continue
        lower = LOWER_IS_BETTER & metrics.keys()
        total, _ = delta_m(_shifted(metrics, {}), _shifted(reference, {}), lower)
        worse = {task: 1 if task in lower else -1 for task in metrics}
        better = {task: -sign for task, sign in worse.items()}
        low, _ = delta_m(_shifted(metrics, worse), _shifted(reference, better), lower)
        high, _ = delta_m(_shifted(metrics, better), _shifted(reference, worse), lower)
        slack = half_unit(row.delta_m) + 1e-9
        yield DeltaCheck(row.table, row.backbone, row.arm, float(row.delta_m), total, low - slack, high + slack)


def _metrics(printed: list[PrintedRow], row: PrintedRow, arm: str) -> Mapping[str, str]:
    """The first metrics that are printed of an arm with the row's backbone."""
    return next((r.metrics for r in printed if r.arm == arm and r.backbone == row.backbone and r.metrics), {})


def _shifted(metrics: Mapping[str, str], signs: Mapping[str, int]) -> dict[str, float]:
    return {task: float(text) + signs.get(task, 0) * half_unit(text) for task, text in metrics.items()}


def contradictions(data: str) -> list[str]:
    """Where two tables print different numbers of the same arm, backbone and task: one sentence each."""
    first: dict[tuple[str, str, str], tuple[int, str]] = {}
    found = []
    for row in all_rows(data):
        for task, text in row.metrics.items():
            table, other = first.setdefault((row.backbone, row.arm, task), (row.table, text))
            if abs(float(text) - float(other)) > half_unit(text) + half_unit(other) + 1e-12:
                found.append(
                    f"{task} of {row.arm} ({row.backbone}) is {other} in Table {table} and {text} in Table {row.table}"
                )
    return found
