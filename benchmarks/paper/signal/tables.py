"""The tables of the signal's report in Markdown, each from the numbers in ``signal.json`` alone."""

import math
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

from ..report.text import DASH, bracket, integer, listed, percent, plain, table
from .measurement import OVER_IMAGES, OVER_TOKENS, SPACES, TOKENS
from .reproducibility import AT_IMAGES, OWN, WANTED_RELIABILITY
from .tallies import BELOW, BLOCKS, CELLS, KINDS, LETTER, PAIRS
from .warning import AT_ONCE, CRITERIA, DISTANCE, LABELS, RATE

Found = dict[str, Any]
PLANS = {"range": "TM", "null": "TE"}
"""What the rates of a space choose the blocks of."""
NOISE, OPEN, WEAK, CLEAR, UNKNOWN = "noise", "open", "some", "clear", "no interval"
VERDICTS = {
    NOISE: f"where its interval reaches 0 and stays below {WANTED_RELIABILITY:g}",
    OPEN: f"where it holds both 0 and {WANTED_RELIABILITY:g}, so that nothing can be said",
    WEAK: f"where it is above 0, but not all of it at {WANTED_RELIABILITY:g} or more",
    CLEAR: "where all of it is",
}


def share_name(share: str) -> str:
    return f"{100 * float(share):g} %"


def verdict(of: Sequence[float]) -> str:
    """What a reliability with its interval says in a word."""
    _, low, high = of
    if math.isnan(low):
        return UNKNOWN
    if low <= 0:
        return NOISE if high < WANTED_RELIABILITY else OPEN
    return CLEAR if low >= WANTED_RELIABILITY else WEAK


def judged(of: Sequence[float]) -> str:
    return DASH if math.isnan(of[0]) else f"{bracket(of)}, {verdict(of)}"


def by_share(setting: Found, head: Sequence[str], row: Any) -> str:
    """A table with a row per share of the training."""
    rows = [[share_name(share), *row(found)] for share, found in setting["by_share"].items()]
    return table(["training", *head], rows)


def near(setting: Found) -> Found:
    return setting["by_share"][setting["near"]]


def shown(setting: Found) -> list[str]:
    """The shares of the summary: none of the training, if measured, and the one that stands for all."""
    return [share for share in setting["by_share"] if share in ("0", setting["near"])]


def sample_size(setting: Found) -> int:
    """The largest number of images, at most ``AT_IMAGES``, of which there are two samples at least."""
    found = near(setting)["samples"][BLOCKS]["range"]
    there = [int(n) for n in found if n not in (OWN, f"{setting['images']}")]
    if OWN in found:
        there.append(setting["sample"])
    return max((n for n in there if n <= AT_IMAGES), default=0)


def of_samples(setting: Found, found: Found, kind: str, space: str) -> Found:
    """Agreement of samples of ``sample_size``, with their own token spaces where these are of so many; can be empty."""
    samples, n = found["samples"][kind][space], sample_size(setting)
    own = samples.get(OWN) if setting["sample"] == n else None
    return own or samples.get(f"{n}", {})


# --- all settings -----------------------------------------------------------------------------------------------------


def order_table(settings: Iterable[Found]) -> str:
    """Is the order of blocks and that of pairs signal or noise, in every setting?"""
    rows = [
        [
            setting["title"],
            share_name(share),
            space,
            *(
                judged(setting["by_share"][share]["profiles"][kind][space][part][f"{AT_IMAGES}"])
                for kind in (BLOCKS, PAIRS)
                for part in ("within", "across")
            ),
        ]
        for setting in settings
        for share in shown(setting)
        for space in SPACES
    ]
    head = ["blocks, one model", "blocks, all models", "pairs, one model", "pairs, all models"]
    return table(["setting", "training", "space", *head], rows, left=3)


