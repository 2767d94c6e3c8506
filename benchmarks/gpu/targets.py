"""What the kernels are meant to reach for ViT-B, 6 x 1,024 tokens, K = T = 5, bfloat16, and whether they do."""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from benchmarks.kernels import lines

SHAPE = "ViT-B, 512 px"
# of 12 blocks, 6,144 tokens of 768 channels: the 21 lower ones of 36 tiles of 128 x 128, which any such kernel computes
COVARIANCE_OPERATIONS = 12 * 2 * 6144 * 21 * 128**2

Times = Mapping[str, float]  # seconds of a group, by rival


class Ceilings(NamedTuple):
    """Bytes, and bfloat16 operations, per second; NaN where they were not measured, and so are floors then."""

    copy: float = float("nan")
    product: float = float("nan")


class Target(NamedTuple):
    """One sentence of the plan."""

    text: str
    group: str
    ratio: Callable[[Times, Ceilings], float]
    bound: float
    at_least: bool = True

    def verdict(self, value: float | None) -> str:
        if value is None or value != value:
            return "not measured"
        met = value >= self.bound if self.at_least else value <= self.bound
        return "met" if met else "missed"


def _than(rival: str) -> Callable[[Times, Ceilings], float]:
    """How many times as long a rival takes as ours; of several that the expression matches, the fastest one."""
    return lambda times, _: _best(times, rival) / times["ours"]


def _of(rival: str) -> Callable[[Times, Ceilings], float]:
    """How many times as long ours takes."""
    return lambda times, _: times["ours"] / _best(times, rival)


def _best(times: Times, rival: str) -> float:
    found = [seconds for name, seconds in times.items() if re.fullmatch(rival, name)]
    if not found:
        raise KeyError(rival)
    return min(found)


def _of_covariance_floor(times: Times, ceilings: Ceilings) -> float:
    return times["ours"] * ceilings.product / COVARIANCE_OPERATIONS


COVARIANCE, CONFLICTS = f"covariance, {SHAPE}", f"conflicts, {SHAPE}"
NORM, ATTENTION, TRAINING = f"modulate_layer_norm, {SHAPE}", f"attention, {SHAPE}", f"training_step, {SHAPE}"
BOTH = "forward and backward"
TARGETS = (
    Target("covariance, 12 blocks: faster than 12 addmm", COVARIANCE, _than("addmm"), 2.0),
    Target("covariance, 12 blocks: times its floor", COVARIANCE, _of_covariance_floor, 1.6, at_least=False),
    Target("conflicts, float32 basis: faster than the printed formula", CONFLICTS, _than("printed"), 6.0),
    Target("conflicts, float32 basis: faster than compiled", CONFLICTS, _than("compiled"), 2.0),
    Target("conflicts, float32 basis: times one GEMM of K M x p x p", CONFLICTS, _of("GEMM"), 1.4, at_least=False),
    Target("modulation and norm, forward: faster than compiled", f"{NORM}, forward", _than("compiled"), 1.3),
    Target("modulation and norm, with backward: faster than compiled", f"{NORM}, {BOTH}", _than("compiled"), 1.3),
    Target("modulation and norm, with backward: of copy bandwidth", f"{NORM}, {BOTH}", _than("copy"), 0.75),
    Target("attention, forward: faster than SDPA of joined keys", f"{ATTENTION}, forward", _than("joined.*"), 1.1),
    Target("attention, with backward: times without task keys", f"{ATTENTION}, {BOTH}", _of("no task.*"), 1.15, False),
    Target("one task's inference: times the plain model", f"inference, {SHAPE}", _of("plain"), 1.02, False),
    Target("training step, last half: faster than 5 forwards", f"{TRAINING}, last half", _than("concatenated"), 1.5),
    Target("training step, every second", f"{TRAINING}, every second block", _than("concatenated"), 1.5),
    Target("a whole analysis: faster than printed", f"analyze, {SHAPE}", _than("printed"), 4.0),
)


def ceilings(path: Path) -> Ceilings:
    return Ceilings(**{x["name"]: x["per_second"] for x in lines.read(path, "ceiling") if "per_second" in x})


def times(path: Path) -> dict[str, dict[str, float]]:
    """{group: {rival: median seconds}}."""
    found: dict[str, dict[str, float]] = {}
    for (group, rival), line in lines.races(path).items():
        if "stats" in line:
            found.setdefault(group, {})[rival] = line["stats"]["median"]
    return found


def judge(path: Path) -> Iterator[tuple[Target, float | None]]:
    """Every target with what was measured."""
    every, reach = times(path), ceilings(path)
    for target in TARGETS:
        try:
            yield target, target.ratio(every[target.group], reach)
        except KeyError:
            yield target, None
