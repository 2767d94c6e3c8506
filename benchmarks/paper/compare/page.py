"""``report.md``: the verdict first, then the claims, every setting, the prediction, the cost and the settings."""

import math
from collections.abc import Iterable

from dtme.comparison.verdict import MARGIN

from ..report.provenance import arms_settings_table, facts_table, settings_table, times_sentence
from ..report.tables import lost_runs
from ..report.text import bracket, listed, percent, plain
from ..runner.tune import JOINT
from . import tables
from .answer import answer
from .commands import COMMAND, run_command
from .costs import best
from .findings import Findings
from .folders import RANDOM, Setting
from .prediction import KINDS, Prediction, reached_by_chance
from .questions import shares_text

READING = (
    "Δm is the mean over tasks of the gain over joint training of the same seed in %, higher is better; the paper's is "
    "over single-task models, so that its size is not that of ours. Differences are paired by seed. Brackets are 95 % "
    "intervals over seeds, by Student's t, of one number each: they are not adjusted for how many there are."
)
VERDICTS = (
    "*Holds*: the whole interval is above 0. *Does not hold (contradicted)*: it is below 0. *No difference*: it lies "
    f"within ± {MARGIN:g} points. *Not settled*: else, with the number of seeds in all at which a paired t-test "
    "settles it, with a power of 80 %, if the mean stays what it is: by finding it, or what lies between it and "
    f"{MARGIN:g} points, whichever is more. A setting that a claim has no row of does not have its runs. A prediction "
    "holds if the interval of the rank correlation is above 0 and the correlation beyond what 5 % of random orders of "
    "the blocks reach."
)
CHANCE = (
    "Share of the gain: the Δm of random plans over that of the plan by conflict, with Fieller's interval; in the "
    "paper {shares}. Rank of conflict: the share of the random plans of a seed that it beats, its mean over seeds, "
    "with an interval from three on; and between which values 95 % of such means would lie, were it one more random "
    "plan. Spread: the standard deviation between random plans of a seed in points of Δm, the noise of a run included."
)
ARMS = (
    "Mean ± half-width of the 95 % interval; a number in brackets is how many seeds it is of, where that is not the "
    "row's. Compute: passes of the shared blocks per step in the arm's own part of the training; – where runs do not "
    "say. CPU: seconds of a run over those of joint training, the joint part, analysis and evaluation included."
)
TESTS = (
    "Differences of Δm in points with the number of seeds; bold is significantly better at 5 % after Holm's correction "
    "over the arms of the column, and diverged at no seed. Per added compute or CPU: Δm over joint training by what "
    "the arm costs beyond it, in points per cost of one joint training."
)
PREDICTION = (
    "Modules in one block at a time. Real gain: Δm over joint training of the seed, for modules in that block only; "
    "beside it what the analysis said of the block before it had any, both in the mean over seeds with Student's "
    "interval. Correlations are Spearman's, over blocks: of the means over seeds, with a jackknife over seeds from "
    "five on; the mean of those by seed, with Student's interval from three on; and for every task's own term the one "
    "of the two that has an interval, that of the means first."
)
TITLES = {
    "questions.png": "Every claim by setting: difference in points with its 95 % interval",
    "arms": "Δm over joint training by arm",
    "blocks": "Real gain of every block, and its conflict rate",
}


