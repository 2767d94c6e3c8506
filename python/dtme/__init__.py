"""Token-space gradient conflicts of multi-task transformers (DTME-MTL, ICCV 2025): analyze, plan, expand."""

from .analysis import analyze
from .expansion import collapse, expand
from .model import MultiTaskModel, verify
from .monitor import ConflictMonitor
from .output import split
from .plan import ExpansionPlan
from .replan import replan
from .report import ConflictReport
from .sharing import sharing_of
from .streams import is_expanded, tasks
from .written_out import attention

__all__ = [
    "ConflictMonitor",
    "ConflictReport",
    "ExpansionPlan",
    "MultiTaskModel",
    "analyze",
    "attention",
    "collapse",
    "expand",
    "is_expanded",
    "replan",
    "sharing_of",
    "split",
    "tasks",
    "verify",
]
