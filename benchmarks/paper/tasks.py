"""The tasks in one table: what a head must put out, how it is scored, what the classes are called."""

from dataclasses import dataclass

IGNORE = 255
"""Label of a pixel that no class loss and no class metric counts."""

SEMSEG = (
    "floor", "wall", "ceiling", "window", "door", "picture", "rug",
    "table", "seat", "cabinet", "lamp", "plant", "ball", "vessel", "box",
)  # fmt: skip
PARTS = ("box top", "box side", "leg", "cylinder end", "cylinder side", "sphere upper", "sphere lower")
SALIENCY = ("background", "salient")


@dataclass(frozen=True)
class Task:
    """One task: ``channels`` of its head, name and unit of its metric, its classes (empty for a regression)."""

    channels: int
    metric: str
    unit: str
    lower_is_better: bool
    classes: tuple[str, ...] = ()


TASKS = {
    "semseg": Task(len(SEMSEG), "mIoU", "%", False, SEMSEG),
    "depth": Task(1, "RMSE", "m", True),
    "normals": Task(3, "mErr", "°", True),
    "edges": Task(1, "F", "%", False),
    "saliency": Task(len(SALIENCY), "maxF", "%", False, SALIENCY),
    "parts": Task(len(PARTS), "mIoU", "%", False, PARTS),
}
LOWER_IS_BETTER = frozenset(name for name, task in TASKS.items() if task.lower_is_better)
