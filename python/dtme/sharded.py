"""Models whose parameters are shared among processes: by FSDP2, or by tensor parallelism."""

import copy
import sys
import types
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .interrupts import Deferred
from .ranks import Ranks
from .torch_private import class_before_fsdp, fsdp_mesh, fsdp_modules, is_note_of_fsdp, is_of_fsdp, is_outside_fsdp
from .trees import map_tensors, tensors

_ALIAS = "_dtme_sharded_"


def is_shard(tensor: Any) -> bool:
    """Whether this process holds a part of ``tensor``, a DTensor."""
    loaded = sys.modules.get("torch.distributed.tensor")  # where none was imported, there is none
    return loaded is not None and isinstance(tensor, loaded.DTensor)


def shards(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names and DTensors of all parameters and buffers that are shared among processes."""
    for named in (module.named_parameters, module.named_buffers):
        yield from ((name, tensor) for name, tensor in named() if is_shard(tensor))


def is_sharded(module: nn.Module) -> bool:
    return bool(fsdp_modules(module)) or next(shards(module), None) is not None


def ranks_of(module: nn.Module, what: str) -> Ranks:
    """The processes that share ``module``; this one alone where it is not shared.

    Args:
        what: they are to do together, for messages.

    Raises:
        RuntimeError: they are neither all processes nor one group of them.
    """
    mesh = next((tensor.device_mesh for _, tensor in shards(module)), None)
    if mesh is None:
        return Ranks(None, Deferred(), alone=True, what=what)
    if mesh.size() != dist.get_world_size() and mesh.ndim != 1:
        raise RuntimeError(
            f"{what} needs a model that is sharded among all processes, or along one dimension: this mesh is {mesh}"
        )
    return Ranks(None if mesh.size() == dist.get_world_size() else mesh.get_group(), Deferred(), what=what)


# --- whole tensors ----------------------------------------------------------------------------------------------------


def whole_state(module: nn.Module, state: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """``state`` with whole tensors on the CPU on the first rank, nothing on others; itself where nothing is shared.

    Args:
        state: tensors out of the state of ``module``; the same names on all ranks.
    """
    if ranks.world == 1 and not any(map(is_shard, state.values())):
        return dict(state)
    names: dict[str, str] = {}  # weights that are tied are gathered once
    firsts: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names[name] = firsts.setdefault(id(parameter), name)
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        first = names.get(name, name)
        if first not in found:
            one = _whole(tensor, torch.device("cpu"), ranks)
            found[first] = one if ranks.rank == 0 else one.new_empty(0)
        found[name] = found[first]
    return {name: found[name] for name in state} if ranks.rank == 0 else {}


def _whole(tensor: Any, device: torch.device, ranks: Ranks) -> Tensor:
    """All of a tensor, on ``device``: every rank calls this."""
    if not is_shard(tensor):
        return tensor.detach().to(device)
    with ranks.waiting(), torch.no_grad():
        return tensor.detach().to(tensor.device_mesh.device_type).full_tensor().to(device)


def whole_copy(model: Any, what: str, device: torch.device | None = None) -> Any:
    """A copy of a model that FSDP2 shards, every process with all of it: all processes call this.

    Args:
        what: it is for, for messages.
        device: of the copy; by default where the processes compute.

    Raises:
        RuntimeError: the model is tensor parallel, whose modules compute with parts.
    """
    refuse_tensor_parallel(model, what)
    ranks = ranks_of(model, what)
    for part in fsdp_modules(model):
        part.reshard()  # type: ignore[operator]
    memo: dict[int, Any] = {}
    for _, tensor in [*shards(model)]:
        full: Any = _whole(tensor, device or torch.device(tensor.device_mesh.device_type), ranks)
        if isinstance(tensor, nn.Parameter):
            full = nn.Parameter(full, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = full
    shells: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
    for part in fsdp_modules(model):
        shell = memo[id(part)] = object.__new__(class_before_fsdp(part))
        attributes = {k: v for k, v in vars(part).items() if not is_note_of_fsdp(k) and not k.startswith(_ALIAS)}
        shells.append((vars(shell), attributes))
        for hooks in [value for name, value in attributes.items() if name.endswith("_hooks")]:
            memo[id(hooks)] = kept = type(hooks)()  # the handles of other hooks lead to it too
            shells.append((kept, {number: hook for number, hook in hooks.items() if not is_of_fsdp(hook)}))
    for target, content in shells:
        target.update({key: copy.deepcopy(value, memo) for key, value in content.items()})
    single = copy.deepcopy(model, memo)
    for part in single.modules():
        for name in [name for name in vars(part) if is_note_of_fsdp(name)]:
            del vars(part)[name]
        for hooks in [value for name, value in vars(part).items() if name.endswith("_hooks") and value]:
            for number in [number for number, hook in hooks.items() if is_of_fsdp(hook)]:
                del hooks[number]
    return single if device is None else single.to(device)


def refuse_tensor_parallel(model: nn.Module, what: str) -> None:
    """RuntimeError where modules of ``model`` compute with parts of their tensors."""
    for name, module in model.named_modules():
        hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        by_hook = any((getattr(hook, "__module__", "") or "").startswith("torch.distributed.tensor") for hook in hooks)
        by_part = not fsdp_modules(model) and any(map(is_shard, module.parameters(recurse=False)))
        if by_hook or by_part:
            raise RuntimeError(
                f"{what} does not know tensor parallel modules such as {name or type(module).__name__!r}: do it before "
                "parallelize_module"
            )


def refuse_sequence_parallel(name: str, block: nn.Module) -> None:
    """RuntimeError where the norms of ``block`` are for a part of its tokens: each rank would learn of its part alone.

    Such norms are known by their parameters, vectors that are the same on all ranks.
    """
    if "torch.distributed.tensor" not in sys.modules:
        return
    for part in block.modules():
        vectors = [parameter for parameter in part._parameters.values() if parameter is not None]
        if vectors and all(is_shard(one) and one.ndim == 1 and _is_replicated(one) for one in vectors):
            raise RuntimeError(
                f"block {name!r} is sequence parallel ({type(part).__name__}): each rank sees a part of its tokens, "
                "and would learn its modulation and task tokens from these alone. Parallelize its linear layers, and "
                "leave its norms as they are"
            )


def _is_replicated(tensor: Any) -> bool:
    return all(placement.is_replicate() for placement in tensor.placements)


# --- forwards ---------------------------------------------------------------------------------------------------------


def entrance(module: nn.Module, name: str) -> Callable[..., Any]:
    """The method ``name`` of ``module``, around which FSDP2 does what it does around ``forward``.

    It knows no other method by itself, and without that, weights may be gathered still, after a forward in evaluation
    say, but their gradients would stay those of one rank. What ``register_fsdp_forward_method`` adds has another name,
    as ``forward`` itself may call the method.
    """
    method = getattr(module, name)
    if not is_outside_fsdp(module):
        return method
    alias = _ALIAS + name
    if alias not in vars(module):
        from torch.distributed.fsdp import register_fsdp_forward_method

        def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return getattr(self, name)(*args, **kwargs)

        setattr(module, alias, types.MethodType(call, module))
        register_fsdp_forward_method(module, alias)
    return getattr(module, alias)


def mesh_in_use(*modules: nn.Module) -> Any:
    """The mesh of several processes among which FSDP2 shares one of ``modules``; None where there is none.

    Raises:
        RuntimeError: a part of them is wrapped by the earlier FullyShardedDataParallel.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return None
    if any(type(part).__name__ == "FullyShardedDataParallel" for module in modules for part in module.modules()):
        raise RuntimeError(
            "parts of the model are wrapped by FullyShardedDataParallel, whose ranks are not kept in step here: use "
            "torch.distributed.fsdp.fully_shard"
        )
    found = next((mesh for module in modules if (mesh := fsdp_mesh(module)) is not None), None)
    return None if found is None or found.size() == 1 else found


def in_step(mesh: Any, tasks: Sequence[str], flag: bool = False) -> bool:
    """Whether any process of ``mesh`` has the ``flag``; one small exchange.

    FSDP2 adds up gradients by their place in a buffer of those that are there: other tasks on other ranks would add
    those of different parameters, or leave a rank waiting.

    Raises:
        RuntimeError: the processes are about to run different tasks.
    """
    number = zlib.crc32("\n".join(tasks).encode())
    state = torch.tensor([number, -number, int(flag)], device=mesh.device_type)
    for group in mesh.get_all_groups():
        dist.all_reduce(state, dist.ReduceOp.MAX, group)
    highest, lowest, found = state.tolist()
    if highest != -lowest:
        said: list[Any] = [None] * dist.get_world_size(group := mesh.get_group(mesh.ndim - 1))
        dist.all_gather_object(said, list(tasks), group)
        shown = ", ".join(
            f"rank {rank} {names}" for rank, names in zip(dist.get_process_group_ranks(group), said, strict=True)
        )
        raise RuntimeError(
            f"all ranks of a model sharded by FSDP2 must run the same tasks in the same order, for it adds up their "
            f"gradients by place: here are {shown}. Run all tasks on every rank, and let each rank's loss be of those "
            "that it has labels of"
        )
    return bool(found)


class _Together(torch.autograd.Function):
    """Itself; where one of several tensors gets a gradient, the others get one of zeros."""

    @staticmethod
    def forward(ctx: Any, *parts: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.detach() for part in parts)  # no views, which nobody may write to

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients


def learning_together(predictions: dict[str, Any]) -> dict[str, Any]:
    """The same predictions, whose backward pass is one: it goes through all of them, whichever the loss is of.

    So the parameters that get a gradient are the same on all ranks, also where one has no label of some task.
    """
    parts = list({id(part): part for part in tensors(predictions) if part.requires_grad}.values())
    if len(parts) < 2:
        return predictions
    joined = dict(zip(map(id, parts), _Together.apply(*parts), strict=True))
    return map_tensors(lambda part: joined.get(id(part), part), predictions)
