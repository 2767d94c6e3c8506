"""``report.md`` of the signal: a summary of all settings, then every setting. Its sentences follow the numbers."""

import math
from collections.abc import Sequence
from typing import Any

from dtme.resampling import CHANCE

from ..report.text import bracket, duration, listed, percent, plain
from . import tables
from .measurement import SPACES
from .reproducibility import AT_IMAGES, WANTED_OVERLAP, WANTED_RELIABILITY
from .tables import PLANS, UNKNOWN, near, share_name
from .tallies import BLOCKS, KINDS, PAIRS, RULES

Found = dict[str, Any]
COMMAND = "python -m benchmarks.paper signal-report"
TABLES = "tables.md"
NEGLIGIBLE = 1e-4
"""Of a rate."""
READING = (
    "A conflict is a token and a pair of tasks whose gradients' dot product is at most 0; the rate is their share, by "
    "space. A plan is the half of the blocks with the highest rates: in the range space for modulation (TM), in the "
    "null space for task tokens (TE). Brackets are 95 % intervals."
)
ORDER = (
    f"How much of the variance between the rates of blocks, or pairs of tasks, from {AT_IMAGES} images is not noise: "
    "*one model*, not that of the images (the interval is over images, the models given); *all models*, common to "
    "models of other seeds, the rest being each one's own (an intraclass correlation with its F interval, which takes "
    "blocks or pairs as normal and is wide for few of them). The interval says "
    + "; ".join(f"*{word}* {where}" for word, where in tables.VERDICTS.items())
    + "."
)
PLAN = (
    "Overlap of two plans, the share of blocks they have in common: by chance; of two samples of one model; of two "
    "models by all their images (mean, lowest to highest, an interval from five models on). Then from how many images "
    f"on two samples' plans overlap by {WANTED_OVERLAP:g} in the mean, of those measured, and at how many an order has "
    f"a reliability of {WANTED_RELIABILITY:g} within one model; † is beyond what was read."
)


def page(settings: Sequence[Found], pictures: Sequence[str]) -> str:
    """The answers; what they rest on is in ``appendix``."""
    names = {
        "rates.png": "Conflict rates by share of the training",
        "samples.png": "Agreement of two samples against their size",
        "variance.png": "Where the variance of the rates comes from",
        "cells.png": "Rates by block and pair",
    }
    parts = [
        "# What the conflict signal is worth",
        f"{READING} All tables: [{TABLES}]({TABLES}).",
        "## Signal or noise: blocks against pairs",
        tables.order_table(settings),
        ORDER,
        "## Would a plan come out again?",
        tables.plans_table(settings),
        f"{PLAN} At {listed([*dict.fromkeys(share_name(setting['near']) for setting in settings)])} of the training.",
        *(section(setting) for setting in settings),
        *(f"![{names[picture]}]({picture})" for picture in pictures),
        f"Made by `{COMMAND}` from {len(settings)} setting{'s' * (len(settings) > 1)}.",
    ]
    return "\n\n".join(parts) + "\n"


def appendix(settings: Sequence[Found]) -> str:
    parts = ["# What the conflict signal is worth: all tables", READING, *(details(setting) for setting in settings)]
    return "\n\n".join(parts) + "\n"


def section(setting: Found) -> str:
    """What the numbers of a setting say."""
    return "\n\n".join([f"## {setting['title']}", _facts(setting), _conclusions(setting)])


