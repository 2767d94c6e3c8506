"""What is asked of the runs, and what the paper prints about it."""

from dataclasses import dataclass
from functools import cache

from ..report.beside import Entry, entries
from ..report.text import DASH, plain
from ..runner.tune import JOINT
from .folders import METHOD, RANDOM

PRINTED = {"nyud": "NYUD-v2", "pascal": "PASCAL-Context", "taskonomy": "Taskonomy"}
NOT_PRINTED = "not compared"
ADAPTERS = "adapters"
"""The group of the questions about rivals of as many parameters, which the page's first paragraph takes together."""


@dataclass(frozen=True)
class Question:
    """Whether one arm does better than another, in points of Δm."""

    key: str
    claim: str
    """As it would be if the first arm does better."""
    arm: str
    against: str
    data: tuple[str, ...] = ("nyud", "pascal")
    """Of the paper, where its numbers are looked up."""
    group: str = ""


QUESTIONS = (
    Question("joint", "TM + TE beats joint training", METHOD, JOINT),
    Question("longer", "TM + TE beats joint training of equal compute", METHOD, "longer"),
    Question("longer-joint", "longer joint training beats joint training", "longer", JOINT),
    Question("random-joint", "TM + TE in random blocks beats joint training", RANDOM, JOINT),
    Question("random", "choosing by conflict beats random blocks", METHOD, RANDOM),
    Question("reverse", "choosing by conflict beats the reverse choice", METHOD, "reverse"),
    Question("swap", "choosing by conflict beats swapped spaces", METHOD, "swap"),
    Question("last-half", "choosing by conflict beats the last half of the blocks", METHOD, "last-half"),
    Question("first-half", "choosing by conflict beats the first half of the blocks", METHOD, "first-half"),
    Question("all", "some blocks, by conflict, beat all blocks", METHOD, "all"),
    Question("gains", "choosing by conflict beats choosing by first-order gain", METHOD, "gains"),
    Question("pairs", "choosing by conflict beats choosing pairs of tasks", METHOD, "pairs"),
    Question("shared", "TM + TE beats the same modules shared by all tasks", METHOD, "shared", group=ADAPTERS),
    Question("lora", "TM + TE beats LoRA of as many parameters", METHOD, "lora", group=ADAPTERS),
    Question("bitfit", "TM + TE beats BitFit of as many parameters", METHOD, "bitfit", group=ADAPTERS),
    Question("norm-affine", "TM + TE beats own norms of as many parameters", METHOD, "norm-affine", group=ADAPTERS),
    Question("prompts", "TM + TE beats deep prompts of as many parameters", METHOD, "prompts", group=ADAPTERS),
    Question("t-1", "several task tokens beat one", METHOD, "t-1"),
    Question("frozen", "a trainable backbone beats a frozen one", METHOD, "frozen"),
    Question("joint-frozen", "with a frozen backbone, TM + TE beats joint training", "frozen", "joint-frozen"),
    Question("grouped", "modules per task beat modules per group of tasks", METHOD, "grouped"),
    Question("imtl", "TM + TE beats IMTL", METHOD, "imtl", ("taskonomy",)),
    Question("imtl-late", "TM + TE beats IMTL from half of the training on", METHOD, "imtl-after-50"),
    Question("imtl-expanded", "with IMTL, TM + TE beats the plain model", "imtl+tm+te", "imtl-after-50"),
    Question("imtl-added", "TM + TE with IMTL beats TM + TE alone", "imtl+tm+te", METHOD),
)


@cache
def _entries(data: str) -> list[Entry]:
    return entries(data)


def printed(data: str, backbone: str, arm: str) -> float | None:
    """Δm that the paper has of an arm, or that follows from the metrics that it prints; None where it has neither."""
    name = "random" if arm == RANDOM else arm
    for entry in _entries(data):
        if (entry.backbone, entry.arm) == (backbone, name):
            value = float(entry.delta_m) if entry.delta_m else entry.recomputed
            if value == value:  # not NaN
                return value
    return None


def printed_pairs(question: Question) -> list[tuple[str, float, float]]:
    """(data set and backbone, Δm of the arm that is compared with, Δm of the arm), of every place that has both."""
    found = []
    for data in question.data:
        for backbone in dict.fromkeys(entry.backbone for entry in _entries(data)):
            both = [printed(data, backbone, arm) for arm in (question.against, question.arm)]
            if both[0] is not None and both[1] is not None:
                found.append((f"{PRINTED[data]}, {backbone}", both[0], both[1]))
    return found


def printed_text(question: Question) -> str:
    """The paper's Δm from the arm that is compared with to the arm, over single-task models."""
    found = printed_pairs(question)
    texts = [f"{where}: {plain(old, 3, sign=True)} → {plain(new, 3, sign=True)}" for where, old, new in found]
    return "; ".join(texts) or NOT_PRINTED


def printed_shares() -> dict[str, float]:
    """Data set -> the share of the gain of TM + TE over joint training that random blocks have, as the paper has it."""
    shares = {}
    for data in ("nyud", "pascal"):
        joint, method, random = (printed(data, "ViT-T", arm) for arm in (JOINT, METHOD, RANDOM))
        if joint is not None and method is not None and random is not None:
            shares[PRINTED[data]] = (random - joint) / (method - joint)
    return shares


def shares_text() -> str:
    return ", ".join(f"{plain(100 * share, 0)} % on {data}" for data, share in printed_shares().items()) or DASH