def plans_table(settings: Iterable[Found]) -> str:
    """Would another sample or another model have given the same plan, in every setting?"""
    rows = []
    for setting in settings:
        found, n = near(setting), sample_size(setting)
        for space in SPACES:
            one = of_samples(setting, found, BLOCKS, space).get("overlap")
            other = found["seeds"].get(BLOCKS, {}).get(space, {}).get("overlap")
            rows.append(
                [
                    setting["title"],
                    PLANS[space],
                    plain(setting["random"][BLOCKS]["expected"], 2),
                    bracket(one) + (f" of {n}" if n else ""),
                    DASH if other is None else _mean_and_range(other),
                    images(found["images_for_overlap"][space], setting["images"]),
                    *(images(found["profiles"][kind][space]["images"], setting["images"]) for kind in (BLOCKS, PAIRS)),
                ]
            )
    head = ["by chance", "another sample", "another model", "images for the same plan"]
    head += ["images for the order of blocks", "of pairs"]
    return table(["setting", "plan", *head], rows, left=2)


def images(of: Sequence[float], read: int) -> str:
    """A number of images with its interval, † where it is beyond those that were read; infinite: not reached."""
    if math.isnan(of[0]):
        return DASH
    value, low, high = (f"{math.ceil(x):,}" if math.isfinite(x) else "∞" for x in of)
    text = "not reached" if value == "∞" else value + ("†" if of[0] > read else "")
    return text if math.isnan(of[1]) or low == "∞" else f"{text} [{low}, {high}]"


# --- one setting ------------------------------------------------------------------------------------------------------


def verdict_table(setting: Found) -> str:
    n = f"{AT_IMAGES}"
    columns = [(kind, part, space) for kind in (BLOCKS, PAIRS) for part in ("within", "across") for space in SPACES]
    names = {"within": "one model", "across": "all models"}
    head = [f"{KINDS[kind]}, {names[part]}, {space}" for kind, part, space in columns]
    return by_share(
        setting, head, lambda found: [judged(found["profiles"][kind][space][part][n]) for kind, part, space in columns]
    )


def rates_table(setting: Found) -> str:
    def row(found: Found) -> list[str]:
        cells = []
        for space in SPACES:
            one = found["rates"]["all"][space]
            seeds = [100 * rate for rate in one["by_seed"]]
            cells += [
                percent(one["rate"]),
                f"{plain(min(seeds), 1)} to {plain(max(seeds), 1)} ({len(seeds)})",
                percent(one.get("permuted")),
                percent(one.get("difference"), sign=True),
            ]
        return cells

    head = [f"{space} {what}" for space in SPACES for what in ("%", "by seed (n)", "permuted %", "difference, points")]
    return by_share(setting, head, row)


def items_table(setting: Found, kind: str) -> str:
    """Rates by block or by pair at the share that stands for all."""
    names = setting["blocks"] if kind == BLOCKS else pair_names(setting)
    rates, more, rows = near(setting)["rates"][kind], setting["details"]["items"][kind], []
    for i, name in enumerate(names):
        row = [name]
        for space in SPACES:
            apart = more[space].get("difference")
            row += [percent(rates[space][i]), percent(apart[i] if apart else None, sign=True)]
        rows.append(row)
    head = [f"{space} {what}" for space in SPACES for what in ("%", "less permuted, points")]
    return table([kind, *head], rows)


def pair_names(setting: Found) -> list[str]:
    return [", ".join(pair) for pair in combinations(setting["tasks"], 2)]


def rules_table(setting: Found) -> str:
    def row(found: Found) -> list[str]:
        cells = []
        for rule in (BELOW, LETTER):
            for space in SPACES:
                one = found["rules"][rule][space]
                cells += [percent(one["difference"], 2, sign=True), bracket(one["overlap"])]
        return cells

    head = [
        f"{rule}, {what}"
        for rule in (BELOW, LETTER)
        for space in SPACES
        for what in (f"{space}, points", f"overlap {PLANS[space]}")
    ]
    return by_share(setting, head, row)


