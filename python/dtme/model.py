"""A backbone that several tasks share, and a head for each."""

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn

from . import saving
from .expansion import adapters
from .plan import check_tasks
from .streams import Streams, choose, layout, sources, tasks
from .trees import map_tensors

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

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.heads)

    def forward(self, x: Any, tasks: str | Sequence[str] | None = None) -> dict[str, Any]:
        """Predict.

        Args:
            x: what the backbone takes, B rows.
            tasks: a name or several; None for all. Streams of other tasks are not computed.

        Returns:
            ``{task: prediction}`` in the order asked for, from one batched pass.
        """
        selected = choose(tasks, self.tasks)
        parts = self.split_features(self.extract(x, selected), selected)
        return {task: self.heads[task](parts[task]) for task in selected}

    def extract(self, x: Any, selected: Sequence[str]) -> Any:
        """The features of the selected tasks, their streams folded into the batch."""
        streams = tasks(self.backbone, selected) if hasattr(self.backbone, "_dtme") else nullcontext()
        with streams:
            if callable(self.features):
                return self.features(self.backbone, x)
            tokens = backbone_tokens(self.backbone, x)
            return tokens if self.features == "tokens" else tokens[:, 0]

    def split_features(self, features: Any, selected: tuple[str, ...]) -> dict[str, Any]:
        """{task: its rows}; a feature tapped before the streams parted belongs to every task that shared it."""
        streams_of: Streams | None = getattr(self.backbone, "_dtme", None)
        if streams_of is None or streams_of.num_rows is None:
            return dict.fromkeys(selected, features)
        num_rows = streams_of.num_rows
        layouts = {1: (selected,), len(selected): tuple((task,) for task in selected)}
        for adapter in adapters(self.backbone):
            streams = layout(selected, adapter.separated_after)
            layouts.setdefault(len(streams), streams)

        def part(task: str, tensor: Tensor) -> Tensor:
            rows = tensor.shape[0] if tensor.ndim else 0
            num_streams = next((n for n in sorted(layouts) if rows == n * num_rows), 0)
            if not num_streams:
                shape = tuple(tensor.shape)
                raise ValueError(f"a feature of shape {shape} does not start with {num_rows} rows for each task stream")
            if num_streams == 1:
                return tensor
            index = sources(layouts[num_streams], ((task,),))[0]
            return tensor[index * num_rows : (index + 1) * num_rows]

        return {task: map_tensors(partial(part, task), features) for task in selected}

    def parameter_groups(self, lr: float = 2e-5, weight_decay: float = 1e-6) -> list[dict[str, Any]]:
        """Trainable parameters for an optimizer; what ``expand`` added is not decayed (its identity is not zero)."""
        named = [(name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad]
        base = [parameter for name, parameter in named if ".dtme." not in name]
        added = [parameter for name, parameter in named if ".dtme." in name]
        groups = [
            {"params": base, "lr": lr, "weight_decay": weight_decay},
            {"params": added, "lr": lr, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train and how many the plan added."""
        total = sum(p.numel() for p in self.parameters())
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        added = sum(p.numel() for name, p in self.named_parameters() if ".dtme." in name)
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
        streams: Streams | None = getattr(single.backbone, "_dtme", None)
        if streams is not None:
            streams.tasks = streams.selected = (task,)
            for adapter in adapters(single.backbone):
                adapter.fold(task)
        return TaskModel(single, task)


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
