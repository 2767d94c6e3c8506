"""The sweep's rows as text and as the README's Markdown."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]
OUTCOMES = ("right", "refused", "crash", "wrong", "no answer")
PLANS = ("modulation", "task tokens")
TYPICAL = (
    "timm/vision_transformer",
    "timm/eva, DINOv3",
    "timm/swin_transformer",
    "timm/pvt_v2",
    "timm/davit",
    "transformers/vit",
    "transformers/swin",
    "transformers/bert",
    "transformers/llama",
    "transformers/clip",
    "transformers/bart",
    "transformers/t5",
    "transformers/wav2vec2",
    "transformers/albert",
    "torchvision/vit",
    "torch/TransformerEncoder, padding mask",
    "torch/TransformerDecoder",
)
"""The models that the README shows one by one."""


def by_model(rows: Iterable[Row]) -> dict[str, dict[str, Row]]:
    """{model: {plan: row}}; the last row of a model and plan counts."""
    models: dict[str, dict[str, Row]] = {}
    for row in rows:
        models.setdefault(row["model"], {})[row["plan"]] = row
    return models


def totals(rows: Iterable[Row]) -> dict[str, dict[str, Counter[str]]]:
    """{library: {plan: how many models ended how}}, with those not built under the plan "build"."""
    counts: dict[str, dict[str, Counter[str]]] = {}
    for name, plans in by_model(rows).items():
        library = counts.setdefault(name.split("/")[0], {plan: Counter() for plan in ("build", *PLANS)})
        for plan, row in plans.items():
            for kind in PLANS if plan == "rest" else (plan,):
                if plan != "rest" or kind not in plans:
                    library[kind][row["outcome"]] += 1
    return counts


def sharing(plans: dict[str, Row]) -> str:
    """How the backbone's first blocks are shared among tasks, as far as the package says."""
    said = (str(row["sharing"]).partition(":")[0] for row in plans.values() if row.get("sharing"))
    return " / ".join(dict.fromkeys(said)) or "-"


def largest_error(plans: dict[str, Row]) -> float | None:
    names = ("error", "oracle_error")
    return max((row[name] for row in plans.values() for name in names if row.get(name) is not None), default=None)


def _outcome(row: Row | None) -> str:
    if row is None:
        return "-"
    unchecked = row["outcome"] == "right" and str(row.get("oracle")).startswith("no oracle")
    return row["outcome"] + (" (no oracle)" if unchecked else "")


def text(rows: list[Row]) -> str:
    """One line per model, then what is wrong or crashed, then the totals."""
    lines = [f"{'model':44} {'modulation':24} {'task tokens':24} {'sharing':20} error"]
    models = by_model(rows)
    for name, plans in models.items():
        if "build" in plans:
            lines.append(f"{name:44} not built: {plans['build']['reason'][:90]}")
            continue
        rest = plans.get("rest")
        cells = [_outcome(plans.get(plan, rest)) for plan in PLANS]
        error = largest_error(plans)
        shown = "" if error is None else f"{error:.1e}"
        lines.append(f"{name:44} {cells[0]:24} {cells[1]:24} {sharing(plans):20} {shown}")
    lines.append("")
    for name, plans in models.items():
        for plan, row in plans.items():
            if row["outcome"] in ("crash", "wrong", "no answer"):
                lines.append(f"{row['outcome']}: {name}, {plan}: {row['reason'][:160]}")
    for library, counts in totals(rows).items():
        for plan, counter in counts.items():
            ends = ", ".join(f"{count} {outcome}" for outcome, count in counter.most_common())
            lines.append(f"{library}, {plan}: {ends or 'none'}")
    return "\n".join(lines)


def markdown(rows: list[Row]) -> str:
    """Totals per library, and the typical models."""
    lines = ["| library | models | plan | " + " | ".join(OUTCOMES) + " |", "|---|---|---|" + "---|" * len(OUTCOMES)]
    for library, counts in totals(rows).items():
        for plan in PLANS:
            number = sum(counts[plan].values())
            cells = " | ".join(str(counts[plan][outcome]) for outcome in OUTCOMES)
            lines.append(f"| {library} | {number} | {plan} | {cells} |")
    lines += ["", "| model | modulation | task tokens | shared | largest error |", "|---|---|---|---|---|"]
    models = by_model(rows)
    for name in TYPICAL:
        if (plans := models.get(name)) is None or "build" in plans:
            continue
        cells = " | ".join(_outcome(plans.get(plan, plans.get("rest"))) for plan in PLANS)
        error = largest_error(plans)
        lines.append(f"| {name} | {cells} | {sharing(plans)} | {'' if error is None else f'{error:.0e}'} |")
    return "\n".join(lines)
