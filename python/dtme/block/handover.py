"""What another plan leaves of a block's modules, and what begins with it."""

from collections.abc import Iterable

import torch
from torch import nn

from .adapter import BlockAdapter

KINDS = ("weight", "bias", "tokens")


def adopt(new: BlockAdapter, old: BlockAdapter) -> None:
    """Let ``new`` go on with the parameters, gates and statistics of ``old`` for all that it has too."""
    for kind in KINDS:
        made, trained = getattr(new, kind), getattr(old, kind)
        for owner in made:
            if owner in trained and trained[owner].shape == made[owner].shape:
                made[owner] = trained[owner]
    for owner, gate in old.gate.items():
        if owner in new.tokens and new.tokens[owner] is old.tokens[owner]:
            new.gate[owner] = gate
    for name in ("running_mean", "running_var"):
        made, taken = getattr(new, name), getattr(old, name)
        for owner in new.weight if made is not None and taken is not None else ():
            if owner in old.weight:
                made.register_buffer(owner, taken[owner])


def draw_tokens(new: BlockAdapter, old: BlockAdapter | None) -> None:
    """Normal with std 0.02: task tokens of ``new`` that are not those of ``old``; nothing is drawn for the others."""
    with torch.no_grad():
        for owner in new_tokens(new, old):
            new.tokens[owner].copy_(torch.randn_like(new.tokens[owner]) * 0.02)


def new_tokens(new: BlockAdapter, old: BlockAdapter | None) -> list[str]:
    """Whose task tokens ``new`` does not have from ``old``."""
    kept = {id(tokens) for tokens in old.tokens.values()} if old is not None else set()
    return [owner for owner, tokens in new.tokens.items() if id(tokens) not in kept]


def add_gates(adapter: BlockAdapter, owners: Iterable[str]) -> None:
    """Let the task tokens of ``owners`` begin without effect."""
    for owner in owners:
        adapter.gate[owner] = nn.Parameter(torch.zeros_like(adapter.tokens[owner][0, 0]))


def begin_like(adapter: BlockAdapter, task: str, owner: str) -> None:
    """Let the modules of ``task`` be copies of those of ``owner``, with their gates and statistics."""
    with torch.no_grad():
        for kind in KINDS:
            parameters = getattr(adapter, kind)
            if owner in parameters:
                parameters[task].copy_(parameters[owner])
                parameters[task].requires_grad_(parameters[owner].requires_grad)
        if owner in adapter.gate:
            adapter.gate[task] = nn.Parameter(adapter.gate[owner].detach().clone())
        for statistics in (adapter.running_mean, adapter.running_var):
            if statistics is not None and owner in adapter.weight:
                statistics[task].copy_(statistics[owner])
