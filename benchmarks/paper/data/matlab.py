"""MATLAB files, those of version 5 and those of version 7.3, which are HDF5, as the same plain Python values."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import scipy.io

from .dataset import DataError


def read_mat(path: Path, variable: str) -> Any:
    """One variable of a MATLAB file.

    Returns:
        an array with MATLAB's shape for numbers and truth values, a string for characters, a list for a cell array,
        and for a struct, which is an array of structs in MATLAB, a list of dictionaries, empty where it has none. Lists
        are in MATLAB's order, down the columns.

    Raises:
        DataError: the file is missing, truncated or no MATLAB file, or has no such variable; the message names it.
    """
    try:
        held, value = _read_hdf5(path, variable) if h5py.is_hdf5(path) else _read_version_5(path, variable)
    except Exception as error:  # both libraries raise all kinds of errors at broken files
        raise DataError(f"{path} cannot be read as a MATLAB file: {type(error).__name__}: {error}") from error
    if variable not in held:
        raise DataError(f"{path} has no variable {variable}, it holds {', '.join(held) or 'none'}")
    return value


def _read_version_5(path: Path, variable: str) -> tuple[list[str], Any]:
    held = [name for name, *_ in scipy.io.whosmat(path)]
    if variable not in held:
        return held, None
    return held, _plain(scipy.io.loadmat(path, variable_names=[variable])[variable])


def _plain(value: np.ndarray) -> Any:
    """What scipy makes of MATLAB's values."""
    if value.dtype.names:
        return [{name: _plain(record[name]) for name in value.dtype.names} for record in value.ravel(order="F")]
    if value.dtype == object:
        return [_plain(cell) for cell in value.ravel(order="F")]
    if value.dtype.kind == "U":
        return "".join(value.ravel().tolist())
    return value


def _read_hdf5(path: Path, variable: str) -> tuple[list[str], Any]:
    with h5py.File(path, "r") as file:
        held = [name for name in file if not name.startswith("#")]
        return held, _of_hdf5(file, file[variable]) if variable in held else None


def _of_hdf5(file: h5py.File, node: h5py.Group | h5py.Dataset) -> Any:
    """MATLAB's HDF5: arrays are transposed, characters are their codes; a struct is a group of its fields; of an array
    of structs each field is an array of references, which unlike a cell array is of no MATLAB class."""
    kind = node.attrs.get("MATLAB_class", b"")
    if isinstance(node, h5py.Group):
        fields = {name: node[name] for name in node}
        if fields and all(_is_field_of_many(field) for field in fields.values()):
            columns = {
                name: [_of_hdf5(file, file[at]) for at in field[()].T.ravel("F")] for name, field in fields.items()
            }
            return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return [{name: _of_hdf5(file, field) for name, field in fields.items()}]
    if node.attrs.get("MATLAB_empty", 0):
        if kind == b"char":
            return ""
        return [] if kind in (b"struct", b"cell") else np.zeros([int(side) for side in node[()]])
    value = node[()].T
    if kind == b"cell":
        return [_of_hdf5(file, file[at]) for at in value.ravel("F")]
    if kind == b"char":
        return "".join(map(chr, value.ravel("F").tolist()))
    return value


def _is_field_of_many(field: h5py.Group | h5py.Dataset) -> bool:
    return (
        isinstance(field, h5py.Dataset)
        and h5py.check_ref_dtype(field.dtype) is not None
        and "MATLAB_class" not in field.attrs
    )
