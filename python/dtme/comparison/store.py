"""What a comparison keeps in a folder, so that one that was ended early goes on where it was."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..analysis.folder import read_checked, write_checked
from ..checks import Record, anything, at_least, list_of, mapping_of, number, or_null, positive, text
from ..files import write_beside
from ..formats import Format
from ..plan import ExpansionPlan, check_plan
from ..report import ConflictReport
from .training import Start


@dataclass(frozen=True)
class Run:
    """One training of one arm, and how well it does on held-out data."""

    arm: str
    seed: int
    lr: float
    metrics: Mapping[str, float] | None
    """By task; None of a run that diverged."""
    diverged: str | None
    """Why, of one that did."""
    added: int
    """Parameters of the tasks' own, beyond those of the plain model."""
    compute: float | None
    """Passes through the plain model's blocks in all steps, over those of joint training at the budget."""
    steps: int
    seconds: float
    """Of training, with the joint part, and of the analysis where the arm needs one; without the evaluation."""
    start: int
    """A checksum of the weights at which the arms part."""
    plan: ExpansionPlan | None = None
    note: str | None = None
    marks: Mapping[int, int] = field(default_factory=dict)
    """Checksums of all batches so far after some of the steps."""
    held_out: int | None = None
    """A checksum of the batches that it was scored on; None of one that diverged before."""


RUN = Record(
    {
        "arm": text,
        "seed": at_least(0),
        "lr": positive,
        "metrics": or_null(mapping_of(number)),
        "diverged": or_null(text),
        "added": at_least(-(2**62)),
        "compute": or_null(positive),
        "steps": at_least(1),
        "seconds": number,
        "start": at_least(0),
        "plan": or_null(check_plan),
        "note": or_null(text),
        "marks": list_of(list_of(at_least(0))),
        "held_out": or_null(at_least(0)),
    }
)
RUN_FORMAT = Format("dtme.comparison.Run", RUN)
SETTINGS_FORMAT = Format("dtme.comparison.Settings", Record({"settings": mapping_of(anything)}))


class Memory:
    """Keeps nothing beyond this process.

    The joint part of a seed, and the report of its analysis, are kept until its arms are through.
    """

    def __init__(self) -> None:
        self._runs: dict[str, Run] = {}

    def check(self, settings: Mapping[str, Any]) -> None:
        """Whether what is there can be gone on with."""

    def open(self, settings: Mapping[str, Any]) -> None:
        """Begin, or go on with what is there."""

    def run(self, name: str) -> Run | None:
        """One that is finished, by its name; None of one that is not."""
        return self._runs.get(name)

    def add(self, name: str, run: Run) -> None:
        self._runs[name] = run

    def start(self, name: str) -> Start | None:
        return None

    def keep_start(self, name: str, start: Start) -> None:
        """Until ``forget``."""

    def report(self, name: str) -> tuple[ConflictReport, float] | None:
        """And the seconds that it took."""
        return None

    def keep_report(self, name: str, report: ConflictReport, seconds: float) -> None:
        """Until the folder is deleted: it is small."""

    def forget(self, name: str) -> None:
        """The joint part, which nobody needs any more."""


class Folder(Memory):
    """A file for every run that is finished, for the report of every seed and for the joint part that is in use.

    Raises:
        ValueError: a file in it is damaged, or it holds a comparison with other settings; the message says which.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        self.path = Path(path)

    def check(self, settings: Mapping[str, Any]) -> None:
        """ValueError naming the setting, where there is a comparison with others."""
        if (file := self._settings).exists():
            document = SETTINGS_FORMAT.load(file)
            document.check()
            _check_same(self.path, document.content["settings"], settings)

    def open(self, settings: Mapping[str, Any]) -> None:
        """Write the settings down, beside arms of one's own that are there already; ValueError where that cannot be."""
        known = SETTINGS_FORMAT.load(self._settings).content["settings"] if self._settings.exists() else {}
        merged = {**settings, "own arms": {**known.get("own arms", {}), **settings["own arms"]}}
        if merged == known:
            return
        try:
            SETTINGS_FORMAT.save(self._settings, {"settings": merged})
        except OSError as error:
            raise ValueError(f"folder {self.path} cannot be written to: {error}") from error

    def run(self, name: str) -> Run | None:
        if (known := super().run(name)) is not None:
            return known
        file = self.path / "runs" / f"{name}.json"
        if not file.exists():
            return None
        document = RUN_FORMAT.load(file)
        document.check()
        run = Run(**{**document.content, "marks": {step: value for step, value in document.content["marks"]}})
        super().add(name, run)
        return run

    def add(self, name: str, run: Run) -> None:
        content = asdict(run) | {
            "plan": None if run.plan is None else run.plan.as_dict(),
            "marks": [[step, value] for step, value in run.marks.items()],
        }
        RUN_FORMAT.save(self.path / "runs" / f"{name}.json", content)
        super().add(name, run)

    def start(self, name: str) -> Start | None:
        file = self._start(name)
        if not file.exists():
            return None
        try:
            return Start(**read_checked(file))
        except Exception as error:  # whatever torch finds wrong with it
            raise ValueError(f"{file} is damaged: {error}. Delete it, and it is trained anew") from error

    def keep_start(self, name: str, start: Start) -> None:
        write_beside(self._start(name), lambda beside: write_checked(beside, vars(start)))

    def report(self, name: str) -> tuple[ConflictReport, float] | None:
        file = self._report(name)
        if not file.exists():
            return None
        try:
            return ConflictReport.load(file), float(self._seconds(name).read_text())
        except OSError:  # the report was copied without its seconds
            return None

    def keep_report(self, name: str, report: ConflictReport, seconds: float) -> None:
        write_beside(self._seconds(name), lambda beside: beside.write_text(repr(seconds)))
        report.save(self._report(name))

    def forget(self, name: str) -> None:
        self._start(name).unlink(missing_ok=True)

    @property
    def _settings(self) -> Path:
        return self.path / "settings.json"

    def _start(self, name: str) -> Path:
        return self.path / "starts" / f"{name}.pt"

    def _report(self, name: str) -> Path:
        return self.path / "reports" / f"{name}.json"

    def _seconds(self, name: str) -> Path:
        return self.path / "reports" / f"{name}.seconds"


def _check_same(path: Path, known: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """ValueError that names the first setting that differs.

    Arms of one's own that only one of the two has do not matter: every arm has runs of its own.
    """
    for name, value in wanted.items():
        if name != "own arms" and known.get(name) != value:
            raise _another(path, name, known.get(name), value)
    for name, value in wanted["own arms"].items():
        if (was := known["own arms"].get(name, value)) != value:
            raise _another(path, f"arm {name!r}", was, value)


def _another(path: Path, name: str, was: Any, value: Any) -> ValueError:
    return ValueError(
        f"folder {path} holds a comparison with another {name}: {was!r}, not {value!r}. Give another folder, or delete "
        "that one"
    )
