"""Large tensors as a line of text in a JSON file."""

import base64
import math
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

TYPES = {"int32": "<i4", "int64": "<i8", "float32": "<f4", "float64": "<f8"}
INTEGERS, FLOATS = ("int32", "int64"), ("float32", "float64")


def pack(tensor: Tensor) -> dict[str, Any]:
    """``tensor``'s shape, type and compressed little-endian bytes; integers take four bytes each where they fit."""
    values = tensor.detach().cpu().numpy()
    name = str(values.dtype)
    if name == "int64" and (not values.size or (values.min() >= -(2**31) and values.max() < 2**31)):
        name = "int32"
    data = zlib.compress(np.ascontiguousarray(values, TYPES[name]).tobytes(), 3)
    return {"shape": list(tensor.shape), "dtype": name, "zlib": base64.b64encode(data).decode()}


def unpack(packed: Any, name: str, types: tuple[str, ...]) -> Tensor:
    """What ``pack`` packed, integers as int64; ValueError names the field ``name`` where it is damaged."""
    if not isinstance(packed, dict) or packed.keys() != {"shape", "dtype", "zlib"} or packed["dtype"] not in types:
        raise ValueError(f"{name} must hold a shape, a dtype of {list(types)} and zlib data")
    shape, text = packed["shape"], packed["zlib"]
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"{name} has the shape {shape!r}")
    kind = np.dtype(TYPES[packed["dtype"]])
    expected = math.prod(shape) * kind.itemsize
    try:
        inflate = zlib.decompressobj()
        # no more than the shape says, whatever the data would expand to
        data = inflate.decompress(base64.b64decode(text, validate=True), expected + 1)
    except (TypeError, ValueError, OverflowError, zlib.error) as error:
        raise ValueError(f"{name} cannot be decompressed: {error}") from error
    if len(data) != expected or not inflate.eof:
        raise ValueError(f"{name} does not hold the {expected} bytes that its shape {shape} needs")
    tensor = torch.from_numpy(np.frombuffer(data, kind).reshape(shape).astype(kind.newbyteorder("=")))
    return tensor.long() if packed["dtype"] in INTEGERS else tensor
