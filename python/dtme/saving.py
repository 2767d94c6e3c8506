"""Save and load a ``MultiTaskModel``: the weights, which carry their config, and the config for people to read."""

import json
import os
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .block.adapter import is_added
from .checks import Record, boolean, mapping_of, names, one_of, or_null, text
from .expansion import collapse
from .expansion_state import CHECKS, NOT_EXPANDED, expand_by, state_of
from .files import write_beside
from .formats import Document, Format, parse_json
from .independence import Decoder, name_of
from .interrupts import all_or_nothing
from .sharded import is_shard, is_sharded, ranks_of, whole_state
from .weights import check_digests, digests_of, read_weights, write_weights
from .wrappers import resolve

if TYPE_CHECKING:
    from .model import Heads, MultiTaskModel

CONFIG, WEIGHTS = "dtme_config.json", "model.safetensors"
FIELDS = Record(
    {
        "save": text,
        "tasks": names,
        "features": or_null(one_of("tokens", "cls")),
        "expansion_only": boolean,
        "plan": or_null(CHECKS["plan"]),
        **{name: CHECKS[name] for name in ("modulator", "freeze_backbone")},
        "aliases": mapping_of(text),
    },
    # what earlier releases did not write; decoder, heads and gates only where there is something to write
    {
        **{name: CHECKS[name] for name in ("shared_prefix", "gates")},
        "decoder": text,
        "heads": names,
        "digests": mapping_of(text),
    },
)
FORMAT = Format("dtme.MultiTaskModel", FIELDS, version=2)
"""Version 1 had no checksums. ``digests`` are in the copy that the weights carry, not in the file for people."""


def save(model: "MultiTaskModel", path: str | os.PathLike[str], expansion_only: bool) -> None:
    config, ranks = _config(model, expansion_only), ranks_of(model, "save_pretrained")
    state = _state(model, expansion_only)
    _check_storable(model, state)
    state = whole_state(model, state, ranks)
    tensors, config["aliases"] = _without_aliases(state)
    with ranks.together():
        if ranks.rank == 0:
            _write(Path(path), config, tensors)


def _config(model: "MultiTaskModel", expansion_only: bool) -> dict[str, Any]:
    """All that a file says of the model, but for its tensors."""
    expansion = state_of(model.backbone)
    if expansion_only and not expansion:
        raise RuntimeError("expansion_only=True needs an expanded model: call dtme.expand first")
    config: dict[str, Any] = {
        "save": uuid.uuid4().hex,
        "tasks": list(model.tasks),
        "features": model.features if isinstance(model.features, str) else None,
        "expansion_only": expansion_only,
        **(expansion or NOT_EXPANDED),
    }
    if not config["gates"]:
        del config["gates"]
    if model.decoder is not None:
        config |= {"decoder": name_of(model.decoder), "heads": list(model.heads)}
    return config


