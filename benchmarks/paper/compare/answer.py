"""The first paragraph: what came out, in sentences that say no more than the numbers do."""

import math

from dtme.comparison.verdict import EQUAL, OPEN

from ..fair.tables import names
from ..report.text import bracket, percent
from .claims import FAILS, HOLDS, UNTESTED, Claim, Evidence
from .findings import Findings
from .questions import ADAPTERS

LEADS = (
    ("random", "Choosing blocks by conflict", "beats chance", "does worse than chance", "random blocks"),
    ("joint", "TM + TE by conflict", "beats joint training", "does worse than joint training", "joint training"),
    (
        "longer",
        "At equal compute, TM + TE",
        "beats longer joint training",
        "does worse than longer joint training",
        "longer joint training",
    ),
)
"""Key of a claim, its subject, what is said where it holds and where the opposite does, and what it is against."""


def answer(findings: Findings) -> str:
    claims = {claim.key: claim for claim in findings.claims}
    leads = [_lead(claims[key], *words, len(findings.settings)) for key, *words in LEADS]
    return " ".join(part for part in (leads[0], _shares(findings), _adapters(findings), *leads[1:]) if part)


def _shares(findings: Findings) -> str:
    """What random blocks reach of the gain by conflict, where there is one."""
    shares = {title: found.share for title, found in findings.chances.items() if not math.isnan(found.share.value)}
    parts = [f"{title}: {percent(share, 0)} %" for title, share in shares.items()]
    return f"Random blocks alone reach a share of the gain by conflict: {'; '.join(parts)}." if parts else ""


def seeds_text(count: int) -> str:
    return "one seed" if count == 1 else f"{count} seeds"


def _lead(claim: Claim, subject: str, better: str, worse: str, other: str, settings: int) -> str:
    """One claim over all settings."""
    groups = (
        (HOLDS, better),
        (FAILS, worse),
        (EQUAL, f"makes no difference to {other}"),
        (OPEN, f"is not settled against {other}"),
    )
    parts = []
    for word, text in groups:
        there = [one for one in claim.evidence if one.word == word]
        if there:
            parts.append(f"{text}{_in(len(there), settings)} ({'; '.join(map(_said, there))})")
    if claim.untested:
        parts.append(f"is {UNTESTED} against {other}{_in(len(claim.untested), settings)}")
    return f"**{subject}** {names(parts)}."


def _in(count: int, settings: int) -> str:
    return f" in {count} of {settings} settings" if settings > 1 else ""


def _said(one: Evidence) -> str:
    e = one.estimate
    return f"{one.setting}: {bracket((e.mean, e.low, e.high), 2, sign=True)} points, {seeds_text(e.n)}"


def _adapters(findings: Findings) -> str:
    """The method against every rival, by setting."""
    claims = [claim for claim in findings.claims if claim.group == ADAPTERS]
    parts = []
    for title in findings.settings:
        found = {claim.key: one for claim in claims for one in claim.evidence if one.setting == title}
        parts.append(f"{title}: {_by_word(found) if found else UNTESTED}")
    return f"**Against plain adapters of as many parameters**, TM + TE by conflict: {'; '.join(parts)}."


def _by_word(found: dict[str, Evidence]) -> str:
    texts = {HOLDS: "beats {}", FAILS: "loses to {}", EQUAL: "no difference to {}", OPEN: "not settled against {}"}
    said = []
    for word, text in texts.items():
        rivals = [rival for rival, one in found.items() if one.word == word]
        if rivals:
            said.append(text.format(names(rivals)))
    return ", ".join(said)
