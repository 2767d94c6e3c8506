"""The paper's printed numbers beside ours, for the data sets that are the paper's."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from dtme.comparison.delta import delta_m
from dtme.comparison.statistics import estimate

from .comparison import SPACES, ArmResult, Comparison
from .folder import SINGLE
from .printed import all_rows, check_delta_m, contradictions, half_unit
from .printed_numbers import ADDED, CONFLICTS, LOWER_IS_BETTER, REFERENCE
from .text import DASH, decimals, interval, listed, plain, table


@dataclass
class Entry:
    """What the paper prints of one arm with one backbone, over all tables that agree on it."""

    backbone: str
    arm: str
    tables: list[int]
    metrics: dict[str, str]
    delta_m: str | None
    recomputed: float = field(default=float("nan"))
    """Δm that follows from the printed metrics of the arm and of the single-task models."""


def printed_section(comparison: Comparison) -> str:
    """The section of the page; empty for data that the paper does not have."""
    data = comparison.folder.data
    printed = entries(data)
    if not printed:
        return ""
    parts = ["## The paper's numbers", _how_to_read(comparison)]
    for backbone in dict.fromkeys(entry.backbone for entry in printed):
        rows = [entry for entry in printed if entry.backbone == backbone]
        parts += [f"### {data}, {backbone}", _table(rows, comparison)]
    if data in CONFLICTS:
        parts += ["### Change of the number of conflicts from start to end in % (Table 14)", _conflicts(comparison)]
    parts.append(findings(data))
    return "\n\n".join(parts)


def entries(data: str) -> list[Entry]:
    """The rows of all tables about a data set; rows of one arm that agree within their rounding are one entry."""
    found: list[Entry] = []
    for row in all_rows(data):
        same = [e for e in found if (e.backbone, e.arm) == (row.backbone, row.arm) and _agree(e.metrics, row.metrics)]
        if same:
            entry = same[0]
            entry.tables.append(row.table)
            entry.metrics = entry.metrics or dict(row.metrics)
            entry.delta_m = entry.delta_m or row.delta_m
        else:
            found.append(Entry(row.backbone, row.arm, [row.table], dict(row.metrics), row.delta_m))
    for entry in found:
        base = next((e.metrics for e in found if (e.backbone, e.arm) == (entry.backbone, REFERENCE)), None)
        if base and entry.metrics:
            results, singles = ({task: float(text) for task, text in m.items()} for m in (entry.metrics, base))
            entry.recomputed, _ = delta_m(results, singles, LOWER_IS_BETTER & results.keys())
    return found


def _agree(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether they are the same within their rounding; a row without metrics agrees with any."""
    return (
        not one
        or not other
        or all(
            abs(float(text) - float(other[task])) <= half_unit(text) + half_unit(other[task]) + 1e-12
            for task, text in one.items()
        )
    )


def findings(data: str) -> str:
    """What does not agree in the paper's own numbers, in words."""
    checks = check_delta_m(data)
    wrong = [check for check in checks if not check.agrees]
    lines = [
        f"Δm of {c.arm} ({c.backbone}) is {c.printed:g} in Table {c.table}; by the printed metrics it lies between "
        f"{c.low:.2f} and {c.high:.2f}."
        for c in wrong
    ]
    lines += [f"{sentence}." for sentence in contradictions(data)]
    agreed = f"{len(checks) - len(wrong)} of {len(checks)} printed Δm follow from the printed metrics within rounding."
    if not lines:
        return f"The paper's numbers checked against each other: {agreed}"
    return f"The paper's numbers checked against each other: {agreed} What differs:\n\n" + "\n".join(
        f"- {line}" for line in lines
    )


# --- beside ours ------------------------------------------------------------------------------------------------------


def _ours(arm: str, comparison: Comparison) -> ArmResult | None:
    ours = comparison.arms.get(arm)
    return ours if ours and ours.seeds else None


def _how_to_read(comparison: Comparison) -> str:
    settings = comparison.folder.settings
    text = (
        "The paper's rows, and under the first of an arm ours where there is one, with 95 % intervals over seeds; the "
        "paper gives one number and no number of seeds. It trains a pretrained ViT for 60,000 steps of 6 images"
    )
    if "backbone" in settings:
        text += f"; these runs are with the backbone {settings['backbone']}"
    text += ". “From metrics” is the Δm that follows from the metrics in the row and in the paper's single-task row."
    if comparison.reference != SINGLE:
        text += (
            f" Our Δm is relative to {comparison.arms[comparison.reference].title}, the paper's to single-task models: "
            "they are not to be compared."
        )
    return text


def _table(rows: list[Entry], comparison: Comparison) -> str:
    tasks = next(list(entry.metrics) for entry in rows if entry.metrics)
    is_same = set(tasks) == set(comparison.tasks)
    head = ["arm", "table", *tasks, "Δm %", "from metrics", "added %"]
    lines, shown = [], set()
    for entry in rows:
        metrics = [entry.metrics.get(task, DASH) for task in tasks]
        total, recomputed = entry.delta_m or DASH, plain(entry.recomputed, 3, sign=True)
        added = ADDED.get(comparison.folder.data, {}).get(entry.backbone, {}).get(entry.arm, DASH)
        lines.append([entry.arm, listed(entry.tables), *metrics, total, recomputed, added])
        ours = _ours(entry.arm, comparison)
        if ours and ours.name not in shown:
            shown.add(ours.name)
            lines.append(_our_line(ours, tasks, is_same))
    return table(head, lines)


def _our_line(arm: ArmResult, tasks: list[str], is_same: bool) -> list[str]:
    cells = []
    for task in tasks:
        values = list(arm.metrics.get(task, {}).values())
        cells.append(interval(estimate(values), decimals(values)))
    total = interval(estimate(list(arm.delta_m.values())), 2, sign=True) if is_same else DASH
    shares = [100 * cost.added / cost.base for cost in arm.costs.values() if cost.base]
    added = plain(sum(shares) / len(shares), 3) if shares else DASH
    return [f"ours: {arm.title}", "", *cells, total, "", added]


def _conflicts(comparison: Comparison) -> str:
    lines = []
    for arm, changes in CONFLICTS[comparison.folder.data].items():
        lines.append([arm, *changes])
        ours = _ours(arm, comparison)
        if ours:
            cells = [interval(estimate(list(ours.change(space).values())), 2, sign=True) for space in SPACES]
            lines.append([f"ours: {ours.title}", *cells])
    return table(["arm", "range space", "null space"], lines)