def averaging_table(setting: Found) -> str:
    rows = []
    for view, found in setting["details"]["averaging"].items():
        row = [{TOKENS: "no averaging"}.get(view, view), integer(found["units"])]
        row += [percent(found[BLOCKS][space]["rate"]) for space in SPACES]
        for kind in (BLOCKS, PAIRS):
            for space in SPACES:
                row.append(bracket(found[kind][space]["sharpness"], 1))
                row.append(DASH if view == TOKENS else bracket(found[kind][space]["correlation"]))
        rows.append(row)
    head = [
        *(f"{space} %" for space in SPACES),
        *(f"{kind} {s}, {what}" for kind in (BLOCKS, PAIRS) for s in SPACES for what in ("sharpness", "correlation")),
    ]
    return table(["before the sign", "units", *head], rows)


def averaging_is_there(setting: Found) -> bool:
    return any(view in setting["details"]["averaging"] for view in (OVER_TOKENS, OVER_IMAGES))


def samples_table(setting: Found) -> str:
    samples, rows = near(setting)["samples"], []
    for n in samples[BLOCKS]["range"]:
        if n == OWN:
            row = [f"{setting['sample']:,}, own token spaces"]
        else:
            row = [integer(int(n)) + (", resampled" if int(n) == setting["images"] else "")]
        for space in SPACES:
            one = samples[BLOCKS][space][n]
            row += [bracket(one[what]) for what in ("overlap", "equal", "correlation")]
        row += [bracket(samples[kind][space][n]["correlation"]) for kind in (PAIRS, CELLS) for space in SPACES]
        rows.append(row)
    head = [
        *(f"{PLANS[s]} {what}" for s in SPACES for what in ("overlap", "equal", "correlation")),
        *(f"{KINDS[kind]}, correlation, {space}" for kind in (PAIRS, CELLS) for space in SPACES),
    ]
    return table(["images", *head], rows)


def seeds_table(setting: Found) -> str:
    def row(found: Found) -> list[str]:
        seeds = found["seeds"]
        if seeds["models"] < 2:
            return [f"{seeds['models']}", *[DASH] * 8]
        cells = [f"{seeds['models']}"]
        for kind, what in (
            (BLOCKS, "overlap"),
            (BLOCKS, "correlation"),
            (PAIRS, "correlation"),
            (CELLS, "correlation"),
        ):
            cells += [_mean_and_range(seeds[kind][space][what]) for space in SPACES]
        return cells

    head = [f"overlap {PLANS[space]}" for space in SPACES]
    head += [f"{KINDS[kind]}, correlation, {space}" for kind in (BLOCKS, PAIRS, CELLS) for space in SPACES]
    return by_share(setting, ["models", *head], row)


def _mean_and_range(of: Found) -> str:
    low, high = (plain(x, 2) for x in of["range"])
    return bracket(of["mean"]) + ("" if low == high else f" ({low} to {high})")


def ratios_table(setting: Found) -> str:
    rows = []
    for ratio, found in setting["details"]["by_ratio"].items():
        ranks = [plain(x, 0) for x in (min(found["rank"]), max(found["rank"]))]
        row = [ratio, *(percent(found[space]["rate"]) for space in SPACES), " to ".join(ranks)]
        row.append(percent(found.get("spread"), 0) if found["samples"] else DASH)
        row.append(plain(found["largest_factor"], 2) if found["samples"] else DASH)
        for what in ("overlap", "halves", "reliability", "seeds"):
            row += [bracket(found[space][what]) for space in SPACES]
        rows.append(row)
    default, n = f"{setting['default_ratio']:g}", AT_IMAGES
    head = [*(f"{space} %" for space in SPACES), "rank", "spread between samples %", "largest ÷ smallest"]
    head += [f"overlap with r = {default}, {PLANS[space]}" for space in SPACES]
    head += [f"halves, correlation, {space}" for space in SPACES]
    head += [f"reliability at {n}, {space}" for space in SPACES]
    head += [f"models, correlation, {space}" for space in SPACES]
    return table(["r", *head], rows)