def details(setting: Found) -> str:
    """A setting's tables."""
    at = f"at {share_name(setting['near'])} of the training"
    parts = [
        f"## {setting['title']}",
        "### Is the order signal or noise?",
        ORDER,
        tables.verdict_table(setting),
        "### Rates",
        tables.rates_table(setting),
        f"By block and by pair, {at}:",
        tables.items_table(setting, BLOCKS),
        tables.items_table(setting, PAIRS),
        *_rules(setting),
        *_averaging(setting, at),
        "### Another sample",
        f"Disjoint samples of one model, {at}; those of all images are bootstrap resamples, which agree a little too "
        f"well. Two random plans overlap by {_random(setting)}.",
        tables.samples_table(setting),
        _own_space(setting),
        "### Another model",
        "The same data and training from another seed, by all images: mean over the pairs of models, with a jackknife "
        "over models from five on, and lowest to highest.",
        tables.seeds_table(setting),
        "### The ratio r",
        f"{at[0].upper()}{at[1:]}: ranks over the blocks, their standard deviation between samples of "
        f"{setting['sample']} images in % of the mean, largest over smallest of any block, and what the plan and the "
        "order of blocks are worth at each r.",
        tables.ratios_table(setting),
        "### Where the variance comes from",
        f"Of the rate of a pair in a block from {AT_IMAGES} images, in %; intervals leave out one model at a time and "
        "need five. * marks a negative estimate, shown as 0. The last columns are the sample's share at other "
        "numbers.",
        tables.variance_table(setting),
        "### How many images",
        f"The least measured number from which on two plans overlap by {WANTED_OVERLAP:g} in the mean, and the number "
        f"at which the order within a model has a reliability of {WANTED_RELIABILITY:g}; † is extrapolated beyond the "
        f"{setting['images']:,} that were read.",
        tables.images_table(setting),
        *_warning(setting),
    ]
    return "\n\n".join(part for part in parts if part)


def _rules(setting: Found) -> list[str]:
    """Whether other rules of counting change anything; with a table only if they do."""
    known = "; ".join(f"*{rule}*: {text}" for rule, text in list(RULES.items())[1:])
    moved = [
        abs(one["difference"][0])
        for found in setting["by_share"].values()
        for rule in found["rules"].values()
        for one in rule.values()
    ]
    if max(moved) < NEGLIGIBLE:
        return [f"Other rules of counting move no rate by 0.01 points ({known})."]
    text = "What other rules of counting change, mean over models with Student's interval from three on: "
    return [f"{text}{known}.", tables.rules_table(setting)]


def _facts(setting: Found) -> str:
    seconds = ", ".join(f"{name} {duration(value)}" for name, value in setting["seconds"].items())
    cpu = setting["cpu_seconds"]
    text = (
        f"{len(setting['blocks'])} blocks, tasks {listed(setting['tasks'])}, {setting['images']:,} images in batches "
        f"of {setting['batch']}, seeds {listed(setting['seeds'])}."
    )
    if 0 < setting["permuted"] < setting["images"]:
        text += (
            f" With permuted labels the first {setting['permuted']:,} images were read: differences are paired by "
            "image and of these alone."
        )
    if seconds:
        text += f" Per seed: {seconds}."
    if not math.isnan(cpu):
        text += f" CPU time in all: {cpu / 3600:.2f} h."
    if setting["missing"]:
        text += f"\n\n> Not measured yet: {'; '.join(setting['missing'])}."
    return text


# --- sentences that follow the numbers --------------------------------------------------------------------------------


def _conclusions(setting: Found) -> str:
    lines = [_order(setting, kind, part) for kind in (BLOCKS, PAIRS) for part in ("within", "across")]
    lines += [_against_random(setting), _variance(setting), _ratio(setting), _against_permuted(setting)]
    lines += [
        _beside_chance(setting),
        _learnt(setting),
        *tables.best_warning(setting).replace("- ", "The warning, ").splitlines(),
    ]
    return "\n".join(f"- {line}" for line in lines if line)


