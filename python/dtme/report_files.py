"""Reports as JSON files, and whether a report's figures can be those of an analysis."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .files import load_json, save_json
from .packing import FLOATS, INTEGERS, pack, unpack
from .plan import check_tasks
from .units import Split, Units

if TYPE_CHECKING:
    from .report import ConflictReport

KIND = "dtme.ConflictReport"
COUNTS = ("range_counts", "null_counts", "valid_counts")
FIELDS = {"tasks", "blocks", "num_samples", "ratio", "ranks", "eigenvalues", *COUNTS}
# what the files of earlier releases lack, and files leave out where an analysis has none
OPTIONAL = {"units", "num_batches", "skipped", "settled", "reached", "gains", "gain_resamples", "bases", "alternatives"}
OPTIONAL |= {"plan_options"}
SPLIT = {"ratio", "ranks", "range_counts", "null_counts", "range_units", "null_units"}


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
        content["plan_options"] = dict(report.plan_options)
    if report.reached is not None:
        content["reached"] = report.reached.tolist()
    if report.units is not None:
        content["units"] = {name: pack(counts) for name, counts in report.units._asdict().items()}
    if report.gain_resamples is not None:
        content["gain_resamples"] = pack(report.gain_resamples)
    if report.alternatives:
        content["alternatives"] = [_split_content(*item) for item in report.alternatives.items()]
    if bases and report.bases is not None:
        content["bases"] = [pack(basis.float()) for basis in report.bases]
    save_json(path, KIND, content)


def _split_content(ratio: float, split: Split) -> dict[str, Any]:
    units = {name: getattr(split, name) for name in ("range_units", "null_units")}
    return {"ratio": ratio} | {
        name: None if value is None else pack(value) if name in units else value.tolist()
        for name, value in split._asdict().items()
    }


def load_report(cls: "type[ConflictReport]", path: str | os.PathLike[str]) -> "ConflictReport":
    """Read what ``save_report`` wrote; ValueError names the file and what is wrong with it."""
    content = load_json(path, KIND, FIELDS, OPTIONAL)
    try:
        for name in ("ranks", *COUNTS):
            content[name] = _integers(content[name], name)
        content |= {"tasks": check_tasks(content["tasks"]), "blocks": tuple(content["blocks"])}
        if not isinstance(content["num_samples"], int):
            raise ValueError(f"num_samples must be an integer, got {content['num_samples']!r}")
        content["eigenvalues"] = stack_if_equal(
            [torch.tensor(row, dtype=torch.float64) for row in content["eigenvalues"]]
        )
        content |= {name: READ[name](content[name]) for name in READ if content.get(name) is not None}
        report = cls(**content)
        check_report(report)
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return report


def _integers(values: Any, name: str) -> Tensor:
    tensor = torch.tensor(values)
    if tensor.dtype != torch.int64:
        raise ValueError(f"{name} must hold integers")
    return tensor


def _read_units(content: Any) -> Units:
    if not isinstance(content, dict) or content.keys() != set(Units._fields):
        raise ValueError(f"units must hold {list(Units._fields)}")
    return Units(**{name: unpack(content[name], f"units.{name}", INTEGERS) for name in Units._fields})


def _read_alternatives(content: Any) -> dict[float, Split]:
    splits: dict[float, Split] = {}
    for other in content:
        if not isinstance(other, dict) or other.keys() != SPLIT or not _is_positive(other["ratio"]):
            raise ValueError(f"alternatives must each hold {sorted(SPLIT)}, the ratio a positive number")
        where = f"alternatives[{other['ratio']}]"
        values: dict[str, Any] = {}
        for name in Split._fields:
            value = other[name]
            if name.endswith("_units"):
                values[name] = None if value is None else unpack(value, f"{where}.{name}", INTEGERS)
            else:
                values[name] = _integers(value, f"{where}.{name}")
        splits[other["ratio"]] = Split(**values)
    return splits


READ = {
    "units": _read_units,
    "reached": lambda rows: torch.tensor(rows),
    "gains": lambda gains: torch.tensor([math.nan if g is None else float(g) for g in gains], dtype=torch.float64),
    "gain_resamples": lambda packed: unpack(packed, "gain_resamples", FLOATS),
    "bases": lambda bases: tuple(unpack(basis, f"bases[{d}]", FLOATS) for d, basis in enumerate(bases)),
    "alternatives": _read_alternatives,
}


def check_report(report: "ConflictReport") -> None:
    """ValueError where figures cannot be those of an analysis."""
    num_blocks = len(report.blocks)
    if len(set(report.blocks)) != num_blocks or not all(isinstance(block, str) for block in report.blocks):
        raise ValueError(f"blocks must be different names, got {list(report.blocks)}")
    for name in ("num_samples", "ratio"):
        if not _is_positive(value := getattr(report, name)):
            raise ValueError(f"{name} must be a positive number, got {value!r}")
    if any(values.ndim != 1 or len(values) < 2 for values in report.eigenvalues):
        raise ValueError("eigenvalues must be a list of numbers a block")
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
    if type(report.num_batches) is not int or report.num_batches < 0:
        raise ValueError(f"num_batches must be an integer of at least 0, got {report.num_batches!r}")
    if report.settled is not None and not isinstance(report.settled, bool):
        raise ValueError(f"settled must be true, false or null, got {report.settled!r}")
    if not isinstance(report.skipped, Mapping):
        raise ValueError(f"skipped must map tasks to batches, got {report.skipped!r}")
    for task, batches in report.skipped.items():
        if task not in report.tasks or type(batches) is not int or batches < 0:
            raise ValueError(f"skipped[{task!r}] must be the batches of one of {list(report.tasks)}, got {batches!r}")


def _check_per_block(report: "ConflictReport") -> None:
    num_blocks, reached = len(report.blocks), report.reached
    if reached is not None:
        if reached.dtype != torch.bool or tuple(reached.shape) != (num_blocks, len(report.tasks)):
            raise ValueError(f"reached must be ({num_blocks}, {len(report.tasks)}) of true and false")
        if (report.valid_counts.any(2) & ~reached).any():
            raise ValueError("reached must be true where valid_counts are not zero")
    if tuple(report.gains.shape) != (num_blocks,):
        raise ValueError(f"gains must be one for each of {num_blocks} blocks, got {tuple(report.gains.shape)}")
    resamples = report.gain_resamples
    if resamples is not None and (resamples.ndim != 2 or not len(resamples) or resamples.shape[1] != num_blocks):
        raise ValueError(f"gain_resamples must be (R, {num_blocks}), got {tuple(resamples.shape)}")
    if report.bases is not None:
        shapes = [(p, p) for p in report.num_features.values()]
        if [tuple(basis.shape) for basis in report.bases] != shapes:
            raise ValueError("bases must be a square matrix of the block's width for each block")


def _is_positive(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, float)) and value > 0


def stack_if_equal(values: Sequence[Tensor]) -> Tensor | list[Tensor]:
    """(D, p) where all blocks are p wide, else the list."""
    return torch.stack(list(values)) if len({len(v) for v in values}) == 1 else list(values)
