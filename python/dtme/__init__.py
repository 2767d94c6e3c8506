"""Token-space gradient conflicts of multi-task transformers (DTME-MTL, ICCV 2025): analyze, plan, expand."""

from .analysis import analyze
from .conflict_map import conflict_map
from .expansion import collapse, expand
from .map_plots import plot_conflict_map
from .model import MultiTaskModel
from .monitor import ConflictMonitor
from .output import split
from .parameters import unfreeze
from .plan import ExpansionPlan
from .replan import replan
from .report import ConflictReport
from .sharing import sharing_of
from .streams import is_expanded, tasks
from .verification import verify
from .written_out import attention

__all__ = [
    "ConflictMonitor",
    "ConflictReport",
    "ExpansionPlan",
    "MultiTaskModel",
    "analyze",
    "attention",
    "collapse",
    "conflict_map",
    "expand",
    "is_expanded",
    "plot_conflict_map",
    "replan",
    "sharing_of",
    "split",
    "tasks",
    "unfreeze",
    "verify",
]
