"""transformers' ``Trainer`` for a ``MultiTaskModel``: ``from dtme.trainer import MultiTaskTrainer``.

It needs transformers and accelerate, and so is not among what ``import dtme`` imports.
"""

import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import Trainer, default_data_collator

from . import saving
from .block.adapter import is_added
from .expansion_state import defining, expansion_state
from .model import MultiTaskModel
from .weights import KEY

Loss = Callable[[Any, Any], Tensor]


class MultiTaskTrainer(Trainer):
    """``Trainer`` for a ``MultiTaskModel``: labels in, losses out, and every checkpoint is a saved model.

    A sample is a mapping: what the backbone takes, by name, and ``"labels": {task: target}``. Of a batch, the tasks
    run that it has labels for. Everything else is ``Trainer``'s; what differs from it:

    - A folder that it saves holds what ``save_pretrained`` writes, so that ``MultiTaskModel.from_pretrained`` takes it.
      ``Trainer`` itself would write the weights without the plan, and would not write tied ones at all.
    - A run is resumed only by a model that is expanded in the same way. ``Trainer`` itself would leave out what the
      model has no place for.
    - What ``expand`` added is not decayed, whatever ``weight_decay``: its identity is not zero.
    - Each loss is a mean over its batch, and several batches that are accumulated count alike.
    - ``predict``, ``evaluate`` and ``compute_metrics`` see predictions and labels as ``{task: array}``.
    - Logs have the loss of each task, ``loss_<task>``, beside their weighted sum.

    Args:
        model: a ``MultiTaskModel``, expanded already; or None, with ``model_init``.
        args: ``TrainingArguments``.
        losses: ``{task: loss(prediction, target)}``, each a scalar.
        loss_weights: ``{task: weight}`` in their sum; 1 where not given.
        options: as of ``Trainer``.

    Raises:
        TypeError: the model is not a ``MultiTaskModel``: give LoRA and the like to its backbone.
        ValueError: losses or weights for unknown tasks; options of ``Trainer`` that know of one loss only.
    """

    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: nn.Module | None = None,
        args: Any = None,
        *,
        losses: Mapping[str, Loss],
        loss_weights: Mapping[str, float] | None = None,
        **options: Any,
    ) -> None:
        if options.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func knows of one loss only: give losses={task: function}")
        if getattr(args, "label_smoothing_factor", 0):
            raise ValueError(
                "label_smoothing_factor knows of one kind of labels only: leave it at 0, and smooth in the losses, as "
                "nn.CrossEntropyLoss(label_smoothing=0.1) does"
            )
        super().__init__(model, args, **options)
        known = self.multi_task_model.tasks
        for name, given in (("losses", losses), ("loss_weights", loss_weights or {})):
            if unknown := [task for task in given if task not in known]:
                raise ValueError(f"{name} are for the unknown task {unknown[0]!r}; the model's are {list(known)}")
        self.losses, self.loss_weights = dict(losses), dict(loss_weights or {})
        self.label_names = ["labels"] if self.args.label_names is None else self.label_names
        self._signature_columns: Any = self._columns()
        if options.get("data_collator") is None:
            self.data_collator = _Collator(self.data_collator)
        self._sums: dict[str, Tensor] = {}  # of every task's losses since they were logged, and how many they are
        self._evaluated: list[str] | None = None  # tasks that the first batch of an evaluation has labels of

    @property
    def multi_task_model(self) -> MultiTaskModel:
        """The model without the wrappers that a training needs."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if not isinstance(model, MultiTaskModel):
            raise TypeError(
                f"MultiTaskTrainer trains a MultiTaskModel, got {type(model).__name__}: what wraps a model, as PEFT "
                "does, has to wrap its backbone"
            )
        return model

    def _columns(self) -> list[str] | None:
        """Of a data set, what the model has any use for; None where that is not known, and all of it is kept."""
        model = self.multi_task_model
        forward = getattr(model.backbone, "forward_features", model.backbone.forward)
        parameters = inspect.signature(forward).parameters.values()
        named = [one.name for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
        if callable(model.features) or not named:
            self.args.remove_unused_columns = False
            return None
        return [*named, "x", "label", "label_ids", *self.label_names]

    # --- losses -------------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The weighted sum of the losses of the tasks that the batch has labels for, and their predictions."""
        labels = inputs.get("labels")
        if not isinstance(labels, Mapping) or not labels:
            what = "no labels" if labels is None else f"labels of type {type(labels).__name__}"
            raise ValueError(f"a batch must have 'labels', a mapping {{task: target}}; one has {what}: {list(inputs)}")
        if unknown := [task for task in labels if task not in self.losses]:
            raise ValueError(
                f"a batch has labels of {unknown[0]!r}, for which there is no loss; losses are for {list(self.losses)}"
            )
        tasks = [task for task in self.losses if task in labels]
        predictions = model(tasks=tasks, **{name: value for name, value in inputs.items() if name != "labels"})
        losses = {task: self.losses[task](predictions[task], labels[task]) for task in tasks}
        if wrong := [task for task, loss in losses.items() if not isinstance(loss, Tensor) or loss.ndim]:
            raise ValueError(f"the loss of {wrong[0]!r} must be a scalar tensor, got {_described(losses[wrong[0]])}")
        if model.training:
            for task, loss in losses.items():
                self._sums[task] = self._sums.get(task, 0.0) + torch.stack([loss.detach(), torch.ones_like(loss)])
        total = torch.stack([loss * self.loss_weights.get(task, 1.0) for task, loss in losses.items()]).sum()
        return (total, predictions) if return_outputs else total

    def log(self, logs: dict[str, float], *others: Any, **options: Any) -> None:
        """As ``Trainer``, with the mean of every task's loss since the last time."""
        if "loss" in logs:
            none = torch.zeros(2, device=self.args.device)
            sums = self.accelerator.reduce(torch.stack([self._sums.get(task, none) for task in self.losses]).float())
            logs |= {f"loss_{t}": total / n for t, (total, n) in zip(self.losses, sums.tolist(), strict=True) if n}
            self._sums.clear()
        super().log(logs, *others, **options)

    def evaluation_loop(self, *args: Any, **options: Any) -> Any:
        self._evaluated = None
        return super().evaluation_loop(*args, **options)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """Loss, ``{task: prediction}`` and ``{task: target}``; of all tasks, and no loss, where there are no labels."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs.get("labels")
        with torch.no_grad(), self.compute_loss_context_manager():
            if labels is None:
                loss, predictions = None, model(**inputs)
            else:
                loss, predictions = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss, None, None
        self._evaluated = list(predictions) if self._evaluated is None else self._evaluated
        are_joined = self.args.eval_do_concat_batches and not self.args.batch_eval_metrics
        if are_joined and predictions.keys() != set(self._evaluated):
            raise ValueError(
                f"an evaluation has batches with labels of {self._evaluated} and of {list(predictions)}, whose "
                "predictions Trainer cannot put together: evaluate each kind by itself, or with batch_eval_metrics, or "
                "only the loss (without compute_metrics)"
            )
        return loss, {task: value for task, value in predictions.items() if task not in (ignore_keys or ())}, labels

    # --- the optimizer ------------------------------------------------------------------------------------------------

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As ``Trainer``, without what ``expand`` added."""
        return [name for name in super().get_decay_parameter_names(model) if not is_added(name)]

    # --- files --------------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """What ``Trainer`` writes beside a model, and the model as ``save_pretrained`` writes it."""
        folder = output_dir or self.args.output_dir or "."
        with tempfile.TemporaryDirectory() as apart:  # it would put empty weights in the place of an earlier save's
            super()._save(apart, state_dict={})
            if self.args.should_save:
                shutil.copytree(apart, folder, ignore=shutil.ignore_patterns(saving.WEIGHTS), dirs_exist_ok=True)
        if self.args.should_save or self.is_fsdp_enabled:  # a sharded model is gathered from all processes
            self.multi_task_model.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        _check_checkpoint(resume_from_checkpoint, self.multi_task_model)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        _check_checkpoint(self.state.best_model_checkpoint or "", self.multi_task_model)
        super()._load_best_model()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """A checkpoint of another model was refused, and one of tied weights lacks the names of some on purpose."""