def _order(setting: Found, kind: str, part: str) -> str:
    """At which shares of the training the order of blocks or pairs is noise, weak or clear."""
    texts, few = [], []
    for space in SPACES:
        words: dict[str, list[str]] = {}
        for share, found in setting["by_share"].items():
            value = found["profiles"][kind][space][part][f"{AT_IMAGES}"]
            if not math.isnan(value[0]):
                words.setdefault(tables.verdict(value), []).append(share_name(share))
                if tables.verdict(value) == UNKNOWN and share == setting["near"]:
                    few.append(f"{plain(value[0], 2)} in the {space} space")
        known = [f"{word} at {listed(words[word])}" for word in tables.VERDICTS if word in words]
        if known:
            texts.append(f"{space} space: {'; '.join(known)}")
    if few:
        texts.append(f"{' and '.join(few)} at {share_name(setting['near'])}, of too few models for an interval")
    what = f"Order of {KINDS[kind]}, "
    what += {"within": f"within one model, {AT_IMAGES} images", "across": "common to all models"}[part]
    return f"{what}. {'. '.join(text[0].upper() + text[1:] for text in texts)}." if texts else ""


def _against_random(setting: Found) -> str:
    """Where plans of two samples overlap by more than random ones."""
    expected, texts = setting["random"][BLOCKS]["expected"], []
    for space in SPACES:
        words: dict[str, list[str]] = {}
        for share, found in setting["by_share"].items():
            one = tables.of_samples(setting, found, BLOCKS, space)
            if one and not math.isnan(one["overlap"][0]):
                words.setdefault(_beside(one["overlap"], expected), []).append(share_name(share))
        if words:
            texts.append(f"{PLANS[space]}: " + "; ".join(f"{word} at {listed(at)}" for word, at in words.items()))
    return (
        f"Plans of two samples of {tables.sample_size(setting)} images, against random ones. {'. '.join(texts)}."
        if texts
        else ""
    )


def _beside(overlap: Sequence[float], expected: float) -> str:
    _, low, high = overlap
    if math.isnan(low):
        return "no interval, as all agree or samples are too few,"
    return "better" if low > expected else "worse" if high < expected else "no better than random"


def _variance(setting: Found) -> str:
    """What the variance of a pair's rate in a block is made of."""
    texts = []
    for space in SPACES:
        shares = near(setting)["variance"][space]["shares"]
        parts = sorted(((of[0], name) for name, of in shares.items() if of[0] >= 0.005), reverse=True)
        texts.append(f"{space} space: " + listed([f"{name} {plain(100 * part, 0)} %" for part, name in parts]))
    return (
        f"Variance of a pair's rate in a block from {AT_IMAGES} images, {share_name(setting['near'])} of the training "
        f"(estimates). {'. '.join(text[0].upper() + text[1:] for text in texts)}."
    )


def _ratio(setting: Found) -> str:
    """At which r the order of blocks is most reliable, and whether that is surely more than at the default."""
    texts, default = [], f"{setting['default_ratio']:g}"
    for space in SPACES:
        found = {ratio: one[space]["reliability"] for ratio, one in setting["details"]["by_ratio"].items()}
        known = {ratio: of for ratio, of in found.items() if not math.isnan(of[0])}
        if not known:
            continue
        best = max(known, key=lambda ratio: known[ratio][0])
        text = f"{space} space: r = {best}, {bracket(known[best])}"
        if best != default and default in known:
            is_apart = known[best][1] > known[default][2]
            text += f" against {bracket(known[default])} at {default}" + ("" if is_apart else ", intervals overlap")
        texts.append(text)
    return (
        f"Most reliable order of blocks within one model at {AT_IMAGES} images, {share_name(setting['near'])} of the "
        f"training, of r = {listed([*setting['details']['by_ratio']])}. "
        f"{'. '.join(text[0].upper() + text[1:] for text in texts)}."
    )


def _against_permuted(setting: Found) -> str:
    texts = []
    for space in SPACES:
        every = near(setting)["rates"]["all"][space]
        apart = every.get("difference")
        if apart is not None:
            sure = "surely " if apart[1] > 0 or apart[2] < 0 else "not surely "
            text = f"{percent(apart, sign=True)} points in the {space} space, {sure}other than 0 in these models; "
            over = every["difference_over_seeds"]
            if math.isnan(over[1]):
                by_seed = [plain(100 * value, 1, sign=True) for value in every["difference_by_seed"]]
                text += f"by model {listed(by_seed)}"
            else:
                word = "surely" if over[1] > 0 or over[2] < 0 else "not surely"
                text += (
                    f"over models of other seeds [{', '.join(plain(100 * x, 1, sign=True) for x in over[1:])}], {word}"
                )
            texts.append(text)
    if not texts:
        return ""
    return f"Rate less that with labels of other images, {share_name(setting['near'])} of the training: " + (
        f"{'. '.join(texts)}."
    )


