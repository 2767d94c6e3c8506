"""A basis as the rotation takes it, kept for the next call, and how far off a dot product by it may be."""

import threading
from collections import OrderedDict
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..launch import in_reach
from .precision import THREE_PRODUCTS, Precision
from .scaling import split_basis

CHANNELS, COLUMNS = 64, 128  # whole tiles of every rotation: what copies are padded to

# of numbers in [1, 2): rounding to nearest in float32; and what one step of a tensor core over 16 products may take
# away, in parts of the largest of its terms: it aligns them, cuts them off, and cuts their sum off
ROUNDING, TRUNCATION, STEP = 2.0**-24, 2.0**-22, 16

_KEPT = 64  # bases: more than a network has blocks
_kept: OrderedDict[tuple[object, ...], "tuple[StorageWeakRef, int, Basis]"] = OrderedDict()
_lock = threading.Lock()


class Basis(NamedTuple):
    """terms (1 or 2, height, width) float16, padded with zeros; units (width,) undo their scales; doubt ()."""

    terms: Tensor
    units: Tensor
    doubt: Tensor
    """Where it was wanted. The whole dot less that in one space, if it is larger than this times both norms, has the
    sign that the dot in the other space has when that is rotated into."""


def prepare(basis: Tensor, precision: Precision, channels: int, sum_terms: int | None) -> Basis:
    """The basis (p, p), split; as it was for the last call, where torch can tell that nothing has written to it since.

    Torch's version counter tells, as it does for autograd: writing through ``.data`` escapes both.

    Args:
        precision: of a rotation.
        channels: of the tiles that it adds up.
        sum_terms: additions that a total, a sum over channels, goes through at most; None where no bound is wanted.
    """
    capturing = basis.is_cuda and torch.cuda.is_current_stream_capturing()  # replayed, the graph has to split anew
    if capturing or basis.is_inference() or basis.is_meta:
        return _prepare(basis, precision, channels, sum_terms)
    storage = StorageWeakRef(basis.untyped_storage())
    stream = torch.cuda.current_stream(basis.device).cuda_stream if basis.is_cuda else 0
    where = (storage.cdata, basis.storage_offset(), basis.shape, basis.stride(), basis.dtype, basis.device)
    key = (*where, stream, precision, channels, sum_terms)
    with _lock:
        if (kept := _kept.get(key)) and not kept[0].expired() and kept[1] == basis._version:
            _kept.move_to_end(key)
            return kept[2]
    version, prepared = basis._version, _prepare(basis.detach(), precision, channels, sum_terms)
    with _lock:
        for other in [k for k, (reference, *_) in _kept.items() if reference.expired()]:
            del _kept[other]
        _kept[key] = storage, version, prepared
        while len(_kept) > _KEPT:
            _kept.popitem(last=False)
    return prepared


def _prepare(basis: Tensor, precision: Precision, channels: int, sum_terms: int | None) -> Basis:
    p, basis = len(basis), in_reach(basis)
    height, width = triton.cdiv(p, CHANNELS) * CHANNELS, triton.cdiv(p, COLUMNS) * COLUMNS
    terms = torch.empty(precision.basis_terms, height, width, dtype=torch.float16, device=basis.device)
    units = torch.empty(width, dtype=torch.float32, device=basis.device)
    grid = (width // 16,)
    split_basis[grid](
        *(basis, terms, units, p, height, width, basis.stride()), TERMS=precision.basis_terms, BC=64, BN=16
    )
    if sum_terms is None:
        return Basis(terms, units, units[0])
    return Basis(terms, units, _doubt(terms, units, p, precision, channels, sum_terms))


def _doubt(terms: Tensor, units: Tensor, p: int, precision: Precision, channels: int, sum_terms: int) -> Tensor:
    """How far <g_i, g_j> and the sum of its parts may be apart, in units of both norms: an upper bound, float32 ().

    - The split basis U is not quite orthonormal: by no more than ||E||_2 <= ||E^4||_F^(1/4), with E = U^T U - 1.
    - A coordinate is a sum of short sums, p / channels of each product, added with rounding. What a rounding takes from
      all coordinates together is at most 2^-24 of the norm of what has been summed up: their number is what counts.
    - A short sum is channels / 16 steps of a tensor core. The terms of a step and what it is added to have together at
      most the norm of the gradient's part, and half of that again where all of the part lies in the first step; the
      norms of the parts add up to sqrt(p / channels) of the whole, at most.
    - Three products leave out a fourth, of the lower halves.
    - These errors of both gradients are in the dots of both spaces; the total adds its own.
    """
    u = (terms.double().sum(0) * units)[:p, :p]
    error = u.T @ u
    error.diagonal().sub_(1)
    distance = torch.linalg.matrix_norm(torch.linalg.matrix_power(error, 4)) ** 0.25
    sums = triton.cdiv(p, channels)
    rotated = precision.products * sums * ROUNDING + TRUNCATION * (channels // STEP + 0.5) * sums**0.5 + 4 * ROUNDING
    doubt = distance + 4 * rotated + sum_terms * ROUNDING
    if precision == THREE_PRODUCTS:
        doubt = doubt + 4 * 2.0**-11 * torch.linalg.matrix_norm(terms[1].double() * units)
    return (1.01 * doubt).float()  # 1.01: products of errors, and norms that are rounded themselves
