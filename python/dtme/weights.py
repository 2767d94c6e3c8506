"""The file of weights: read once, and every tensor compared with the checksum it was saved with."""

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .formats import parse_json

KEY = "dtme"
"""Under which the file's metadata holds the config."""
ELSEWHERE = "was not written by save_pretrained"
MAX_THREADS = 4


def write_weights(path: Path, tensors: Mapping[str, Tensor], config: str) -> None:
    from safetensors.torch import save_file

    save_file(dict(tensors), path, {"format": "pt", KEY: config})


def read_weights(path: Path) -> tuple[str, dict[str, Tensor]]:
    """The config and the tensors of what is at ``path`` now, whatever is put there while it is read.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such file, or damaged in its structure.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    # one file, opened once and read to its end: a map of it would change when somebody writes over it
    data = path.read_bytes()
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, RuntimeError, LookupError, AssertionError, OverflowError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    header = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")], f"the header of {path}")
    config = (header.get("__metadata__") or {}).get(KEY)
    if config is None:
        raise ValueError(f"{path} {ELSEWHERE}")
    return config, tensors


def digests_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """A checksum of every tensor with its name, dtype and shape.

    SHA-256 runs in hardware where there are instructions for it, outside of Python's lock.
    """
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        return dict(zip(tensors, pool.map(_digest, tensors.items()), strict=True))


def _digest(item: tuple[str, Tensor]) -> str:
    name, tensor = item
    found = hashlib.sha256(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
    if tensor.numel():
        found.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def check_digests(where: Any, tensors: Mapping[str, Tensor], saved: Mapping[str, str]) -> None:
    """ValueError naming the first tensor that is not, bit for bit, what was saved."""
    if lost := sorted(tensors.keys() ^ saved.keys()):
        raise ValueError(f"{where} is damaged: it holds {lost[0]!r} without a checksum, or a checksum without it")
    for name, digest in digests_of(tensors).items():
        if digest != saved[name]:
            raise ValueError(f"{where} is damaged: the checksum of {name!r} is not that which was saved with it")
