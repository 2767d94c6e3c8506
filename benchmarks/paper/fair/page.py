"""``report.md`` of one or several OUT."""

from collections.abc import Iterable

from ..report.provenance import facts_table, settings_table, times_sentence
from ..report.tables import lost_runs
from . import tables
from .answer import answer
from .comparison import Study

COMMAND = "python -m benchmarks.paper fair-report"
INTRO = (
    "Joint training against single-task runs of the same seed, under several conditions. Δm is the mean over tasks of "
    "what joint training gains over the single-task runs, in %; a task's term of it below 0 is negative transfer on "
    f"that task. Made by `{COMMAND}`."
)


def page(studies: list[Study], pictures: Iterable[str]) -> str:
    """The whole page.

    Args:
        pictures: names of the files beside it.
    """
    pictures = list(pictures)
    parts = ["# Is there negative transfer, and how much does tuning leave?", INTRO]
    for study in studies:
        parts.append(f"## {study.title}")
        parts += ["\n".join(f"> - {note}" for note in study.notes), "\n".join(f"- {s}" for s in answer(study))]
    titles = {
        "transfer.png": "Δm by condition and arm, with the seeds",
        "tasks.png": "Terms of Δm of joint training by task and condition",
    }
    parts += [f"![{title}]({name})" for name, title in titles.items() if name in pictures]
    for study in studies:
        parts += _numbers(study)
    return "\n\n".join(part for part in parts if part) + "\n"


def _numbers(study: Study) -> list[str]:
    """All tables of one OUT."""
    transfer = tables.READING.format(words=tables.TRANSFER_WORDS)
    change = tables.READING.format(words=tables.CHANGE_WORDS)
    sections = [
        (
            "like with like",
            "Gain over the single-task runs of the same seed and condition, in %. " + transfer,
            tables.transfer_table(study),
        ),
        (
            "from one condition to another",
            "Differences of Δm and its terms in points, paired by seed; the difference of weights is under the tuned "
            "condition. " + change,
            tables.changes_table(study),
        ),
        (
            "what a change does to each side",
            "The metric after the change over that before, paired by seed, in %; above 0 is better. " + change,
            tables.sides_table(study),
        ),
        (
            "unlike with unlike",
            "Joint training under one condition over single-task runs under another, in %: tuned on one side only, "
            "which is no fair comparison; and with twice the steps for joint training. " + transfer,
            tables.mixed_table(study),
        ),
        ("metrics", "Mean ± half-width of the 95 % interval over seeds.", tables.metrics_table(study)),
        *_tuning(study),
        ("compute", _COMPUTE, tables.cost_table(study)),
        (
            "details",
            "Smallest effect: what as many seeds find with a power of 80 % by a paired t-test at 5 %, at the measured "
            "spread.",
            tables.detail_table(study),
        ),
    ]
    parts = [
        part for name, words, text in sections if text for part in (f"## {study.title}: {name}", words, text) if part
    ]
    return parts + _provenance(study)


_COMPUTE = (
    "Seconds of every run counted by itself, though some ran at once or share their joint part; on a busy machine the "
    "CPU time is the steadier one, it has the evaluation in it. The last two columns: all single-task runs of a seed "
    "over the joint run of that seed."
)


def _tuning(study: Study) -> list[tuple[str, str, str]]:
    words = (
        "Score by learning rate on training items that were held out, with seeds of tuning, in %: Δm over joint "
        "training at its best rate; of a task alone, its term of that; of joint training itself, over that at the "
        "rate whose score is 0. Bold is the chosen rate; *at the edge* is one beyond which none was tried; – is a run "
        "that diverged."
    )
    return [
        (f"tuning, {result.condition.title}", words, tables.tuning_table(result))
        for result in study.results.values()
        if result.condition.is_tuned
    ]


def _provenance(study: Study) -> list[str]:
    first = next(iter(study.results.values())).comparison.folder
    lost = [
        f"In {result.condition.folder}:\n\n{text}"
        for result in study.results.values()
        if (text := lost_runs(result.comparison))
    ]
    return [
        *([f"## {study.title}: runs that are not in the numbers", *lost] if lost else []),
        f"## {study.title}: settings and versions",
        tables.conditions_table(study),
        f"Settings of all conditions; where the table above has another, that of {first.path.name}:",
        settings_table(first),
        facts_table(study.runs),
        times_sentence(study.runs) + " Tuning comes on top, as the table of compute has it.",
    ]
