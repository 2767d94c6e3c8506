"""A backbone that several tasks share, with a head for each, a decoder for all, or both."""

import copy
import os
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from . import saving
from .backbone_methods import BackboneMethods
from .block.adapter import is_added
from .entry import Root
from .expanded import Expansion
from .expansion import fold
from .forwards import ANY_TASK, Opening, run
from .independence import Decoder, Example, check_independent, example_of, name_of
from .mixed_rows import RowWays, predict_mixed_rows
from .parameters import is_frozen, users_of_parameters, warn_of_frozen
from .plan import check_tasks, choose
from .replicas import watch_backward
from .sharded import entrance, in_step, is_sharded, learning_together, mesh_in_use, whole_copy
from .sharing import Call, Way, Ways
from .streams import Forward, adapters, expansions, expansions_of, running, survey
from .task_model import Features, TaskModel, features_of, given_beside
from .torch_private import calls_compiler, eagerly, is_outside_fsdp, stay_eager

Heads = Mapping[str, nn.Module] | nn.ModuleDict


class MultiTaskModel(BackboneMethods, nn.Module):
    """One backbone for several tasks, and a head for each, a decoder for all, or both; expanded by ``dtme.expand``.

    Args:
        backbone: any transformer. Called as ``backbone(**x)`` for a mapping, else ``backbone(x)``.
        heads: ``{task: module}``; names are non-empty, unique and without dots.
        features: what the heads and the decoder take. ``"tokens"``: everything the backbone returns per token,
            (B, N, p), class and register tokens included; ``"cls"``: its first token, (B, p); or
            ``features(backbone, x)``, which may return any nesting of tensors that start with the batch.
        decoder: ``decoder({task: features}) -> {task: prediction}``, which may read the features of all tasks at once,
            each of its task's own stream. What it returns for a task goes through that task's head, if it has one. A
            decoder that is to be trained, moved or saved with the model has to be a module.
        tasks: their names, in order. By default those of the heads, else those in an attribute ``tasks`` of the
            decoder, else those that the backbone was expanded for.

    Raises:
        ValueError: neither heads nor a decoder, a task name that cannot name a parameter, a head for an unknown task, a
            task for which nothing predicts, or unknown ``features``.
    """

    def __init__(
        self,
        backbone: nn.Module,
        heads: Heads | None = None,
        features: str | Features = "tokens",
        decoder: Decoder | None = None,
        tasks: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        heads = {} if heads is None and decoder is not None else heads
        if not isinstance(heads, (Mapping, nn.ModuleDict)):
            raise TypeError(f"heads must map task names to modules, got {type(heads).__name__}")
        if decoder is not None and not callable(decoder):
            raise TypeError(f"decoder must be a function or a module, got {type(decoder).__name__}")
        if len(heads) or decoder is None:
            check_tasks(list(heads))
        if isinstance(features, str) and features not in ("tokens", "cls"):
            raise ValueError(f"features must be 'tokens', 'cls' or a function, got {features!r}")
        given = () if tasks is None else check_tasks(tasks)
        if given and (unknown := [task for task in heads if task not in given]):
            raise ValueError(f"heads name the unknown task {unknown[0]!r}; tasks are {list(given)}")
        if decoder is None and (missing := [task for task in given if task not in heads]):
            raise ValueError(f"task {missing[0]!r} has no head, and there is no decoder to predict it")
        self.backbone = backbone
        self.heads = nn.ModuleDict(dict(heads.items()))
        self.features = features
        self.decoder = decoder
        _warn_of_parameters_elsewhere(self, features=features, decoder=decoder)
        self._tasks = given
        self._ways: Ways | None = None
        self._row_ways: RowWays | None = None
        self._example: Example | None = None

    def add_head(self, task: str, head: nn.Module) -> None:
        """Give it a task whose name is known to be free; ``dtme.add_task`` is what users call."""
        self._tasks = (*self._tasks, task) if self._tasks else ()
        self.heads[task] = head
        head.train(self.training)

    @property
    def tasks(self) -> tuple[str, ...]:
        """All tasks in order; empty while nothing has named them."""
        if self._tasks or len(self.heads):
            return self._tasks or tuple(self.heads)
        named = getattr(self.decoder, "tasks", None)
        if isinstance(named, (Sequence, Mapping, nn.ModuleDict)) and len(named):
            return check_tasks(named if isinstance(named, str) else list(named))
        return next((expansion.tasks for expansion in expansions(self.backbone)), ())

    def forward(
        self,
        x: Any = None,
        tasks: str | Sequence[str] | None = None,
        *,
        task_of_row: Sequence[str] | None = None,
        **inputs: Any,
    ) -> dict[str, Any]:
        """Predict.

        Args:
            x: what the backbone takes, B rows.
            tasks: a name or several; None for all. Without a decoder, streams of other tasks are not computed. A
                decoder is always given the features of all tasks, so that a task's prediction does not depend on which
                are asked for; where nothing has named the tasks, those named here are all there are.
            task_of_row: instead of ``tasks``, the task of every row: B names. Row i then runs in the stream of its task
                alone, all rows in one pass where the backbone keeps them apart; else, and a warning says why, the rows
                of one task after those of the other.
            inputs: instead of ``x``, what the backbone takes by name.

        Returns:
            ``{task: prediction}`` in the order asked for. With ``task_of_row``, of the tasks that have rows, in the
            model's order: each has its own rows alone, as they come in the batch.

        Raises:
            ValueError: unknown tasks; tasks that nothing has named; a decoder that lacks a prediction; ``task_of_row``
                of another length than the batch, or beside ``tasks``.
            TypeError: ``inputs`` beside ``x``; ``task_of_row`` is no sequence of names.
            RuntimeError: ``task_of_row`` with a decoder, which reads the features of all tasks of every row.
                Or ranks that share the weights by FSDP2 are about to run different tasks. Let all run all tasks, each
                with a loss of those that it has labels of. (Ranks of DDP may, with find_unused_parameters=True.)
        """
        if x is not None and inputs:
            raise given_beside(inputs)
        x = inputs if x is None else x
        if task_of_row is not None:
            return predict_mixed_rows(self, x, tasks, task_of_row)
        if torch.compiler.is_compiling():
            selected, needed = self.tasks_for(tasks)
            return self.predict(self.extract(x, needed), selected)
        selected, needed = eagerly(self.tasks_for, tasks)
        opening = eagerly(self._open, needed, x, calls_compiler())
        if opening is None:
            return eagerly(self.joined, self._predict_plainly(x, selected, needed))
        if opening.tasks is ANY_TASK:  # the features are those of the one task that is needed
            (features,) = opening.carry_out(run).values()
            if self.decoder is not None:
                return self.predict({needed[0]: features}, selected)
            return {selected[0]: run_head(self.heads[selected[0]], features)}
        return eagerly(self.joined, opening.carry_out(partial(self._run_and_predict, selected)))

    stay_eager(forward)

    def tasks_for(self, tasks: str | Sequence[str] | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The tasks asked for, and those whose features their predictions need."""
        known = self.tasks
        if not known and tasks is None:
            raise ValueError(
                "nothing has named the tasks of this model: give MultiTaskModel(..., tasks=[...]), a decoder with an "
                "attribute `tasks`, or name them in every call, model(x, tasks=[...])"
            )
        selected = choose(tasks, known or check_tasks([tasks] if isinstance(tasks, str) else tasks or ()))
        return selected, selected if self.decoder is None else known or selected

    def _open(self, selected: tuple[str, ...], x: Any, is_compiled: bool) -> Opening | None:
        state = survey(self.backbone)
        expansions = expansions_of(state.adapters)
        if not expansions or any(running(expansion) is not None for expansion in expansions):
            if not expansions and (mesh := mesh_in_use(self)) is not None:
                in_step(mesh, selected)
            return None
        for expansion in expansions:
            choose(selected, expansion.tasks)
        if isinstance(root := vars(self.backbone).get("_dtme"), Root):
            root.refuse_replicas(self.backbone)
        ways, call = self._ways_of(expansions), self.call_of(x)
        return Opening(ways, selected, call, state, is_compiled=is_compiled)

    def _ways_of(self, expansions: tuple[Expansion, ...]) -> Ways:
        if self._ways is None or not self._ways.are_for(expansions, self.features):
            self._ways = Ways(self, expansions, self.features)
        return self._ways

    def row_ways_of(self, expansions: tuple[Expansion, ...]) -> RowWays:
        """What is known of calls with rows of several tasks."""
        if self._row_ways is None or not self._row_ways.are_for(expansions, self.features):
            self._row_ways = RowWays(self, expansions, self.features)
        return self._row_ways

    def call_of(self, x: Any) -> Call:
        """What makes the features of ``x``, in whichever streams run."""
        return Call(self._features_of, (x,), {})

    def _features_of(self, x: Any) -> Any:
        return features_of(self.backbone, self.features, x)

    def _run_and_predict(
        self, selected: tuple[str, ...], forward: Forward, way: Way, needed: tuple[str, ...], call: Call
    ) -> dict[str, Any]:
        return self.predict(run(forward, way, needed, call), selected)

    def joined(self, predictions: dict[str, Any]) -> dict[str, Any]:
        """With one backward pass for all tasks, where the ranks of a sharded model have to learn in step."""
        if torch.is_grad_enabled() and mesh_in_use(self) is not None:
            return learning_together(predictions)
        watch_backward(predictions)
        return predictions

    def _predict_plainly(self, x: Any, selected: tuple[str, ...], needed: tuple[str, ...]) -> dict[str, Any]:
        return self.predict(dict.fromkeys(needed, self._features_of(x)), selected)

    def predict(self, features: dict[str, Any], selected: Sequence[str]) -> dict[str, Any]:
        """``{task: prediction}`` of the selected tasks.

        Args:
            features: of the selected tasks; with a decoder, of all.
        """
        if self.decoder is None:
            return {task: self.heads[task](features[task]) for task in selected}
        if not torch.compiler.is_compiling():
            self._example = example_of(features)
        found = self.decoder(features)
        if not isinstance(found, Mapping) or any(task not in found for task in selected):
            got = f"of {list(found)}" if isinstance(found, Mapping) else f"in a {type(found).__name__}"
            raise ValueError(
                f"the decoder {name_of(self.decoder)} must return {{task: prediction}} with {list(selected)}, but it "
                f"returned predictions {got}"
            )
        if others := [name for name in found if name not in features]:
            raise ValueError(
                f"the decoder {name_of(self.decoder)} returned {others[0]!r} beside predictions of {list(features)}: "
                "what belongs to a task goes with its prediction, as {task: (prediction, more)}"
            )
        return {task: self.heads[task](found[task]) if task in self.heads else found[task] for task in selected}

    def extract(self, x: Any, selected: Sequence[str]) -> dict[str, Any]:
        """``{task: features}``, from one pass where the tasks share; tensors may be views of one."""
        selected = tuple(selected)
        if torch.compiler.is_compiling():
            state = survey(self.backbone)
            expansions = expansions_of(state.adapters)
            if not expansions or expansions[0].traced is not None:
                return dict.fromkeys(selected, self._features_of(x))
            call = self.call_of(x)
            way = self._ways_of(expansions).find(selected, call, state)
            return run(Forward(expansions), way, selected, call)
        if is_outside_fsdp(self):  # called by itself, not by forward
            return entrance(self, "extract")(x, selected)
        opening = self._open(selected, x, False)
        return dict.fromkeys(selected, self._features_of(x)) if opening is None else opening.carry_out(run)

    def parameter_groups(self, lr: float = 2e-5, weight_decay: float = 1e-6) -> list[dict[str, Any]]:
        """Trainable parameters for an optimizer; what ``expand`` added is not decayed (its identity is not zero).

        An expanded model has a group of added parameters even while its plan adds none: those of a later ``replan``
        then join it, and a scheduler, which may not meet another number of groups, goes on. Where all added ones are
        frozen but others of their blocks are not, as PEFT leaves them, a warning says so (``dtme.unfreeze``).
        """
        if is_frozen(found := adapters(self.backbone)):
            warn_of_frozen(found, 1)
        named = [(name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad]
        base = [parameter for name, parameter in named if not is_added(name)]
        added = [parameter for name, parameter in named if is_added(name)]
        groups = [
            {"params": base, "lr": lr, "weight_decay": weight_decay},
            {"params": added, "lr": lr, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"] or (group is groups[1] and expansions(self.backbone))]

    def task_parameters(self, task: str) -> list[nn.Parameter]:
        """Parameters that ``task`` alone has: those of its head and those that ``expand`` gave it, frozen ones too.

        What several tasks use is none of theirs: modules of a group of several, a head given for two tasks, weights
        tied to those of the backbone.

        Raises:
            ValueError: the task is unknown.
        """
        if not isinstance(task, str):
            raise TypeError(f"task must be one name, got {task!r}")
        (task,) = choose(task, self.tasks)
        users = users_of_parameters(self, dict(self.heads.items()))
        return [parameter for parameter, tasks in users if tasks == {task}]

    def shared_parameters(self) -> list[nn.Parameter]:
        """All parameters that are not one task's alone; with every task's ``task_parameters`` they are all there are.

        They are what methods that combine the gradients of tasks (torchjd's aggregators, say) are about.
        """
        users = users_of_parameters(self, dict(self.heads.items()))
        return [parameter for parameter, tasks in users if len(tasks) != 1]

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train and how many the plan added."""
        total = sum(p.numel() for p in self.parameters())
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        added = sum(p.numel() for name, p in self.named_parameters() if is_added(name))
        share = f"{added / (total - added):.3%} of the model without them" if total > added else "all there is"
        if added and not any(p.requires_grad for name, p in self.named_parameters() if is_added(name)):
            share += ", all frozen: dtme.unfreeze(model) lets them train"
        print(f"trainable {trainable:,} of {total:,} parameters ({trainable / total:.2%}); added {added:,} ({share})")

    def save_pretrained(self, path: str | os.PathLike[str], *, expansion_only: bool = False) -> None:
        """Write ``dtme_config.json`` and ``model.safetensors`` into the folder ``path``.

        The weights carry all that is loaded again, with a checksum of every tensor. The config beside them is for
        people to read: an edit of it changes nothing, and is an error when the folder is loaded.

        Args:
            path: made if missing. An earlier save in it is replaced in one step: a crash leaves the old or the new. Of
                a model that FSDP2 or tensor parallelism shares among processes, every rank calls this and waits; the
                first gathers and writes it, and what fails there fails on all.
            expansion_only: only what ``expand`` added, to be loaded into the same pretrained backbone and heads.
        """
        saving.save(self, path, expansion_only)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        backbone: nn.Module,
        heads: Heads | None = None,
        features: str | Features | None = None,
        decoder: Decoder | None = None,
    ) -> "MultiTaskModel":
        """Rebuild what ``save_pretrained`` wrote, around a backbone, heads and a decoder of the same architecture.

        Args:
            features: as in the constructor; needed only where the saved model had a function.
            decoder: needed where the saved model had one.

        Raises:
            FileNotFoundError: ``path`` holds no saved model.
            RuntimeError: a part is shared among processes already: load the plain model on every rank, then shard it.
            ValueError: it is damaged, foreign, or of another architecture. What was given is then as it was.
        """
        return saving.load(cls, path, backbone, heads, features, decoder)

    def export_task(self, task: str, plain: bool = False) -> TaskModel:
        """An independent module for one task: its stream alone, task keys and values folded to constants.

        ``torch.export`` takes it; later changes of this model do not reach it. It is in evaluation mode. Of a
        model that FSDP2 shards, every rank calls this, and gets the whole module on the CPU.

        Args:
            plain: made of torch's own operators alone, so that ONNX takes it too, and what ``torch.export`` saves of it
                runs where this package is not installed. Else of this package's faster ones.

        Raises:
            ValueError: the task is unknown.
            RuntimeError: the decoder does not predict the task from its features alone. That is found out on random
                features of the last call's shapes: given those of the task alone it must predict the same, and neither
                the graph of the prediction nor its value may depend on those of other tasks. A decoder that stacks the
                features of its tasks in one tensor counts as one that reads them all.
        """
        if not isinstance(task, str):
            raise TypeError(f"task must be one name, got {task!r}")
        seen = () if self._example is None else self._example.tasks
        (task,) = choose(task, self.tasks or seen or (task,))
        with torch.inference_mode(False):  # a copy made in inference mode could take part in no graph
            if is_sharded(self):
                single = whole_copy(self, "export_task", torch.device("cpu")).eval()
            else:
                single = copy.deepcopy(self).eval()
            if single.decoder is not None:
                check_independent(single, single.decoder, task, self.tasks or seen, self._example)
            fold(single.backbone, task, plain)
            return TaskModel(
                single.backbone, single.features, single.decoder, dict(single.heads.items()).get(task), task
            )


def _warn_of_parameters_elsewhere(model: nn.Module, **functions: Any) -> None:
    """A method brings along what its module holds, which is then nobody's child."""
    held = {id(parameter) for parameter in model.parameters()}
    for name, function in functions.items():
        owner = getattr(function, "__self__", None)
        if isinstance(owner, nn.Module) and any(id(parameter) not in held for parameter in owner.parameters()):
            warnings.warn(
                f"{name} is a method of a {type(owner).__name__} whose parameters are not all this model's: they are "
                "not trained, moved, saved or put in evaluation mode with it, unless you do so. Give a module whose "
                "forward does what the method does, and that holds what it needs beside the backbone",
                stacklevel=3,
            )


def run_head(head: nn.Module, features: Any) -> Any:
    """A function of its own, so that heads of one kind share one compiled graph."""
    return head(features)
