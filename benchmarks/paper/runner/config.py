"""What decides a run, to the bit."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..data import Options
from ..results import run_name


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Of settings, in words; empty where all of ``now`` are the same."""
    other = [name for name in now if was.get(name) != now[name]]
    return ", ".join(f"{name} ({was.get(name)!r} there, {now[name]!r} now)" for name in other)


@dataclass(frozen=True)
class Config:
    """One run: an arm, a seed and, where every task is trained alone, a task."""

    arm: str
    seed: int
    task: str | None = None
    data: str = "rooms"
    options: Options = field(default_factory=Options)
    backbone: str = "small"
    decoder: str = "pixels"
    steps: int = 600
    batch: int = 16
    lr: float = 1e-3
    """Of the part of the training that is the arm's own, as the polynomial would have it at step 0."""
    trunk_lr: float = 1e-3
    """Likewise, of the joint training before that, which arms of a seed share."""
    weight_decay: float = 1e-6
    expand_at: float = 0.25
    """After what share of the steps an arm's structure is applied, if the arm says nothing else."""
    read: int = 1024
    """Training items that an analysis reads."""
    num_tokens: int = 6
    modulation: float = 0.5
    expansion: float = 0.5
    conflicts: bool = True
    """Whether they are measured before and after the arm's own part of the training."""
    held_out: float = 0.0
    """Share of the training items, the last ones, that stand for the validation split, which is then not looked at:
    learning rates are tuned so."""
    variant: str = ""
    """Tells runs apart that differ in their learning rate alone."""
    threads: int = 1
    device: str = "cpu"

    @property
    def name(self) -> str:
        return run_name(self.arm, self.task, self.seed, self.variant)

    @property
    def settings(self) -> dict[str, Any]:
        """As JSON holds it, without what differs between the runs of an experiment. Of a device, its kind: the number
        is the process's."""
        left_out = ("arm", "seed", "task", "lr", "variant")
        values = {name: value for name, value in self.as_dict().items() if name not in left_out}
        values["device"] = self.device.partition(":")[0]
        values["options"] = {k: v for k, v in values["options"].items() if k != "cache" and v is not None}
        return values

    def as_dict(self) -> dict[str, Any]:
        values = asdict(self)
        options = values["options"]
        for path in ("root", "cache"):
            options[path] = None if options[path] is None else str(options[path])
        for several in ("tasks", "size"):
            options[several] = None if options[several] is None else list(options[several])
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Config":
        options = dict(values["options"])
        for path in ("root", "cache"):
            options[path] = None if options[path] is None else Path(options[path])
        for several in ("tasks", "size"):
            options[several] = None if options[several] is None else tuple(options[several])
        known = {field.name for field in fields(cls)}
        return cls(**{k: v for k, v in values.items() if k in known} | {"options": Options(**options)})