def _beside_chance(setting: Found) -> str:
    """How many blocks and pairs surely have another rate than chance, and than with permuted labels."""
    rates, items, texts = near(setting)["rates"], setting["details"]["items"], []
    for space in SPACES:
        for kind in (BLOCKS, PAIRS):
            own, apart = rates[kind][space], items[kind][space].get("difference", [])
            text = f"{_sure(own, CHANCE)} of {len(own)} {KINDS[kind]}"
            texts.append(text + (f" ({_sure(apart, 0)})" if apart else "") + f" in the {space} space")
    return (
        f"Surely other than 50 % in these models, each by itself, and in brackets other than with permuted labels, "
        f"{share_name(setting['near'])} of the training: {', '.join(texts)}."
    )


def _sure(intervals: Sequence[Sequence[float]], what: float) -> int:
    return sum(low > what or high < what for _, low, high in intervals)


def _random(setting: Found) -> str:
    one = setting["random"][BLOCKS]
    return (
        f"{plain(one['expected'], 2)} in the mean, 95 % of them by {plain(one['low'], 2)} to {plain(one['high'], 2)}, "
        f"and are equal with a probability of {one['equal']:.2g}"
    )


def _averaging(setting: Found, at: str) -> list[str]:
    if not tables.averaging_is_there(setting):
        return []
    return [
        f"Averaging before the sign, {at}. *Sharpness* is the spread of the rates between blocks or pairs over what "
        "the images' noise alone would give, 1 being noise; the correlation is that of the ranks with those without "
        "averaging. The interval of the sharpness is "
        "over images; the rest are means over models, with Student's interval from three on.",
        tables.averaging_table(setting),
    ]


def _own_space(setting: Found) -> str:
    found = setting["details"]["own_space"]
    if not found:
        return ""
    texts = [
        f"block rates in the {space} space by {percent(found[space]['difference'], 2)} points in the mean, so that the "
        f"plans of a sample by both overlap by {bracket(found[space]['same_plan'])}"
        for space in SPACES
    ]
    return (
        f"A token space of its own, which the product's analysis of {found['images']:,} images would have, instead of "
        f"that of all images moves {'; '.join(texts)}."
    )


def _learnt(setting: Found) -> str:
    gains = near(setting)["label_gains"]
    if not gains:
        return ""
    texts = [f"{task} {percent(of)}" for task, of in gains.items()]
    return (
        f"How much lower the losses are with the images' own labels, {share_name(setting['near'])} of the training, in "
        f"%: {listed(texts)}. Heads without a gain have not learnt, whatever the share of the training."
    )


def _label_gains(setting: Found) -> list[str]:
    gains = tables.label_gains_table(setting)
    if not gains:
        return []
    return [
        "Whether a head has learnt anything its losses tell: by how much they are lower with the images' own labels "
        "than with those of other images, in %, mean over models:",
        gains,
    ]


def _warning(setting: Found) -> list[str]:
    if not setting["warning"]:
        return []
    return [
        "### The warning",
        "How often samples of so many images would be warned of, in % with Wilson's intervals, by share of the "
        "training (real labels) and with permuted labels; the separation is the share warned of at 0 % of the training "
        "less the mean of the others: 1 is perfect, 0 is useless. It takes all heads for trained after 0 %; one that "
        "has learnt nothing is rightly warned of, which counts against the warning.",
        *_label_gains(setting),
        tables.criteria_list(),
        tables.warning_table(setting),
        tables.best_warning(setting),
        tables.by_rate_sentences(setting),
    ]