def page(findings: Findings, pictures: Iterable[str]) -> str:
    """The whole page.

    Args:
        pictures: names of the files beside it.
    """
    pictures = list(pictures)
    tested = [one for claim in findings.claims for one in claim.evidence if one.estimate.n > 1]
    parts = [
        "# Does choosing blocks by conflict beat chance, and does the method beat plain adapters?",
        answer(findings),
        "\n".join(f"> - {note}" for note in findings.notes),
        READING,
        "## Claims",
        tables.claims_table(findings),
        VERDICTS + _by_luck(len(tested)),
        tables.untested_text(findings),
        _picture(pictures, "questions.png"),
        *_chance(findings),
        *_arms(findings, pictures),
        *_prediction(findings, pictures),
        *_cost(findings),
        *_settings(findings),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _by_luck(tested: int) -> str:
    """How many intervals leave out the truth by chance alone."""
    if not tested:
        return ""
    return f" {tested} differences have an interval: where there is none in truth, one in twenty is decided by chance."


def _picture(pictures: list[str], name: str, title: str = "") -> str:
    return f"![{title or TITLES[name]}]({name})" if name in pictures else ""


def _chance(findings: Findings) -> list[str]:
    if not findings.chances:
        return []
    words = CHANCE.format(shares=shares_text())
    return ["## What chance alone reaches", tables.chance_table(findings), words]


def _arms(findings: Findings, pictures: list[str]) -> list[str]:
    parts = []
    for at, (title, setting) in enumerate(findings.settings.items(), 1):
        parts += [
            f"## Arms: {title}",
            tables.arms_table(setting),
            ARMS if at == 1 else "",
            tables.tests_table(findings, setting),
            f"{TESTS if at == 1 else ''} {_best(findings, setting)}".strip(),
            _picture(pictures, f"arms-{at}.png", f"{TITLES['arms']}, {title}"),
        ]
    return parts


def _best(findings: Findings, setting: Setting) -> str:
    costs = findings.costs[setting.title]
    parts = []
    for what, text in (("compute", "added compute"), ("cpu", "added CPU time")):
        arm = best(costs, what)
        if arm is not None:
            e = getattr(costs[arm], what)
            parts.append(f"per {text}, {setting.arms[arm].title} ({bracket((e.mean, e.low, e.high), 2, sign=True)})")
    if not parts:
        return "No arm that costs more than joint training surely gains anything over it."
    return f"Most gain, of the arms whose interval is above 0: {'; '.join(parts)}."


def _prediction(findings: Findings, pictures: list[str]) -> list[str]:
    parts = []
    for title, kinds in findings.predictions.items():
        at = list(findings.settings).index(title)
        parts += [f"## Prediction: {title}", "" if parts else PREDICTION]
        for found in kinds.values():
            parts += _of_kind(found)
        parts.append(_picture(pictures, f"blocks-{at + 1}.png", f"{TITLES['blocks']}, {title}"))
    return parts


def _of_kind(found: Prediction) -> list[str]:
    name = KINDS[found.kind]
    chance = reached_by_chance(len(found.blocks))
    reached = (
        "no correlation is rarer than 5 %"
        if math.isinf(chance)
        else f"5 % of random orders reach a correlation of ± {plain(chance, 2)}"
    )
    seeds = listed(found.seeds) or "none"
    text = f"{name}, one block at a time, seeds {seeds}: with {len(found.blocks)} blocks, {reached}."
    if found.left_out:
        text += f" Seeds {listed(found.left_out)} lack a block and are left out."
    return [text, tables.blocks_table(found), tables.correlations_table(found), _noise(found)]


def _noise(found: Prediction) -> str:
    """How noisy the real gains themselves are, and what that leaves of any correlation."""
    if math.isnan(found.common.value):
        return "How far the gains of the blocks would come out again is not known: that takes two seeds."
    return (
        f"The gains of the blocks are noisy themselves: {percent(found.common, 0)} % of the variance between them at "
        f"one seed is common to all seeds (intraclass correlation), {percent(found.reliability, 0)} % of that of their "
        f"mean over {len(found.seeds)}, so that even a perfect prediction would have a correlation of about "
        f"{bracket(found.most, 2)} with that mean."
    )


def _cost(findings: Findings) -> list[str]:
    runs = [run for setting in findings.settings.values() for run in setting.folder.runs() + setting.tuning_runs]
    return [
        "## What it cost",
        tables.cost_table(findings),
        times_sentence(runs) + " Tuning is included.",
        "\n".join(
            f"- {title}: {found.sentence}{f' **{found.warning}**' if found.warning else ''}"
            for title, found in findings.tunings.items()
        ),
    ]


def _settings(findings: Findings) -> list[str]:
    parts = ["## Settings and what is missing"]
    for title, setting in findings.settings.items():
        folder = setting.folder
        own = arms_settings_table(folder)
        plans = len(setting.random)
        lost = lost_runs(setting.comparison)
        parts += [
            f"### {title}",
            f"Seeds {listed(folder.seeds)}, experiment {folder.experiment}, folder {setting.path.resolve().name}"
            + (f"; {setting.arms[RANDOM].title}." if plans else "; no random plans."),
            lost or "No run is missing, and none diverged.",
            settings_table(folder),
            f"Settings in which runs differ:\n\n{own}" if own else "",
            facts_table(folder.runs()),
            f"```\n{run_command(setting)}\n```",
        ]
    names = listed([setting.path.resolve().name for setting in findings.settings.values()]).replace(", ", " ")
    return [*parts, f"Made by `{COMMAND} {names} --to DIR`; everything is relative to `{JOINT}` of the same seed."]
