"""What is compared with what: the tables and figures of the paper, and the questions that it leaves open."""

from dataclasses import dataclass

from .arms import Arm
from .combinations import ARMS as COMBINATIONS
from .structures import ARMS as STRUCTURES

ARMS: dict[str, Arm] = {**COMBINATIONS, **STRUCTURES}
"""Every arm by its name, which names its files too."""


@dataclass(frozen=True)
class Experiment:
    """Arms that are compared; what is common to them stands in the options of the command."""

    title: str
    arms: tuple[str, ...]


EXPERIMENTS = {
    "pilot": Experiment("how much seeds differ: joint training and TM + TE", ("joint", "tm+te")),
}
