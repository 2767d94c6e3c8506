"""A block for one task alone, as an exported task has it."""

import torch
from torch import nn

from ..streams import together
from .adapter import BlockAdapter
from .task_buffers import TaskBuffers


def fold(adapter: BlockAdapter, task: str) -> None:
    """Keep one task only, its task keys and values as constants: what ``export_task`` ships."""
    owner = adapter.own_tasks.get(task, "")
    if owner in adapter.tokens:
        with torch.no_grad():
            tokens = torch.stack([adapter.tokens[owner]])
            adapter.task_key, adapter.task_value = (x.clone() for x in adapter.project(tokens))
    if owner in adapter.gate:
        adapter.task_gate = adapter.gate[owner].detach().clone()
    adapter.folded = together((task,))
    adapter.tokens, adapter.gate = nn.ParameterDict(), nn.ParameterDict()
    modulated = owner in adapter.weight
    for name in ("weight", "bias"):
        setattr(adapter, name, nn.ParameterDict({owner: getattr(adapter, name)[owner]} if modulated else {}))
    if adapter.running_mean is not None and adapter.running_var is not None:
        adapter.running_mean = TaskBuffers({owner: adapter.running_mean[owner]}) if modulated else None
        adapter.running_var = TaskBuffers({owner: adapter.running_var[owner]}) if modulated else None
