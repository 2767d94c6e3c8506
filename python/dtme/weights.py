"""The file of weights: read once, and every tensor compared with the checksum it was saved with."""

import hashlib
import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .checks import Record, anything, at_least, list_of, mapping_of, one_of
from .formats import parse_json

KEY = "dtme"
"""Under which the file's metadata holds the config."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    **{f"I{bits}": getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": getattr(torch, f"uint{bits}") for bits in (8, 16, 32, 64)},
    "BOOL": torch.bool,
}
"""By the format's names for them."""
SPEC = Record({"dtype": one_of(*DTYPES), "shape": list_of(at_least(0)), "data_offsets": list_of(at_least(0))})
MAX_THREADS = 4
WORTH_THREADS = 2**22
"""Bytes below which starting threads takes longer than the checksums."""


def write_weights(path: Path, tensors: Mapping[str, Tensor], config: str) -> None:
    from safetensors.torch import save_file

    save_file(dict(tensors), path, {"format": "pt", KEY: config})


def read_weights(path: Path) -> tuple[str, dict[str, Tensor]]:
    """The config and the tensors of what is at ``path`` now, whatever is put there while it is read.

    The library reads a file by a map of it, which changes when somebody writes over it, or copies it twice.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such file, or damaged in its structure.
    """
    with path.open("rb") as file:
        data = np.empty(os.fstat(file.fileno()).st_size, np.uint8)
        if file.readinto(data.data) != len(data):
            raise ValueError(f"{path} is damaged: it became shorter while it was read")
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    if not 8 < start <= len(data):
        raise ValueError(f"{path} is damaged: it ends before its header does")
    header = parse_json(data[8:start].tobytes(), f"the header of {path}")
    try:
        specs = mapping_of(anything)(header, "the header")
        metadata = mapping_of(anything)(specs.pop("__metadata__", {}), "its metadata")
        tensors = _tensors(data, start, {name: SPEC(spec, repr(name)) for name, spec in specs.items()})
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(metadata.get(KEY), str):
        raise ValueError(f"{path} was not written by save_pretrained")
    return metadata[KEY], tensors


def _tensors(data: np.ndarray, start: int, specs: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    """Views of ``data``, which they share among them without a gap."""
    tensors: dict[str, Tensor] = {}
    first = start
    for name, spec in sorted(specs.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape = DTYPES[spec["dtype"]], spec["shape"]
        count = math.prod(shape)
        end = start + count * dtype.itemsize
        if [start, end] != [first + offset for offset in spec["data_offsets"]] or end > len(data):
            raise ValueError(f"{name!r} does not lie where a {dtype} of shape {shape} would")
        flat = torch.frombuffer(data, dtype=dtype, count=count, offset=start) if count else torch.empty(0, dtype=dtype)
        tensors[name] = flat.reshape(shape)
        start = end
    if start != len(data):
        raise ValueError("it is longer than its tensors")
    return tensors


def digests_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """A checksum of every tensor with its name, dtype and shape.

    The first half of SHA-256, which runs in hardware where there are instructions for it, outside of Python's lock.
    """
    if sum(tensor.nbytes for tensor in tensors.values()) < WORTH_THREADS:
        return {name: _digest((name, tensor)) for name, tensor in tensors.items()}
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        return dict(zip(tensors, pool.map(_digest, tensors.items()), strict=True))


def _digest(item: tuple[str, Tensor]) -> str:
    name, tensor = item
    found = hashlib.sha256(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
    if tensor.numel():
        found.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()[:32]


def check_digests(where: Any, tensors: Mapping[str, Tensor], saved: Mapping[str, str]) -> None:
    """ValueError naming the first tensor that is not, bit for bit, what was saved."""
    if lost := sorted(tensors.keys() ^ saved.keys()):
        raise ValueError(f"{where} is damaged: it holds {lost[0]!r} without a checksum, or a checksum without it")
    for name, digest in digests_of(tensors).items():
        if digest != saved[name]:
            raise ValueError(f"{where} is damaged: the checksum of {name!r} is not that which was saved with it")
