"""Statistics of the batch-norm modulator, one set for every task."""

from collections.abc import Mapping

from torch import Tensor, nn


class TaskBuffers(nn.Module):
    """Buffers by task, as ``nn.ParameterDict`` is for parameters."""

    def __init__(self, buffers: Mapping[str, Tensor]) -> None:
        super().__init__()
        for task, buffer in buffers.items():
            self.register_buffer(task, buffer)

    def __getitem__(self, task: str) -> Tensor:
        return self.get_buffer(task)
