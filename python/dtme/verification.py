"""Whether all tasks at once predict what each predicts alone."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from .choices import tasks as streams_of
from .model import MultiTaskModel
from .output import split
from .plan import choose
from .randomness import left_as_it_was
from .sharded import is_sharded, whole_copy
from .streams import expansions
from .trees import tensors


def verify(model: nn.Module, x: Any, tasks: str | Sequence[str] | None = None) -> float:
    """How far the predictions of all tasks at once are from each task's alone, in evaluation mode.

    Args:
        model: a ``MultiTaskModel``, or an expanded backbone. Of one that FSDP2 shards, every rank calls this, and
            verifies a copy of the whole.
        x: what it takes.
        tasks: a name or several; None for all.

    Returns:
        The largest difference, relative to the largest entry of the tensor it is in: rounding, if all is well.

    Raises:
        RuntimeError: ``model`` is a backbone that is not expanded.
    """
    if is_sharded(model):
        model = whole_copy(model, "verify")
    decodes = isinstance(model, MultiTaskModel) and model.decoder is not None
    if isinstance(model, MultiTaskModel):
        names, needed = model.tasks_for(tasks)
    else:
        found = expansions(model)
        names = needed = choose(tasks, found[0].tasks if found else ())

    def predict(some: Sequence[str]) -> dict[str, Any]:
        if isinstance(model, MultiTaskModel):
            return model(x, some)
        with streams_of(model, some):
            return split(model(**x) if isinstance(x, Mapping) else model(x), some)

    worst = 0.0
    with left_as_it_was(model) as rewind:
        rewind()
        at_once = predict(names)
        alone: dict[str, Any] = {}
        for task in needed:
            rewind()
            alone |= model.extract(x, [task]) if decodes else predict([task])  # type: ignore[operator]
        if decodes:  # reads the features of all, wherever they come from
            alone = model.predict(alone, names)  # type: ignore[operator]
        for task in names:
            for a, b in zip(tensors(at_once[task]), tensors(alone[task]), strict=True):
                if a.shape != b.shape:
                    return float("inf")
                if a.numel():
                    a, b = a.double(), b.double()
                    worst = max(worst, ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item())
    return worst
