"""What is compared with what: the tables and figures of the paper, and the questions that it leaves open."""

from dataclasses import dataclass

from .arms import Arm
from .combinations import ARMS as COMBINATIONS
from .structures import ARMS as STRUCTURES
from .structures import SINGLES

ARMS: dict[str, Arm] = {**COMBINATIONS, **STRUCTURES}
"""Every arm by its name, which names its files too."""


@dataclass(frozen=True)
class Experiment:
    """Arms that are compared. What they have in common stands in the options of the command."""

    title: str
    arms: tuple[str, ...]


RANDOM = ("random", *(f"random-{n}" for n in range(2, 9)))
"""Random plans of a seed."""
_OPTIMISERS = ("graddrop", "mgda", "uw", "dwa", "pcgrad", "cagrad", "imtl", "aligned", "nash", "famo")
EXPERIMENTS = {
    "pilot": Experiment("how far seeds lie apart: joint training and TM + TE", ("joint", "tm+te")),
    "methods": Experiment("table 1: modulation, expansion, both", ("single", "joint", "tm", "te", "tm+te")),
    "placement": Experiment(
        "tables 2 and 13: which blocks",
        ("joint", "longer", "tm+te", "gains", "pairs", *RANDOM, "reverse", "swap", "first-half", "last-half", "all"),
    ),
    "optimisers": Experiment("tables 3, 8, 9, 10: other ways to train", ("single", "joint", *_OPTIMISERS, "tm+te")),
    "neighbours": Experiment(
        "methods that the paper leaves out", ("joint", "invpt-weights", "config", "igb", "rep-mtl", "tm+te")
    ),
    "recon": Experiment("table 7: parameters of a task's own for whole layers", ("joint", "recon", "tm+te")),
    "modulator": Experiment("table 11: affine or batch norm", ("joint", "tm+te", "batch-norm")),
    "freezing": Experiment("table 12: the backbone frozen or not", ("joint", "tm+te", "frozen")),
    "conflicts": Experiment("table 14: conflicts before and after", ("joint", "tm", "te", "tm+te")),
    "timing": Experiment("figure 3: when to expand", ("joint", "after-0", "after-25", "after-50", "after-75")),
    "ratio": Experiment("figure 5: r of the token space", ("joint", "r-1", "r-10", "tm+te", "r-500", "r-1000")),
    "share": Experiment("figure 6: how many blocks", ("joint", "share-25", "tm+te", "share-75", "all")),
    "adapters": Experiment(
        "what as many parameters do elsewhere",
        ("joint", "tm+te", "t-1", "shared", "lora", "bitfit", "norm-affine", "prompts", "longer"),
    ),
    "compare": Experiment(
        "does it pay, and do conflicts choose better than chance",
        ("joint", "longer", "tm+te", *RANDOM[:3], "last-half", "all", "shared", "lora"),
    ),
    "prediction": Experiment(
        "what predicts a block's gain: one of the first six blocks at a time",
        ("joint", *(f"{kind}-at-{index}" for kind in ("tm", "te") for index in range(6))),
    ),
    "scale": Experiment(
        "premise and scale: joint training and TM + TE, frozen, in groups, with an aggregator",
        ("joint", "tm+te", "joint-frozen", "frozen", "grouped", "imtl-after-50", "imtl+tm+te"),
    ),
    "everything": Experiment(
        "every arm that every backbone has, with one random plan",
        tuple(arm for arm in ARMS if arm not in SINGLES and arm not in RANDOM[1:]),
    ),
}
