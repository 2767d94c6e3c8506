"""A training that can be put down after any step and taken up again, to the same bits."""

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dtme.comparison.training import POWER
from dtme.files import write_beside

from ..arms import Batch, Combination
from ..tasks import Tasks
from .batches import seed_at
from .config import differences
from .together import average_gradients, in_any_process

PARTS = 10
"""Of a training, whose mean losses a run keeps."""


class Diverged(Exception):
    """A loss is not finite: the message names the task and the step."""


class Training:
    """A model in training: everything that the next step depends on, pickled as one.

    Random draws of a step, dropout's for example, come from a seed of that step: so no state of a generator is part of
    it, and arms that share a seed share them.
    """

    def __init__(self, model: nn.Module, combination: Combination, steps: int, seed: int) -> None:
        self.model, self.combination = model, combination
        self.steps, self.seed, self.step = steps, seed, 0
        self.settings: dict[str, Any] = {}
        """That decide it, as the last ``save`` was told."""
        self.history = torch.full((steps, len(combination.names)), math.nan)
        self.seconds: dict[str, float] = {}
        self.cpu_seconds = 0.0
        self.facts: dict[str, Any] = {}
        self.optimizer: torch.optim.Optimizer | None = None

    def train_with(self, lr: float, weight_decay: float) -> None:
        """From here on at this learning rate. What was trained before keeps the moments that its gradients have."""
        self.combination.prepare(self.model)
        groups = [g for g in self.model.parameter_groups(lr, weight_decay) if g["params"]]  # type: ignore[operator]
        if own := list(self.combination.parameters()):
            groups.append({"params": own, "lr": lr, "weight_decay": 0.0})
        before = {} if self.optimizer is None else self.optimizer.state
        # one call for all parameters, where a loop over them takes a sixth of the step of a small network
        self.optimizer = torch.optim.Adam(groups, lr=lr, weight_decay=weight_decay, fused=True)
        for group in self.optimizer.param_groups:
            group["initial_lr"] = group["lr"]
            self.optimizer.state.update({p: before[p] for p in group["params"] if p in before})

    def run(self, batches: Iterable[Batch], tasks: Tasks, each: Callable[["Training"], None]) -> None:
        """A step per batch; ``each`` is called after every one and may raise to stop there.

        Raises:
            Diverged: a loss is not finite, or a gradient that the combination looks at, and the model keeps the
                parameters from before that step; or, at the end, a weight is not finite.
        """
        self.model.train()
        for batch in batches:
            with self.timed("training"):
                self._step(batch, tasks)
            each(self)
        for name, weight in self.model.named_parameters():
            if not weight.isfinite().all():
                raise Diverged(f"the weights of {name} are not finite after {self.step} steps")

    def lengthen(self, steps: int) -> None:
        """Train for more steps in all, along the polynomial of the new number from the next step on."""
        added = self.history.new_full((steps - self.steps, self.history.shape[1]), math.nan)
        self.history, self.steps = torch.cat([self.history, added]), steps

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Count what the body takes, on top of what was counted before the run was interrupted."""
        started, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - started
            self.cpu_seconds += time.process_time() - cpu

    def _step(self, batch: Batch, tasks: Tasks) -> None:
        optimizer = self.optimizer
        assert optimizer is not None
        torch.manual_seed(seed_at(self.seed, self.step))
        factor = (1 - self.step / self.steps) ** POWER
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        optimizer.zero_grad(set_to_none=True)
        reason = ""
        try:
            losses = self.combination.step(self.model, batch, tasks)
        except FloatingPointError as error:
            reason = str(error)
        if in_any_process(bool(reason)):  # all of them stop, or the others would wait for this one
            raise Diverged(f"{reason or 'a loss is not finite in another process'} at step {self.step}")
        average_gradients(optimizer)
        optimizer.step()
        self.combination.after(self.model, batch, tasks)
        self.history[self.step] = torch.stack([losses[name].float() for name in self.combination.names])
        self.step += 1

    def last_losses(self) -> dict[str, float]:
        return dict(zip(self.combination.names, self.history[self.step - 1].tolist(), strict=True))

    def losses(self) -> dict[str, list[float]]:
        """Every task's mean loss in each of ``PARTS`` parts of the training, or in each step if these are fewer."""
        if self.step == 0:
            return {}
        parts = [part.mean(0).tolist() for part in self.history[: self.step].tensor_split(min(PARTS, self.step))]
        return {name: [part[i] for part in parts] for i, name in enumerate(self.combination.names)}

    def save(self, path: Path, settings: Mapping[str, Any]) -> None:
        """With the settings that decide it: ``load`` asks for the same.

        Raises:
            OSError: the disk is full, for example; the file that was there stays.
        """
        self.settings = dict(settings)

        def write(beside: Path) -> None:
            with beside.open("wb") as file:
                try:
                    torch.save(self, file)
                except RuntimeError as error:  # that a zip file could not be ended, after it could not be written
                    raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None

        write_beside(path, write)

    @staticmethod
    def load(path: Path, device: str, settings: Mapping[str, Any]) -> "Training":
        """What ``save`` wrote. It is a pickle, and so only ever read from the folder that the runner itself fills.

        Raises:
            ValueError: the file is damaged, of another release, or of a training with other settings.
        """
        advice = "Remove it, and what it holds is trained anew"
        try:
            training = torch.load(path, map_location=device, weights_only=False)
            was = training.settings
        except OSError:
            raise
        except Exception as error:  # what unpickling raises has no end
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(f"{path} is damaged or of another release ({reason}). {advice}") from error
        if other := differences(was, settings):
            raise ValueError(f"{path} is of a training with another {other}. {advice}, or name another --out")
        return training

    def digest(self) -> str:
        """Of every bit of the model's weights."""
        found = hashlib.sha256()
        for name, value in sorted(self.model.state_dict().items()):
            found.update(name.encode())
            if isinstance(value, Tensor):
                found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()[:16]
