"""Token-space gradient conflicts of multi-task transformers (DTME-MTL, ICCV 2025): analyze, plan, expand."""

from .add_task import add_task
from .analysis import analyze
from .choices import tasks
from .comparison import Comparison, compare
from .conflict_map import conflict_map
from .expansion import collapse, expand
from .expansion_state import expansion_state, load_expansion_state
from .map_plots import plot_conflict_map
from .model import MultiTaskModel
from .monitor import ConflictMonitor
from .output import split
from .parameters import unfreeze
from .plan import ExpansionPlan
from .replan import replan
from .report import ConflictReport
from .sharing import sharing_of
from .streams import is_expanded
from .verification import verify
from .written_out import attention

__all__ = [
    "Comparison",
    "ConflictMonitor",
    "ConflictReport",
    "ExpansionPlan",
    "MultiTaskModel",
    "add_task",
    "analyze",
    "attention",
    "collapse",
    "compare",
    "conflict_map",
    "expand",
    "expansion_state",
    "is_expanded",
    "load_expansion_state",
    "plot_conflict_map",
    "replan",
    "sharing_of",
    "split",
    "tasks",
    "unfreeze",
    "verify",
]