def variance_table(setting: Found) -> str:
    by_share, rows = setting["by_share"], []
    effects = max((found["variance"]["range"]["shares"] for found in by_share.values()), key=len)
    for share, found in by_share.items():
        for space in SPACES:
            one = found["variance"][space]
            row = [share_name(share), space]
            for effect in effects:
                is_negative = one["variances"].get(effect, 0) < 0
                row.append(percent(one["shares"].get(effect), 0) + ("*" if is_negative else ""))
            rows.append([*row, *(plain(100 * part, 0) for n, part in one["sample"].items() if int(n) != AT_IMAGES)])
    head = [*effects, *(f"sample of {int(n):,}" for n in one["sample"] if int(n) != AT_IMAGES)]
    return table(["training", "space", *head], rows, left=2)


def images_table(setting: Found) -> str:
    def row(found: Found) -> list[str]:
        read = setting["images"]
        cells = [images(found["images_for_overlap"][space], read) for space in SPACES]
        return cells + [images(found["profiles"][kind][s]["images"], read) for kind in (BLOCKS, PAIRS) for s in SPACES]

    head = [f"same plan, {PLANS[space]}" for space in SPACES]
    head += [f"order of {KINDS[kind]}, {space}" for kind in (BLOCKS, PAIRS) for space in SPACES]
    return by_share(setting, head, row)


def warning_table(setting: Found) -> str:
    shares = list(setting["by_share"])
    rows = []
    for n, found in setting["warning"].items():
        for view, criteria in found["warned"].items():
            for criterion, warned in criteria.items():
                part = found["separation"].get(criterion) if view == TOKENS else None
                rows.append(
                    [
                        integer(int(n)),
                        criterion,
                        {TOKENS: "real"}.get(view, "permuted"),
                        *(percent(warned.get(share), 0) for share in shares),
                        DASH if part is None else plain(part, 2, sign=True),
                    ]
                )
    return table(["images", "warning", "labels", *map(share_name, shares), "separation"], rows, left=3)


def label_gains_table(setting: Found) -> str:
    """In %, by share of the training; nothing where no share has any."""
    shares = {share: found["label_gains"] for share, found in setting["by_share"].items() if found["label_gains"]}
    tasks = setting["tasks"]
    rows = [[share_name(share), *(percent(gains[task]) for task in tasks)] for share, gains in shares.items()]
    return table(["training", *tasks], rows) if rows else ""


def criteria_list() -> str:
    return "\n".join(f"- *{name}*: {text}" for name, text in CRITERIA.items())


def by_rate_sentences(setting: Found) -> str:
    """How well one threshold for one number does, for each number of images."""
    lines = []
    for n, found in setting["warning"].items():
        for name in (RATE, DISTANCE):
            if name in found["rates"]:
                one = found["rates"][name]
                lines.append(
                    f"- {integer(int(n))} images, {name}: a sample of the untrained model has the higher one with a "
                    f"probability of {bracket(one['auc'])}; a threshold at {plain(100 * one['threshold'], 1)} % calls "
                    f"{plain(100 * one['right'], 0)} % right."
                )
    return "\n".join(lines)


def best_warning(setting: Found) -> str:
    """Which criterion parts untrained from trained heads best, at every number of images."""
    lines = []
    for n, found in setting["warning"].items():
        parts = found["separation"]
        if parts:
            own, best = LABELS if LABELS in parts else AT_ONCE, max(parts.values())
            names = [f"*{name}*" for name, part in parts.items() if part == best]
            text = f"- {integer(int(n))} images: the product's warning (*{own}*) has a separation of "
            text += f"{plain(parts[own], 2)}; "
            if best <= 0:
                text += "no other tells untrained heads from trained ones either."
            else:
                text += f"the best, {plain(best, 2)}, is that of {listed(names)}."
            lines.append(text)
    return "\n".join(lines)
