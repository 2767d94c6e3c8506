"""What a block takes beside its tokens: a mask, a bias, positions, earlier tokens. What comes by image follows them."""

from typing import Any

from torch import Tensor, nn

from ..blocks import Arguments
from ..layouts import repeat_rows, together
from ..seams import UNKNOWN, argument_axis
from ..sharing import UnknownArgument
from ..streams import Run
from ..trees import map_tensors


def follow(
    block: nn.Module, run: Run, num_rows: int, where: int | str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Arguments:
    """Give every tensor that comes by image as many rows as the block's tokens will have.

    Args:
        num_rows: of the tokens as they come in.
        where: the argument that is the tokens. They may be given a second time, as something else.
    """
    batch = num_rows // run.before.num_streams

    def walk(value: Any, at: int | str) -> Any:
        if at == where:
            return value
        paths: list[str] = []

        def at_path(tensor: Tensor) -> Tensor:
            paths.append(f"{at}[{len(paths)}]")
            axis = _axis(block, tensor, at, paths[-1], run, batch)
            return tensor if axis is None else _repeated(tensor, axis, run, batch, paths[-1])

        return map_tensors(at_path, value)

    args = tuple([walk(value, at) for at, value in enumerate(args)])
    return args, {name: walk(value, name) for name, value in kwargs.items()}


def _axis(block: nn.Module, tensor: Tensor, at: int | str, path: str, run: Run, batch: int) -> int | None:
    """Where the images lie: what the block's library says, or what the first call of this kind has shown."""
    forward, key = run.forward, (run.key, run.count, path)
    size = tensor.shape[0] if tensor.ndim else 1
    if not forward.learns:
        axis, shared = forward.arguments.get(key, (None, -1))
        if shared is not None and shared != size and size % batch == 0:
            problem = "it did not have at first" if shared == -1 else f"had the first size {shared} at first"
            raise UnknownArgument(
                f"block {run.block!r} got a {tuple(tensor.shape)} tensor as argument {path}: {problem}"
            )
        return axis
    if key in forward.arguments and forward.arguments[key][1] == size:  # so it was in another batch
        return None
    known = argument_axis(block, at, tensor)
    if known is not UNKNOWN:
        forward.arguments[key] = known, None
        return known
    if forward.closes_at is not None:
        raise RuntimeError(
            f"block {run.block!r} is called by itself for several tasks with a {tuple(tensor.shape)} tensor as "
            f"argument {path}, which may come by image or not: call the backbone, or choose one task"
        )
    # a guess, which the comparison that is going on accepts or does not
    by_row = tensor.ndim > 0 and any(size == x.num_streams * batch for x in forward.seen)
    forward.arguments[key] = (0, None) if by_row else (None, size)
    return 0 if by_row else None


def _repeated(tensor: Tensor, axis: int, run: Run, batch: int, path: str) -> Tensor:
    """``tensor``, whose images lie on ``axis``, for the streams behind the block's modules."""
    size = tensor.shape[axis]
    if size == 1 != batch:
        return tensor
    layout = next((x for x in (run.after, *run.forward.seen) if size == x.num_streams * batch), None)
    if layout is None and size % batch:
        raise RuntimeError(
            f"block {run.block!r} got a {tuple(tensor.shape)} tensor as argument {path}, which does not have the rows "
            f"of {run.before.num_streams} task streams of {batch}"
        )
    # else several rows of each image side by side, as of heads, made before any stream parted
    layout = layout or together(run.after.tasks)
    return repeat_rows(tensor, run.after.sources(layout), layout.num_streams, axis)
