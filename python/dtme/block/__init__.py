"""What ``expand`` hangs on a block: parameters and hooks, the first half of plain blocks, attention over streams."""

from .adapter import BlockAdapter

__all__ = ["BlockAdapter"]
