"""Attentions of any library: those that call ``scaled_dot_product_attention`` exactly once, caught while they do.

Tried on torch 2.13, on attentions written for the tests, and on timm 1.0.31's EVA and BEiT. What the arguments of such
blocks mean is not known.
"""

from typing import Any

from torch import Tensor, nn

from .base import Attend, Catch, Library, NotExpandable, Seam, names_in_forward


class GenericSeam(Seam):
    def run(self, attend: Attend, *args: Any, **kwargs: Any) -> Any:
        calls = []

        def counted(*args: Any, **kwargs: Any) -> Tensor:
            calls.append(1)
            return attend(*args, **kwargs)

        with Catch(counted):
            output = type(self.attention).forward(self.attention, *args, **kwargs)
        if len(calls) != 1:
            times = f"called scaled_dot_product_attention {len(calls)} times, not once"
            raise NotExpandable(f"block {self.block!r}: its attention {times}")
        return output


def _seam(module: nn.Module) -> type[Seam] | None:
    return GenericSeam if "scaled_dot_product_attention" in names_in_forward(module) else None


LIBRARY = Library("", _seam)
