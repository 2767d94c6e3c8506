"""One run from its first step, or from where it was, to its JSON."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import dtme

from ..arms import Arm, Combination, Facts, Setting
from ..data import open_data
from ..models import build
from ..results import FORMAT, Run, read_run, run_path, write_json
from ..tasks import losses_of, scored
from .batches import InOrder, items_to_read, splits, training_batches
from .config import Config
from .measures import (
    conflicts_of,
    one_at_a_time,
    peak_memory,
    reset_peak_memory,
    run_facts,
    what_is_not_finite,
)
from .schedule import is_done
from .together import rank_and_world, share_buffers
from .training import Diverged, Training


@dataclass(frozen=True)
class Workplace:
    """Where a run leaves what it needs to go on, and whom it tells."""

    out: Path
    tell: Callable[[str, int], None] = lambda what, step: None
    """What is being done, and how many steps of training are done."""
    save_every: float = 60.0
    """Seconds between two savings of a training."""
    loader_workers: int = 0
    tensorboard: bool = False
    stop: Callable[[], bool] = lambda: False
    """Asked after every step; whether to save and leave."""

    def checkpoint(self, config: Config) -> Path:
        return self.out / "work" / f"{config.name}.pt"

    def trunk(self, config: Config, step: int, kind: str) -> Path:
        """Of the joint training of a seed up to a step, and what was read from it."""
        parts = ("trunk", config.task, f"lr-{config.trunk_lr:g}", f"seed-{config.seed}", f"step-{step}", kind)
        return self.out / "work" / ".".join(part for part in parts if part)


class Stopped(Exception):
    """The run was asked to stop; it goes on from there when it is started again."""


class RunOfArm:
    """One arm and seed: ``run()`` returns the JSON that ``results`` describes, and writes it."""

    def __init__(self, config: Config, arm: Arm, place: Workplace) -> None:
        self.config, self.arm, self.place = config, arm, place
        self.rank, self.world = rank_and_world()
        share = config.expand_at if arm.start is None else arm.start
        self.branch = 0 if config.task or self._trains_otherwise else round(share * config.steps)
        """The step at which the arm leaves the joint training that arms of a seed share."""
        self.data = splits(open_data(config.data, config.options), config)
        if self.world > 1:
            reason = arm.combination(self.data.tasks).one_device_only
            if reason:
                raise ValueError(f"arm {config.arm!r} trains on one device only: {reason}")
            if config.batch % self.world:
                raise ValueError(f"--batch must be a multiple of the {self.world} processes, got {config.batch}")

    @property
    def _trains_otherwise(self) -> bool:
        """Whether the arm's own way of training starts at the first step."""
        return self.arm.start is None and self.arm.combination is not Combination

    # --- data and model ----------------------------------------------------------------------------------------------

    def _begun(self, combination: Combination) -> Training:
        """A training before its first step: untrained heads on the backbone; a task alone has the same head."""
        model = build(self.data, self.config.backbone, self.config.seed, self.config.decoder)
        if self.config.task is not None:
            model = dtme.MultiTaskModel(
                model.backbone, {self.config.task: model.heads[self.config.task]}, features=model.features
            )
        training = Training(model.to(self.config.device), combination, self.config.steps, self.config.seed)
        training.facts["peak_memory"] = 0
        training.facts["parameters"] = {
            name: sum(p.numel() for p in part.parameters())
            for name, part in (("backbone", model.backbone), ("heads", model.heads))
        }
        return training

    @property
    def _tasks(self) -> dict[str, Any]:
        task = self.config.task
        return dict(self.data.tasks) if task is None else {task: self.data.tasks[task]}

    def _batches(self, first: int, last: int) -> Iterator[Any]:
        return training_batches(
            self.data.train,
            self.config,
            first,
            last,
            workers=self.place.loader_workers,
            rank=self.rank,
            world=self.world,
        )

    # --- training ----------------------------------------------------------------------------------------------------

    def run(self) -> Run:
        torch.set_num_threads(self.config.threads)
        with self._alone(self.place.checkpoint(self.config)):  # a worker whose parent was killed may be at it still,
            if self.world == 1 and is_done(self.config, self.place.out):  # and have ended it meanwhile
                return read_run(run_path(self.place.out, self.config.name))
            return self._run()

    def _run(self) -> Run:
        writer = self._writer()
        status, reason, metrics, conflicts = "done", None, {}, {}
        training = self._resumed()
        try:
            if training is None:
                training = self._shared()
                self._build(training)
            self._train(training, training.steps, self.place.checkpoint(self.config), self._decisive, writer)
            self.place.tell("evaluating", training.step)
            with training.timed("evaluation"):
                metrics = self.evaluate(training.model)
            if writer is not None:
                for name, value in metrics.items():
                    if value is not None:
                        writer.add_scalar(f"metric/{name}", value, training.step)
            conflicts = self._conflicts_at_end(training)
        except Diverged as error:
            status, reason = "diverged", str(error)
            metrics = dict.fromkeys(self._tasks)
        content = self._json(training, status, reason, metrics, conflicts)
        if self.rank == 0:
            write_json(run_path(self.place.out, self.config.name), content)
            self.place.checkpoint(self.config).unlink(missing_ok=True)
        if writer is not None:
            writer.close()
        return content

    def _resumed(self) -> Training | None:
        path = self.place.checkpoint(self.config)
        if not path.exists():
            return None
        training = Training.load(path, self.config.device, self._decisive)
        self.place.tell("going on", training.step)
        return training

    @property
    def _decisive(self) -> dict[str, Any]:
        """Settings of what is saved of the arm's own part."""
        own = {name: getattr(self.config, name) for name in ("arm", "task", "seed", "lr")}
        return self.config.settings | own | {"processes": self.world}

    @property
    def _decisive_of_trunk(self) -> dict[str, Any]:
        """Settings of what is saved of the joint part, which the arms share."""
        settings = {name: value for name, value in self.config.settings.items() if name != "expand_at"}
        return settings | {"seed": self.config.seed, "processes": self.world}

    def _shared(self) -> Training:
        """The joint training of the seed up to where the arm leaves it, or a training before its first step."""
        if self.branch == 0:
            return self._begun(self._combination())
        training = self.joint_part()
        training.combination = self._combination()
        return training

    def _build(self, training: Training) -> None:
        """Give a training the arm's structure and its learning rate."""
        self.place.tell("building", training.step)
        if self.config.task is None:  # a task alone has no conflicts, and nothing to share
            setting = self._setting(training)
            with self._alone(self._report), self._or_diverged(training):
                if self.config.conflicts and not self._trains_otherwise:
                    with training.timed("analysis"):
                        training.facts["start"] = conflicts_of(setting.report)
                with training.timed("structure"):
                    torch.manual_seed(self.config.seed)  # what is added starts from draws
                    training.model, facts = self.arm.structure().apply(setting)
            training.facts["structure"] = facts
            if "passes" in facts:  # of all blocks that a step of the reference takes, where one of the arm takes one
                more = round((self.config.steps - self.branch) * (facts["passes"] - 1))
                training.lengthen(self.config.steps + more)
            training.model.to(self.config.device)
        training.train_with(self.config.lr, self.config.weight_decay)
        training.facts["peak_memory"] = 0  # not that of the joint part, which another run may have trained

    @contextmanager
    def _or_diverged(self, training: Training) -> Iterator[None]:
        """Analyses refuse numbers that are not finite. Where it is the model that makes them, it has diverged."""
        try:
            yield
        except ValueError as error:
            what = what_is_not_finite(training.model, self.to_read(), self._tasks)
            if what is None:
                raise
            raise Diverged(f"{what} after {training.step} steps") from error

    def _combination(self) -> Any:
        return self.arm.combination(self._tasks).to(self.config.device)

    @property
    def _report(self) -> Path:
        """Of the analysis where the arms of the seed leave the joint part."""
        return self.place.trunk(self.config, self.branch, "report.json")

    def _setting(self, training: Training) -> Setting:
        return Setting(
            training.model,  # type: ignore[arg-type]
            self.to_read(),
            self._tasks,
            self.config.seed,
            num_tokens=self.config.num_tokens,
            modulation=self.config.modulation,
            expansion=self.config.expansion,
            file=self._report,
        )

    def to_read(self) -> InOrder:
        indices = items_to_read(self.config, len(self.data.train))[self.rank :: self.world]
        return InOrder(self.data.train, indices, self.config.batch, self.config.device, self.place.loader_workers)

    def _alone(self, path: Path) -> AbstractContextManager[None]:
        """The only one of the runs at once that makes a file which they share."""
        return nullcontext() if self.world > 1 else one_at_a_time(path)

    def joint_part(self) -> Training:
        """Jointly trained, all losses weighing 1, up to the branch: by the first arm of the seed that needs it.

        What was trained so far before, for an earlier branch or until a kill, is gone on with.
        """
        path = self.place.trunk(self.config, self.branch, "pt")
        with self._alone(path):
            if not path.exists():
                unfinished = path.with_suffix(".part.pt")
                begun = next((file for file in (unfinished, *self._earlier_trunks()) if file.exists()), None)
                if begun is not None:
                    training = Training.load(begun, self.config.device, self._decisive_of_trunk)
                    self.place.tell("going on", training.step)
                else:
                    training = self._begun(Combination(self._tasks))
                    training.train_with(self.config.trunk_lr, self.config.weight_decay)
                self._train(training, self.branch, unfinished, self._decisive_of_trunk, None)
                if self.rank == 0:
                    training.save(path, self._decisive_of_trunk)
                    unfinished.unlink(missing_ok=True)
        if self.world > 1:
            dist.barrier()
        return Training.load(path, self.config.device, self._decisive_of_trunk)

    def _earlier_trunks(self) -> list[Path]:
        """Those of the seed that were trained to a step before the branch, the last first."""
        return [self.place.trunk(self.config, step, "pt") for step in reversed(range(self.branch))]

    def _train(self, training: Training, last: int, checkpoint: Path, decisive: dict[str, Any], writer: Any) -> None:
        """Up to step ``last``, saved every so many seconds and when it has to stop."""
        saved = time.monotonic()
        reset_peak_memory(self.config.device)

        def keep_peak() -> None:
            training.facts["peak_memory"] = max(training.facts["peak_memory"], peak_memory(self.config.device))

        def each(training: Training) -> None:
            nonlocal saved
            self.place.tell("training", training.step)
            if writer is not None and training.step % 10 == 0:
                for name, loss in training.last_losses().items():
                    writer.add_scalar(f"loss/{name}", loss, training.step)
            stops = self.place.stop()
            if stops or (time.monotonic() - saved > self.place.save_every and training.step < last):
                keep_peak()
                if self.rank == 0:
                    training.save(checkpoint, decisive)
                saved = time.monotonic()
            if stops:
                raise Stopped

        training.run(self._batches(training.step, last), self._tasks, each)
        keep_peak()

    # --- what is measured --------------------------------------------------------------------------------------------

    def evaluate(self, model: Any) -> dict[str, float | None]:
        """{task: its metric over the validation split}; None where it is not defined."""
        indices = range(len(self.data.val))[self.rank :: self.world]
        share_buffers(model)
        workers = self.place.loader_workers
        batches = InOrder(self.data.val, indices, self.config.batch, self.config.device, workers)
        values = {}
        for name, meter in scored(model, self._tasks, batches).items():
            if self.world > 1:
                meter.all_reduce_()
            value = meter.compute()
            values[name] = value if math.isfinite(value) else None
        return values

    def _conflicts_at_end(self, training: Training) -> Facts:
        start = training.facts.get("start", {})
        if not self.config.conflicts or self.config.task or not isinstance(training.model, dtme.MultiTaskModel):
            return {"start": start} if start else {}
        self.place.tell("analysing", training.step)
        with training.timed("analysis"), self._or_diverged(training):
            report = dtme.analyze(training.model, self.to_read(), losses_of(self._tasks), progress=False)
        return ({"start": start} if start else {}) | {"end": conflicts_of(report)}

    def _json(self, training: Training | None, status: str, reason: str | None, metrics: Any, conflicts: Any) -> Run:
        content: Run = {
            "format": FORMAT,
            "arm": self.config.arm,
            "task": self.config.task,
            "seed": self.config.seed,
            "status": status,
            "reason": reason,
            "settings": self.config.settings | {"lr": self.config.lr, "branch": self.branch, "processes": self.world},
            "facts": run_facts(),
            "metrics": metrics,
            "peak_memory": training and training.facts["peak_memory"],
            "conflicts": conflicts,
        }
        if training is None:  # diverged before the arm began
            nothing: Run = {key: {} for key in ("losses", "seconds", "parameters", "structure", "combination")}
            return content | nothing | {"cpu_seconds": 0.0}
        structure = training.facts.get("structure", {"added": 0})
        return content | {
            "losses": training.losses(),
            "seconds": dict(training.seconds),
            "cpu_seconds": training.cpu_seconds,
            "parameters": training.facts["parameters"]
            | {"added": structure["added"], "combination": sum(p.numel() for p in training.combination.parameters())},
            "structure": structure,
            "combination": training.combination.facts(),
            "weights": training.digest(),
        }

    def _writer(self) -> Any:
        if not self.place.tensorboard or self.rank:
            return None
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.place.out / "tensorboard" / self.config.name))
