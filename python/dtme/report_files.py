"""Reports as JSON files, and whether a report's figures can be those of an analysis."""

import math
import os
import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .checks import (
    Record,
    anything,
    at_least,
    boolean,
    list_of,
    mapping_of,
    names,
    number,
    or_null,
    positive,
    tensor_of,
)
from .formats import Format
from .packing import FLOATS, INTEGERS, pack, unpack
from .plan import check_tasks
from .units import Split, Units

if TYPE_CHECKING:
    from .report import ConflictReport

LARGEST = sys.float_info.max
COUNTS = ("range_counts", "null_counts", "valid_counts")
PACKED_COUNTS, PACKED_FLOATS = partial(unpack, types=INTEGERS), partial(unpack, types=FLOATS)
PER_BLOCK = tensor_of(at_least(0), 1, torch.int64)
PER_PAIR = tensor_of(at_least(0), 3, torch.int64)
SPLIT = Record(
    {
        "ratio": positive,
        "ranks": PER_BLOCK,
        "range_counts": PER_PAIR,
        "null_counts": PER_PAIR,
        "range_units": or_null(PACKED_COUNTS),
        "null_units": or_null(PACKED_COUNTS),
    }
)
FIELDS = Record(
    {
        "tasks": names,
        "blocks": names,
        "num_samples": at_least(1),
        "ratio": positive,
        "ranks": PER_BLOCK,
        "eigenvalues": list_of(tensor_of(number, 1, torch.float64)),
        **dict.fromkeys(COUNTS, PER_PAIR),
    },
    # what the files of earlier releases lack, and files leave out where an analysis has none
    {
        "num_batches": at_least(0),
        "skipped": mapping_of(at_least(0)),
        "settled": or_null(boolean),
        "gains": list_of(or_null(number)),
        "plan_options": mapping_of(anything),
        "reached": tensor_of(boolean, 2, torch.bool),
        "units": Record(dict.fromkeys(Units._fields, PACKED_COUNTS)),
        "gain_resamples": PACKED_FLOATS,
        "head_losses": PACKED_FLOATS,
        "alternatives": list_of(SPLIT),
        "bases": list_of(PACKED_FLOATS),
    },
)
FORMAT = Format("dtme.ConflictReport", FIELDS)


def save_report(report: "ConflictReport", path: str | os.PathLike[str], bases: bool) -> None:
    """Write ``report``, with its bases only if asked; ValueError if they are asked for and not there."""
    if bases and report.bases is None:
        raise ValueError("bases=True, but this report has no bases: it was loaded from a file without them")
    content: dict[str, Any] = {
        "tasks": list(report.tasks),
        "blocks": list(report.blocks),
        "num_samples": report.num_samples,
        "ratio": report.ratio,
        "num_batches": report.num_batches,
        "skipped": dict(report.skipped),
        "settled": report.settled,
        "ranks": report.ranks.tolist(),
    }
    content |= {name: getattr(report, name).tolist() for name in COUNTS}
    content["eigenvalues"] = [values.tolist() for values in report.eigenvalues]
    # JSON knows no NaN
    content["gains"] = [None if math.isnan(gain) else gain for gain in report.gains.tolist()]
    if report.plan_options:
        content["plan_options"] = {name: _finite(value) for name, value in report.plan_options.items()}
    if report.reached is not None:
        content["reached"] = report.reached.tolist()
    if report.units is not None:
        content["units"] = {name: pack(counts) for name, counts in report.units._asdict().items()}
    if report.gain_resamples is not None:
        content["gain_resamples"] = pack(report.gain_resamples)
    if report.head_losses is not None:
        content["head_losses"] = pack(report.head_losses)
    if report.alternatives:
        content["alternatives"] = [_split_content(*item) for item in report.alternatives.items()]
    if bases and report.bases is not None:
        content["bases"] = [pack(basis.float()) for basis in report.bases]
    FORMAT.save(path, content)


def _finite(option: Any) -> Any:
    """Of an infinite limit, which JSON cannot hold, the largest number: nothing lies between."""
    return max(-LARGEST, min(option, LARGEST)) if isinstance(option, float) else option


def _split_content(ratio: float, split: Split) -> dict[str, Any]:
    units = {name: getattr(split, name) for name in ("range_units", "null_units")}
    return {"ratio": ratio} | {
        name: None if value is None else pack(value) if name in units else value.tolist()
        for name, value in split._asdict().items()
    }


def load_report(cls: "type[ConflictReport]", path: str | os.PathLike[str]) -> "ConflictReport":
    """Read what ``save_report`` wrote; ValueError names the file and what is wrong with it."""
    document = FORMAT.load(path)
    try:
        report = cls(**_made_of(document.content))
        check_report(report)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    document.check()
    return report


