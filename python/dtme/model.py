"""A backbone that several tasks share, and a head for each."""

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import saving
from .block.adapter import is_added
from .entry import Root
from .expansion import fold
from .forwards import ANY_TASK, Opening, run
from .plan import check_tasks
from .randomness import left_as_it_was
from .sharing import Call, Way, Ways
from .streams import Expansion, Forward, choose, expansions, expansions_of, running, split, survey
from .streams import tasks as streams_of
from .torch_private import calls_compiler, eagerly, stay_eager
from .trees import tensors

Heads = Mapping[str, nn.Module] | nn.ModuleDict
Features = Callable[[nn.Module, Any], Any]


class MultiTaskModel(nn.Module):
    """One backbone, one head per task; expanded in place by ``dtme.expand``.

    Args:
        backbone: any transformer. Called as ``backbone(**x)`` for a mapping, else ``backbone(x)``.
        heads: ``{task: module}``; names are non-empty, unique and without dots.
        features: what the heads take. ``"tokens"``: everything the backbone returns per token, (B, N, p), class and
            register tokens included; ``"cls"``: its first token, (B, p); or ``features(backbone, x)``, which may return
            any nesting of tensors that start with the batch.

    Raises:
        ValueError: no heads, a task name that cannot name a parameter, or unknown ``features``.
    """

    def __init__(self, backbone: nn.Module, heads: Heads, features: str | Features = "tokens") -> None:
        super().__init__()
        if not isinstance(heads, (Mapping, nn.ModuleDict)):
            raise TypeError(f"heads must map task names to modules, got {type(heads).__name__}")
        check_tasks(list(heads))
        if isinstance(features, str) and features not in ("tokens", "cls"):
            raise ValueError(f"features must be 'tokens', 'cls' or a function, got {features!r}")
        self.backbone = backbone
        self.heads = nn.ModuleDict(dict(heads.items()))
        self.features = features
        self._ways: Ways | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.heads)

    def forward(self, x: Any = None, tasks: str | Sequence[str] | None = None, **inputs: Any) -> dict[str, Any]:
        """Predict.

        Args:
            x: what the backbone takes, B rows.
            tasks: a name or several; None for all. Streams of other tasks are not computed.
            inputs: instead of ``x``, what the backbone takes by name.

        Returns:
            ``{task: prediction}`` in the order asked for.
        """
        x = inputs if x is None else x
        if torch.compiler.is_compiling():
            return self._heads_of(self.extract(x, choose(tasks, self.tasks)))
        selected = eagerly(choose, tasks, self.tasks)
        opening = eagerly(self._open, selected, x, calls_compiler())
        if opening is None:
            return self._predict_plainly(x, selected)
        if opening.tasks is ANY_TASK:
            (features,) = opening.carry_out(run).values()
            return {selected[0]: run_head(self.heads[selected[0]], features)}
        return opening.carry_out(self._predict)

    stay_eager(forward)

    def _open(self, selected: tuple[str, ...], x: Any, is_compiled: bool) -> Opening | None:
        state = survey(self.backbone)
        expansions = expansions_of(state.adapters)
        if not expansions or any(running(expansion) is not None for expansion in expansions):
            return None
        for expansion in expansions:
            choose(selected, expansion.tasks)
        if isinstance(root := vars(self.backbone).get("_dtme"), Root):
            root.refuse_replicas(self.backbone)
        ways, call = self._ways_of(expansions), self._call(x)
        return Opening(ways, selected, call, state, is_compiled=is_compiled)

    def _ways_of(self, expansions: tuple[Expansion, ...]) -> Ways:
        if self._ways is None or not self._ways.are_for(expansions, self.features):
            self._ways = Ways(self, expansions, self.features)
        return self._ways

    def _call(self, x: Any) -> Call:
        return Call(self._features_of, (x,), {})

    def _features_of(self, x: Any) -> Any:
        if callable(self.features):
            return self.features(self.backbone, x)
        tokens = backbone_tokens(self.backbone, x)
        return tokens if self.features == "tokens" else tokens[:, 0]

    def _predict(self, forward: Forward, way: Way, selected: tuple[str, ...], call: Call) -> dict[str, Any]:
        return self._heads_of(run(forward, way, selected, call))

    def _predict_plainly(self, x: Any, selected: tuple[str, ...]) -> dict[str, Any]:
        return self._heads_of(dict.fromkeys(selected, self._features_of(x)))

    def _heads_of(self, features: Mapping[str, Any]) -> dict[str, Any]:
        return {task: self.heads[task](found) for task, found in features.items()}

    def extract(self, x: Any, selected: Sequence[str]) -> dict[str, Any]:
        """``{task: features}``, from one pass where the tasks share; tensors may be views of one."""
        selected = tuple(selected)
        if torch.compiler.is_compiling():
            state = survey(self.backbone)
            expansions = expansions_of(state.adapters)
            if not expansions or expansions[0].traced is not None:
                return dict.fromkeys(selected, self._features_of(x))
            call = self._call(x)
            way = self._ways_of(expansions).find(selected, call, is_training=state.is_training)
            return run(Forward(expansions), way, selected, call)
        opening = self._open(selected, x, False)
        return dict.fromkeys(selected, self._features_of(x)) if opening is None else opening.carry_out(run)

    def parameter_groups(self, lr: float = 2e-5, weight_decay: float = 1e-6) -> list[dict[str, Any]]:
        """Trainable parameters for an optimizer; what ``expand`` added is not decayed (its identity is not zero)."""
        named = [(name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad]
        base = [parameter for name, parameter in named if not is_added(name)]
        added = [parameter for name, parameter in named if is_added(name)]
        groups = [
            {"params": base, "lr": lr, "weight_decay": weight_decay},
            {"params": added, "lr": lr, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train and how many the plan added."""
        total = sum(p.numel() for p in self.parameters())
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        added = sum(p.numel() for name, p in self.named_parameters() if is_added(name))
        share = f"{added / (total - added):.3%} of the model without them" if total > added else "all there is"
        print(f"trainable {trainable:,} of {total:,} parameters ({trainable / total:.2%}); added {added:,} ({share})")

    def save_pretrained(self, path: str | os.PathLike[str], *, expansion_only: bool = False) -> None:
        """Write ``dtme_config.json`` and ``model.safetensors`` into the folder ``path``.

        Args:
            path: made if missing. An earlier save in it is replaced in one step: a crash leaves the old or the new.
            expansion_only: only what ``expand`` added, to be loaded into the same pretrained backbone and heads.
        """
        saving.save(self, path, expansion_only)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        backbone: nn.Module,
        heads: Heads,
        features: str | Features | None = None,
    ) -> "MultiTaskModel":
        """Rebuild what ``save_pretrained`` wrote, around a backbone and heads of the same architecture.

        Args:
            features: as in the constructor; needed only where the saved model had a function.

        Raises:
            FileNotFoundError: ``path`` holds no saved model.
            ValueError: it is damaged, foreign, or of another architecture. Backbone and heads are then as they were.
        """
        return saving.load(cls, path, backbone, heads, features)

    def export_task(self, task: str) -> "TaskModel":
        """A plain, independent module for one task: its stream alone, task keys and values folded to constants.

        ``torch.export`` takes it; later changes of this model do not reach it.
        """
        if not isinstance(task, str):
            raise TypeError(f"task must be one name, got {task!r}")
        (task,) = choose(task, self.tasks)
        single = copy.deepcopy(self).eval()
        fold(single.backbone, task)
        return TaskModel(single, task)


def run_head(head: nn.Module, features: Any) -> Any:
    """A function of its own, so that heads of one kind share one compiled graph."""
    return head(features)


def verify(model: nn.Module, x: Any, tasks: str | Sequence[str] | None = None) -> float:
    """How far the predictions of all tasks at once are from each task's alone, in evaluation mode.

    Args:
        model: a ``MultiTaskModel``, or an expanded backbone.
        x: what it takes.
        tasks: a name or several; None for all.

    Returns:
        The largest difference, relative to the largest entry of the tensor it is in: rounding, if all is well.

    Raises:
        RuntimeError: ``model`` is a backbone that is not expanded.
    """
    if isinstance(model, MultiTaskModel):
        names = choose(tasks, model.tasks)

        def predict(some: Sequence[str]) -> dict[str, Any]:
            return model(x, some)
    else:
        found = expansions(model)
        names = choose(tasks, found[0].tasks if found else ())

        def predict(some: Sequence[str]) -> dict[str, Any]:
            with streams_of(model, some):
                return split(model(**x) if isinstance(x, Mapping) else model(x), some)

    worst = 0.0
    with left_as_it_was(model) as rewind:
        rewind()
        at_once = predict(names)
        for task in names:
            rewind()
            for a, b in zip(tensors(at_once[task]), tensors(predict([task])[task]), strict=True):
                if a.shape != b.shape:
                    return float("inf")
                if a.numel():
                    a, b = a.double(), b.double()
                    worst = max(worst, ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item())
    return worst


class TaskModel(nn.Module):
    """One task of a ``MultiTaskModel``; takes what its backbone takes and returns the prediction."""

    def __init__(self, model: MultiTaskModel, task: str) -> None:
        super().__init__()
        self.task = task
        self.backbone, self.head = model.backbone, model.heads[task]
        self.features = model.features

    def forward(self, x: Any) -> Any:
        if callable(self.features):
            return self.head(self.features(self.backbone, x))
        tokens = backbone_tokens(self.backbone, x)
        return self.head(tokens if self.features == "tokens" else tokens[:, 0])


def backbone_tokens(backbone: nn.Module, x: Any) -> Tensor:
    """All a backbone returns per token, (B, N, p): timm's ``forward_features``, transformers' last hidden state."""
    call = getattr(backbone, "forward_features", backbone)
    output = call(**x) if isinstance(x, Mapping) else call(x)
    tokens = getattr(output, "last_hidden_state", output)
    if not isinstance(tokens, Tensor) or tokens.ndim < 3:
        got = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(
            f"features='tokens' needs a backbone that returns (B, N, p), {type(backbone).__name__} returned {got}: "
            "give a function"
        )
    return tokens
