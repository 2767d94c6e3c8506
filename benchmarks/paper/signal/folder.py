"""A folder of measurements: one setting, some seeds, some moments of the training."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..report.folder import number
from ..results import read_experiment
from .heads import HeadLosses, heads_file
from .measurement import TOKENS, Measurement

KEYS = {"experiment": str, "data": str, "title": str, "settings": dict, "seeds": list, "shares": list, "facts": dict}
SAME = ("tasks", "blocks", "ratios", "batch", "sample")
"""What the measurements of a folder have in common."""


@dataclass(frozen=True)
class Setting:
    """What ``experiment.json`` says, and which measurements are there."""

    path: Path
    content: dict[str, Any]
    files: dict[tuple[int, float], Path]
    """(seed, share of the training) -> the file, in the order of the experiment."""

    @property
    def title(self) -> str:
        return self.content["title"]

    @property
    def seeds(self) -> list[int]:
        return self.content["seeds"]

    @property
    def shares(self) -> list[float]:
        return self.content["shares"]

    @property
    def missing(self) -> list[tuple[int, float]]:
        """(seed, share) of every measurement that the experiment has and the folder has not yet."""
        return [(seed, share) for seed in self.seeds for share in self.shares if (seed, share) not in self.files]

    @property
    def seconds(self) -> dict[str, dict[str, float]]:
        """Seed -> what took how many seconds, as far as it is known; ``cpu`` is the time of all threads."""
        by_seed = self.content.get("seconds")
        if not isinstance(by_seed, dict):
            return {}
        return {
            seed: {str(what): number(value) for what, value in row.items()}
            for seed, row in by_seed.items()
            if isinstance(row, dict)
        }

    @property
    def cpu_seconds(self) -> float:
        """Of all seeds; NaN where nothing is said of it."""
        by_seed = [row["cpu"] for row in self.seconds.values() if "cpu" in row]
        return sum(by_seed) if by_seed else number(self.content.get("cpu_seconds"))

    def load(self, seed: int, share: float, like: Measurement | None = None) -> Measurement:
        """A measurement, checked against its name and against another one of the folder.

        Raises:
            ValueError: it is damaged or is of another model; the message names the file.
        """
        path = self.files[seed, share]
        found = Measurement.load(path)
        if (found.seed, found.share) != (seed, share):
            raise ValueError(
                f"{path} is of seed {found.seed} and share {found.share}. Its name says otherwise: remove it"
            )
        if TOKENS not in found.views:
            raise ValueError(f"{path} lacks the view {TOKENS!r}: remove it to measure again")
        if like is not None:
            sizes = len(found.views[TOKENS].valid), len(like.views[TOKENS].valid)
            for what, own, other in (
                *((name, getattr(found, name), getattr(like, name)) for name in SAME),
                ("number of images", *sizes),
                ("views", list(found.views), list(like.views)),
            ):
                if own != other:
                    raise ValueError(
                        f"{path} has other {what} than the first measurement of its folder: {own!r}, not {other!r}. "
                        "Remove it to measure again"
                    )
        return found

    def heads(self, seed: int, share: float, like: Measurement) -> HeadLosses | None:
        """Of the same moment, where they are there.

        Raises:
            ValueError: they are damaged or of other tasks than the measurement; the message names the file.
        """
        path = heads_file(self.files[seed, share])
        if not path.exists():
            return None
        found = HeadLosses.load(path)
        if found.tasks != like.tasks:
            raise ValueError(
                f"{path} is of the tasks {found.tasks}, its measurement of {like.tasks}. Remove it to measure again"
            )
        return found


def file_name(seed: int, share: float) -> str:
    return f"seed-{seed}.share-{round(100 * share)}.npz"


def read_folder(path: Path) -> Setting:
    """Read ``experiment.json`` and the names in ``measured/``; the measurements themselves are read one by one.

    Raises:
        ValueError: something is missing or of another experiment, or there is no measurement yet; the message names it.
    """
    content = read_experiment(path)
    where = path / "experiment.json"
    for key, kind in KEYS.items():
        if not isinstance(content.get(key), kind):
            raise ValueError(f"{where} must have {key!r}, a JSON {kind.__name__}, got {content.get(key)!r}")
    if content["experiment"] != "signal":
        raise ValueError(f"{where} is of the experiment {content['experiment']!r}, expected 'signal'")
    names = {file_name(seed, share): (seed, share) for share in content["shares"] for seed in content["seeds"]}
    there = {file.name: file for file in sorted((path / "measured").glob("*.npz"))}
    unknown = [name for name in there if name not in names]
    if unknown:
        raise ValueError(f"{path / 'measured' / unknown[0]} is of no seed and share of {where}: remove it")
    if not there:
        raise ValueError(f"{path / 'measured'} holds no measurement yet: nothing to report")
    return Setting(path, content, {key: there[name] for name, key in names.items() if name in there})
