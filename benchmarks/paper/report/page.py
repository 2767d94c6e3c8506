"""``report.md``: one folder's report as a page."""

from collections.abc import Iterable
from pathlib import Path

from . import tables
from .beside import printed_section
from .comparison import Comparison
from .provenance import (
    arms_settings_table,
    differing_facts,
    facts_table,
    settings_table,
    times_sentence,
)
from .text import listed

COMMAND = "python -m benchmarks.paper report"


def page(comparison: Comparison, pictures: Iterable[str]) -> str:
    """The whole page.

    Args:
        pictures: file names beside the page, of those that ``figures.draw`` drew.
    """
    pictures = [Path(name).name for name in pictures]
    parts = [
        _top(comparison),
        _arms(comparison, pictures),
        _tasks(comparison, pictures),
        _seeds(comparison),
        _conflicts(comparison, pictures),
        _section("Losses", _picture(pictures, "losses.png", "Training losses by task")),
        _section("Runs that are not in the numbers", tables.lost_runs(comparison)),
        printed_section(comparison),
        _provenance(comparison),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _section(title: str, *parts: str | None) -> str:
    known = [part for part in parts if part]
    return "\n\n".join([f"## {title}", *known]) if known else ""


def _picture(pictures: list[str], name: str, title: str) -> str:
    return f"![{title}]({name})" if name in pictures else ""


def _top(comparison: Comparison) -> str:
    folder = comparison.folder
    warnings = [*differing_facts(folder.runs()), *comparison.notes]
    counts = {"are missing": len(folder.missing()), "diverged": len(folder.diverged())}
    lost = [f"{count} {what}" for what, count in counts.items() if count]
    if lost:
        warnings.append(f"Of the runs of the experiment, {' and '.join(lost)}: they are listed below.")
    base, reference = (comparison.arms[name].title for name in (comparison.baseline, comparison.reference))
    intro = (
        f"{len(folder.arms)} arms, seeds {listed(folder.seeds)}; Δm is the mean over tasks of the gain over "
        f"**{reference}** of the same seed in %, arms are compared with **{base}**. Made by `{COMMAND}`."
    )
    quoted = "\n".join(f"> - {warning}" for warning in warnings)
    return "\n\n".join(part for part in (f"# {folder.experiment} on {folder.data}", quoted, intro) if part)


def _arms(comparison: Comparison, pictures: list[str]) -> str:
    base = comparison.arms[comparison.baseline].title
    reading = tables.READING.format(baseline=base)
    cost = (
        " Added parameters are beyond the backbone and the heads, in brackets in % of these; seconds of training are "
        "those of one seed, without the analysis that chooses a structure and without evaluation; memory is that of "
        "the device, or of the whole process on a CPU, during the part of the training that is the arm's own."
    )
    return _section(
        "Arms",
        tables.main_table(comparison),
        reading + cost + tables.single_note(comparison),
        _picture(pictures, "differences.png", f"Δm minus that of {base}, by seed"),
    )


def _tasks(comparison: Comparison, pictures: list[str]) -> str:
    base, reference = (comparison.arms[name].title for name in (comparison.baseline, comparison.reference))
    return _section(
        "Tasks",
        f"Terms of Δm: the gain over {reference} in %, positive is better.",
        tables.terms_table(comparison),
        _picture(pictures, "tasks.png", "Terms of Δm by task and arm"),
        f"Paired differences: arm minus {base} in the metric's own unit, with the number of seeds that both have.",
        tables.differences_table(comparison),
    )


def _seeds(comparison: Comparison) -> str:
    if not comparison.requirements:
        return ""
    return _section(
        "How many seeds",
        "Seeds that settle a difference of Δm of the given size: with so many, a two-sided paired t-test at 5 % finds "
        "it with a probability of 80 %. By the measured standard deviation of the paired differences and, in brackets, "
        "by the ends of its 95 % interval (chi-square). An effect is settled when at least so many seeds are there; "
        "whether it was found is in the table of arms.",
        tables.requirements_table(comparison),
    )


def _conflicts(comparison: Comparison, pictures: list[str]) -> str:
    text = tables.conflicts_table(comparison)
    if text is None:
        return ""
    return _section(
        "Conflicts",
        "Share of (token, pair of tasks)s in conflict at the start and the end of the training, mean over seeds, and "
        "the relative change of their number.",
        text,
        tables.valid_counts_note(comparison),
        _picture(pictures, "conflicts.png", "Conflict rates by block at the start and the end"),
    )


def _provenance(comparison: Comparison) -> str:
    folder = comparison.folder
    own = arms_settings_table(folder)
    return _section(
        "Settings and versions",
        settings_table(folder),
        own and f"Settings in which runs differ:\n\n{own}",
        facts_table(folder.runs()),
        times_sentence(folder.runs()),
    )