def _described(value: Any) -> str:
    return f"one of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _check_checkpoint(folder: str | os.PathLike[str], model: MultiTaskModel) -> None:
    """RuntimeError where ``Trainer`` would load a part of what is in ``folder``, or only a part of ``model``."""
    path = Path(folder) / saving.WEIGHTS
    if not path.is_file():
        return  # sharded, or none: Trainer knows
    with safe_open(path, framework="pt") as file:
        names, embedded = set(file.keys()), (file.metadata() or {}).get(KEY)
    config = json.loads(embedded) if embedded else {}
    differing = sorted((names | set(config.get("aliases", ()))) ^ set(model.state_dict()))
    is_other_plan = config and defining(config if config["plan"] else {}) != defining(expansion_state(model))
    if differing or is_other_plan:
        what = f"{len(differing)} names differ, as {differing[0]!r}" if differing else "its plan is another"
        raise RuntimeError(
            f"{folder} holds another model than the one that is trained ({what}): begin with that one, "
            "MultiTaskModel.from_pretrained(folder, backbone, heads), or expand a model by its plan"
        )


class _Collator:
    """transformers' default collators, which cannot take the mapping that labels are."""

    def __init__(self, rest: Any) -> None:
        self.rest = rest

    def __call__(self, samples: list[Any]) -> Any:
        if not all(isinstance(sample, Mapping) and isinstance(sample.get("labels"), Mapping) for sample in samples):
            return self.rest(samples)
        batch = self.rest([{name: value for name, value in sample.items() if name != "labels"} for sample in samples])
        labels = [{task: x for task, x in sample["labels"].items() if x is not None} for sample in samples]
        if any(one.keys() != labels[0].keys() for one in labels):
            other = next(list(one) for one in labels if one.keys() != labels[0].keys())
            raise ValueError(
                f"a batch has samples with labels of {list(labels[0])} and of {other}: all must have the same tasks. "
                "Batch them by tasks, or give a data_collator, and losses that ignore what it fills in"
            )
        columns = {task: [{"x": one[task]} for one in labels] for task in labels[0]}
        batch["labels"] = {task: default_data_collator(column)["x"] for task, column in columns.items()}
        return batch