def _made_of(content: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a report, of the fields of its file."""
    content |= {"tasks": check_tasks(content["tasks"]), "blocks": tuple(content["blocks"])}
    content["eigenvalues"] = stack_if_equal(content["eigenvalues"])
    if "gains" in content:
        gains = [math.nan if gain is None else gain for gain in content["gains"]]
        content["gains"] = torch.tensor(gains, dtype=torch.float64)
    if "units" in content:
        content["units"] = Units(**content["units"])
    if "bases" in content:
        content["bases"] = tuple(content["bases"])
    splits = content.get("alternatives", [])
    content["alternatives"] = {split.pop("ratio"): Split(**split) for split in splits}
    return content


def check_report(report: "ConflictReport") -> None:
    """ValueError where figures cannot be those of an analysis."""
    if any(len(values) < 2 for values in report.eigenvalues):
        raise ValueError("eigenvalues must be at least two numbers per block")
    _check_counts(report, "valid_counts", report.valid_counts)
    this = Split(report.ranks, report.range_counts, report.null_counts)
    for where, split in {"": this, **{f"alternatives[{r}].": s for r, s in report.alternatives.items()}}.items():
        for name in COUNTS[:2]:
            _check_counts(report, where + name, getattr(split, name))
        _check_ranks(report, f"{where}ranks", split.ranks)
    check_units(report)
    _check_what_was_read(report)
    _check_per_block(report)


def check_units(report: "ConflictReport") -> None:
    """ValueError where the units cannot be what was summed."""
    units, num_tasks = report.units, len(report.tasks)
    if units is None:
        if any(split.range_units is not None for split in report.alternatives.values()):
            raise ValueError("alternatives have units, the report has none")
        return
    first, second = torch.triu_indices(num_tasks, num_tasks, 1)
    shape = (len(units.batches), len(report.blocks), len(first))
    pieces = {"units.range": (units.range, report.range_counts), "units.null": (units.null, report.null_counts)}
    for ratio, split in report.alternatives.items():
        if (split.range_units is None) != (split.null_units is None):
            raise ValueError(f"alternatives[{ratio}] must have range_units and null_units or neither")
        for name, per_unit, counts in (
            ("range_units", split.range_units, split.range_counts),
            ("null_units", split.null_units, split.null_counts),
        ):
            if per_unit is not None:
                pieces[f"alternatives[{ratio}].{name}"] = (per_unit, counts)
    pieces = {"units.valid": (units.valid, report.valid_counts), **pieces}
    for name, (per_unit, counts) in pieces.items():
        if tuple(per_unit.shape) != shape:
            raise ValueError(f"{name} must be {shape}, got {tuple(per_unit.shape)}")
        if tuple(counts.shape) != (len(report.blocks), num_tasks, num_tasks):
            raise ValueError(f"{name} adds up to counts of another shape, {tuple(counts.shape)}")
        if (per_unit < 0).any() or (per_unit > units.valid).any():
            raise ValueError(f"{name} must be counts, none above units.valid")
        if not torch.equal(per_unit.sum(0), counts[:, first, second]):
            raise ValueError(f"{name} must add up to the counts of the report")
    if units.batches.ndim != 1 or (units.batches < 1).any() or units.batches.sum() != report.num_batches:
        raise ValueError(f"units.batches must be positive and add up to num_batches, which is {report.num_batches}")


def _check_counts(report: "ConflictReport", name: str, counts: Tensor) -> None:
    shape = (len(report.blocks), len(report.tasks), len(report.tasks))
    if tuple(counts.shape) != shape:
        raise ValueError(f"{name} must be {shape}, got {tuple(counts.shape)}")
    symmetric = torch.equal(counts, counts.mT) and not counts.diagonal(dim1=1, dim2=2).any()
    if not symmetric or (counts < 0).any() or (counts > report.valid_counts).any():
        raise ValueError(f"{name} must be symmetric counts with a zero diagonal, none above valid_counts")


def _check_ranks(report: "ConflictReport", name: str, ranks: Tensor) -> None:
    widths = list(report.num_features.values())
    if ranks.shape != (len(widths),) or not all(1 <= m < p for m, p in zip(ranks.tolist(), widths, strict=True)):
        raise ValueError(f"{name} must be one in [1, p-1] for each of {len(widths)} blocks, got {ranks.tolist()}")


def _check_what_was_read(report: "ConflictReport") -> None:
    for task in report.skipped:
        if task not in report.tasks:
            raise ValueError(f"skipped[{task!r}] must be the batches of one of {list(report.tasks)}")
    from .stability import rules_of  # which imports reports

    try:
        rules_of(report.plan_options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"plan_options: {error}") from error


def _check_per_block(report: "ConflictReport") -> None:
    num_blocks, reached = len(report.blocks), report.reached
    if reached is not None:
        if tuple(reached.shape) != (num_blocks, len(report.tasks)):
            raise ValueError(f"reached must be ({num_blocks}, {len(report.tasks)}) of true and false")
        if (report.valid_counts.any(2) & ~reached).any():
            raise ValueError("reached must be true where valid_counts are not zero")
    if tuple(report.gains.shape) != (num_blocks,):
        raise ValueError(f"gains must be one for each of {num_blocks} blocks, got {tuple(report.gains.shape)}")
    resamples = report.gain_resamples
    if resamples is not None and (resamples.ndim != 2 or not len(resamples) or resamples.shape[1] != num_blocks):
        raise ValueError(f"gain_resamples must be (R, {num_blocks}), got {tuple(resamples.shape)}")
    heads, num_tasks = report.head_losses, len(report.tasks)
    if heads is not None and (heads.ndim != 3 or not len(heads) or tuple(heads.shape[1:]) != (num_tasks, 2)):
        raise ValueError(f"head_losses must be (n, {num_tasks}, 2), got {tuple(heads.shape)}")
    if report.bases is not None:
        shapes = [(p, p) for p in report.num_features.values()]
        if [tuple(basis.shape) for basis in report.bases] != shapes:
            raise ValueError("bases must be a square matrix of the block's width for each block")


def stack_if_equal(values: Sequence[Tensor]) -> Tensor | list[Tensor]:
    """(D, p) where all blocks are p wide, else the list."""
    return torch.stack(list(values)) if len({len(v) for v in values}) == 1 else list(values)
