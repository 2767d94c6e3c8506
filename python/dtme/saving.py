"""Save and load a ``MultiTaskModel``: a readable config and the weights, replaced in one step."""

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .block.adapter import is_added
from .block.handover import add_gates
from .expanded import Expansion
from .expansion import collapse, expand
from .files import load_json, save_json, write_beside
from .independence import Decoder, name_of
from .interrupts import all_or_nothing
from .plan import ExpansionPlan
from .streams import adapters, expansions
from .wrappers import resolve, unwrapped

if TYPE_CHECKING:
    from .model import Heads, MultiTaskModel

KIND = "dtme.MultiTaskModel"
CONFIG, WEIGHTS = "dtme_config.json", "model.safetensors"
FIELDS = {"save", "tasks", "features", "expansion_only", "plan", "modulator", "freeze_backbone", "aliases"}
OPTIONAL = {"shared_prefix", "decoder", "heads", "gates"}
"""Fields that earlier releases did not write; the last three only where there is something to write."""


def save(model: "MultiTaskModel", path: str | os.PathLike[str], expansion_only: bool) -> None:
    from safetensors.torch import save_file

    expansion = _only_expansion(model.backbone)
    if expansion_only and expansion is None:
        raise RuntimeError("expansion_only=True needs an expanded model: call dtme.expand first")
    tensors, aliases = _without_aliases(_state(model, expansion_only))
    config: dict[str, Any] = {
        "save": uuid.uuid4().hex,
        "tasks": list(model.tasks),
        "features": model.features if isinstance(model.features, str) else None,
        "expansion_only": expansion_only,
        "plan": expansion.plan.as_dict() if expansion else None,
        "modulator": expansion.modulator if expansion else "affine",
        "freeze_backbone": bool(expansion and expansion.frozen),
        "shared_prefix": expansion.shared_prefix if expansion else "auto",
        "aliases": aliases,
    }
    if gates := {adapter.name: list(adapter.gate) for adapter in adapters(model.backbone) if adapter.gate}:
        config |= {"gates": gates}
    if model.decoder is not None:
        config |= {"decoder": name_of(model.decoder), "heads": list(model.heads)}
    folder = Path(path)
    # The weights carry the config too: renaming them is the one step that replaces the old save. A crash before the
    # config's own rename leaves an old config, which load() recognises by its number and passes over.
    metadata = {"format": "pt", "dtme": json.dumps(config)}
    write_beside(folder / WEIGHTS, lambda beside: save_file(tensors, beside, metadata))
    save_json(folder / CONFIG, KIND, config)


def _only_expansion(backbone: nn.Module) -> Expansion | None:
    """RuntimeError where the backbone was not expanded as the whole that ``load`` will be given."""
    found = expansions(backbone)
    modules = dict(unwrapped(backbone).named_modules())
    at_home = all(modules.get(f"{adapter.name}.dtme") is adapter for adapter in adapters(backbone))
    if len(found) > 1 or not at_home:
        raise RuntimeError(
            f"{type(backbone).__name__} was wrapped, or built of parts, after they were expanded: a saved plan has "
            "to name the blocks of the backbone itself. Save what was expanded, or expand the whole"
        )
    return next(iter(found), None)


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
    given = [module for module in (backbone, *heads.values(), decoder) if isinstance(module, nn.Module)]
    if any(tensor.is_meta for module in given for tensor in module.parameters()):
        raise ValueError(
            "backbone, heads and decoder must hold real tensors, not meta ones: call to_empty(device=...) first"
        )
    model = cls(backbone, heads, features or config["features"], decoder, config["tasks"] or None)
    if config["plan"] is not None:
        try:
            plan = ExpansionPlan(**config["plan"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: its plan is not one: {error}") from error
        expand(
            model,
            plan,
            modulator=config["modulator"],
            freeze_backbone=config["freeze_backbone"],
            shared_prefix=config.get("shared_prefix", "auto"),
        )
    try:
        _add_gates(path, model.backbone, config.get("gates", {}))
        if config["expansion_only"]:
            names = resolve(tensors, model.state_dict())
            tensors = {names.get(name, name): value for name, value in tensors.items()}
        _check_state(path, model, tensors, config["expansion_only"])
    except BaseException:
        if config["plan"] is not None:
            collapse(model)
        raise
    model.load_state_dict(tensors, strict=False)
    return model


def _add_gates(path: Any, backbone: nn.Module, gates: Any) -> None:
    """Give task tokens the gates that ``replan`` had given them."""
    found = {adapter.name: adapter for adapter in adapters(backbone)}
    names = resolve(gates, found) if isinstance(gates, Mapping) else {}
    for block, owners in gates.items() if isinstance(gates, Mapping) else [(gates, ())]:
        block = names.get(block, block)
        if block not in found or not set(owners) <= set(found[block].tokens):
            raise ValueError(f"{path} is damaged: gates of block {block!r} are for {owners}, which have no task tokens")
        add_gates(found[block], owners)


def _check_decoder(path: Any, config: Mapping[str, Any], decoder: Decoder | None) -> None:
    saved = config.get("decoder")
    if saved is not None and decoder is None:
        raise ValueError(f"{path} was saved with the decoder {saved}: give from_pretrained(..., decoder=...)")
    if saved is None and decoder is not None:
        raise ValueError(
            f"{path} was saved without a decoder, but the decoder {name_of(decoder)} is given: leave it out"
        )


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no saved model: {name} is missing")
    config = load_json(folder / CONFIG, KIND, FIELDS, OPTIONAL)
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            embedded = (file.metadata() or {}).get("dtme")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged: {error}") from error
    if embedded is None:
        raise ValueError(f"{folder / WEIGHTS} was not written by save_pretrained")
    written = json.loads(embedded)
    if written["save"] != config["save"]:
        config = written
    for name, target in config["aliases"].items():
        tensors[name] = tensors[target]
    return config, tensors


def _state(model: nn.Module, expansion_only: bool) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if not expansion_only or is_added(name)}


def _check_state(path: Any, model: nn.Module, tensors: dict[str, Tensor], expansion_only: bool) -> None:
    """Every tensor of the model, or of its expansion, must be there in its shape; nothing else may."""
    state = _state(model, expansion_only)
    for name, value in state.items():
        if name not in tensors:
            raise ValueError(f"{path} lacks {name!r}: it was saved from another architecture")
        if tensors[name].shape != value.shape:
            raise ValueError(
                f"{path} holds {name!r} as {tuple(tensors[name].shape)}, the model needs {tuple(value.shape)}"
            )
    if unknown := tensors.keys() - state.keys():
        raise ValueError(f"{path} holds {min(unknown)!r}, which the model does not have")


def _without_aliases(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tied weights once each, and which names stand for them: the format allows no shared memory."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, value in state.items():
        identity = (value.data_ptr(), value.shape, value.stride(), value.dtype) if value.numel() else (name,)
        if identity in first:
            aliases[name] = first[identity]
            continue
        first[identity] = name
        value = value.detach().cpu().contiguous()
        shared = value.untyped_storage().nbytes() != value.nbytes
        tensors[name] = value.clone(memory_format=torch.contiguous_format) if shared else value
    return tensors, aliases