def _write(folder: Path, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Renaming the weights, which carry all there is, is the one step that replaces the old save."""
    carried = FORMAT.dump({**config, "digests": digests_of(tensors)})
    write_beside(folder / WEIGHTS, lambda beside: write_weights(beside, tensors, carried))
    # a crash before this leaves the config of the old save, which load() recognises by its number and passes over
    FORMAT.save(folder / CONFIG, config)


def load(
    cls: "type[MultiTaskModel]",
    path: str | os.PathLike[str],
    backbone: nn.Module,
    heads: "Heads | None",
    features: Any,
    decoder: Decoder | None,
) -> "MultiTaskModel":
    config, tensors = _read(Path(path))
    if features is None and config["features"] is None:
        raise ValueError(f"{path} was saved with a function for features: give from_pretrained(..., features=function)")
    _check_decoder(path, config, decoder)
    heads = {} if heads is None else heads
    if set(heads) != set(config.get("heads", config["tasks"])):
        kind = "heads for" if "heads" in config else "the tasks"
        raise ValueError(f"{path} holds {kind} {config.get('heads', config['tasks'])}, but heads are for {list(heads)}")
    return _build(cls, path, config, tensors, backbone, heads, features, decoder)


@all_or_nothing
def _build(
    cls: "type[MultiTaskModel]",
    path: str | os.PathLike[str],
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    backbone: nn.Module,
    heads: "Heads",
    features: Any,
    decoder: Decoder | None,
) -> "MultiTaskModel":
    plan = config["plan"]
    given = [module for module in (backbone, *heads.values(), decoder) if isinstance(module, nn.Module)]
    if (name := next((type(module).__name__ for module in given if is_sharded(module)), None)) is not None:
        raise RuntimeError(
            f"{name} is shared among processes already: load into a plain one on every rank, then call fully_shard or "
            "parallelize_module"
        )
    if any(tensor.is_meta for module in given for tensor in module.parameters()):
        raise ValueError(
            "backbone, heads and decoder must hold real tensors, not meta ones: call to_empty(device=...) first"
        )
    with _naming(path):
        model = cls(backbone, heads, features or config["features"], decoder, config["tasks"] or None)
        if plan is not None:
            expand_by(model, config)
    try:
        if config["expansion_only"]:
            names = resolve(tensors, model.state_dict())
            tensors = {names.get(name, name): value for name, value in tensors.items()}
        _check_state(path, model, tensors, config["expansion_only"])
        model.load_state_dict(tensors, strict=False)
    except BaseException:
        if plan is not None:
            collapse(model)
        raise
    return model


@contextmanager
def _naming(path: Any) -> Iterator[None]:
    """What is wrong with the model that was given for a save is said with the save's name."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path} does not fit what was given: {error}") from error


def _check_decoder(path: Any, config: Mapping[str, Any], decoder: Decoder | None) -> None:
    saved = config.get("decoder")
    if saved is not None and decoder is None:
        raise ValueError(f"{path} was saved with the decoder {saved}: give from_pretrained(..., decoder=...)")
    if saved is None and decoder is not None:
        raise ValueError(
            f"{path} was saved without a decoder, but the decoder {name_of(decoder)} is given: leave it out"
        )


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of one save: both are those of the weights' file, which is read once.

    The config that lies beside is for people. Where it is of another save, one that goes on now or that was cut short
    between the two files, that is no fault; where it is of this one and says something else, somebody thinks it counts.
    """
    with _missing_named(folder):
        beside = FORMAT.load(folder / CONFIG)
        carried, tensors = read_weights(folder / WEIGHTS)
    document = _parse_carried(folder / WEIGHTS, carried)
    _compare(beside, document)
    beside.check()
    document.check()
    config = document.content
    if (digests := config.pop("digests", None)) is not None:
        check_digests(folder / WEIGHTS, tensors, digests)
    for name, target in config["aliases"].items():
        if name in tensors or target not in tensors or target in config["aliases"]:
            raise ValueError(f"{folder / WEIGHTS} is damaged: {name!r} cannot stand for {target!r}")
    return config, tensors | {name: tensors[target] for name, target in config["aliases"].items()}


@contextmanager
def _missing_named(folder: Path) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        name = Path(error.filename).name
        raise FileNotFoundError(f"{folder} holds no saved model: {name} is missing") from error


def _parse_carried(where: Path, carried: str) -> Document:
    """The config that the weights carry, with everything that its version must have."""
    plain = parse_json(carried, f"the config in {where}")
    if isinstance(plain, dict) and "version" not in plain and "digests" not in plain:
        warnings.warn(
            f"{where} was saved by an earlier release, without checksums: a damaged weight would not be noticed. Save "
            "the model again to have them",
            stacklevel=5,  # whoever calls from_pretrained
        )
        return FORMAT.parse(json.dumps({"format": FORMAT.kind, "version": 1, **plain}), f"the config in {where}")
    document = FORMAT.parse(carried, f"the config in {where}")
    if document.checksum is None or "digests" not in document.plain:
        raise ValueError(f"{where} is damaged: its checksums are missing")
    return document


def _compare(beside: Document, carried: Document) -> None:
    """ValueError where the config for people was edited."""
    people, counts = beside.plain, {name: value for name, value in carried.plain.items() if name != "digests"}
    if people["save"] != counts["save"]:
        return
    for name in (*counts, *people):
        if people.get(name) != counts.get(name):
            raise ValueError(
                f"{beside.where} was changed, or is damaged: its {name!r} is {people.get(name)!r}, but the model was "
                f"saved with {counts.get(name)!r}. This file is for people to read, {WEIGHTS} holds what is loaded: "
                "undo the change, or change the loaded model and save it again"
            )


def _state(model: nn.Module, expansion_only: bool) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if not expansion_only or is_added(name)}


def _check_state(path: Any, model: nn.Module, tensors: dict[str, Tensor], expansion_only: bool) -> None:
    """Every tensor of the model, or of its expansion, must be there in its shape; nothing else may.

    Floats of another precision are rounded to the model's, as ``load_state_dict`` does.
    """
    state = _state(model, expansion_only)
    if (quantised := _quantised(model, state)) is not None:
        raise ValueError(
            f"{path} holds plain weights, but {quantised} of what was given is quantised: load, and quantise after that"
        )
    for name, value in state.items():
        if name not in tensors:
            raise ValueError(f"{path} lacks {name!r}: it was saved from another architecture")
        if tensors[name].shape != value.shape:
            raise ValueError(
                f"{path} holds {name!r} as {tuple(tensors[name].shape)}, the model needs {tuple(value.shape)}"
            )
        if _kind(tensors[name]) != _kind(value):
            raise ValueError(f"{path} holds {name!r} in {tensors[name].dtype}, the model needs {value.dtype}")
    if unknown := tensors.keys() - state.keys():
        raise ValueError(f"{path} holds {min(unknown)!r}, which the model does not have")
    for name, first in _tied(state).items():
        if tensors[name] is not tensors[first] and not torch.equal(tensors[name], tensors[first]):
            raise ValueError(f"{path} holds different {first!r} and {name!r}, which are one weight in the model")


def _kind(tensor: Tensor) -> tuple[bool, bool, bool]:
    """What no other precision changes: real, complex, whole numbers or truth."""
    return tensor.is_floating_point(), tensor.is_complex(), tensor.dtype == torch.bool


def _check_storable(model: nn.Module, state: Mapping[str, Any]) -> None:
    """RuntimeError for what a file of tensors cannot hold."""
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise RuntimeError(f"{name!r} is a {type(value).__name__}, and files hold tensors only: save it apart")
        if value.is_meta:
            raise RuntimeError(f"{name!r} is on the meta device, and has no values to save")
    if (quantised := _quantised(model, state)) is not None:
        raise RuntimeError(
            f"{quantised} is quantised, which no file holds: save with expansion_only=True, and give from_pretrained "
            "a backbone that is quantised in the same way and the same heads; or save before it is quantised"
        )


def _quantised(model: nn.Module, state: Mapping[str, Any]) -> str | None:
    """The name and type of a tensor out of ``state`` that torchao or bitsandbytes keep in a form of their own."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, value in state.items():
        kind = type(parameters.get(name, value))
        if kind.__module__.startswith("bitsandbytes.") or (hasattr(kind, "__tensor_flatten__") and not is_shard(value)):
            return f"{name!r} ({kind.__name__})"
    return None


def _tied(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Which names are the same tensor as an earlier name."""
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, value in state.items():
        memory = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype, value.is_conj())
        found = first.setdefault(memory if value.numel() else (name,), name)
        if found != name:
            aliases[name] = found
    return aliases


def _without_aliases(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tied weights once each, and which names stand for them: the format allows no shared memory."""
    tensors: dict[str, Tensor] = {}
    aliases = _tied(state)
    for name, value in state.items():
        if name in aliases:
            continue
        value = value.detach().cpu().resolve_conj().contiguous()
        shared = value.untyped_storage().nbytes() != value.nbytes
        tensors[name] = value.clone(memory_format=torch.contiguous_format) if shared else value
    return tensors, aliases
