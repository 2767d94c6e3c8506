"""Made-up reports, with counts batch by batch."""

import torch

import dtme
from dtme.units import Split, Units

NAMES = ("semseg", "depth", "normals", "edges", "saliency", "parts", "pose", "albedo", "shading", "scene")


def square(per_pair, num_tasks):
    """(..., P) counts of pairs as (..., K, K)."""
    first, second = torch.triu_indices(num_tasks, num_tasks, 1)
    counts = torch.zeros(*per_pair.shape[:-1], num_tasks, num_tasks, dtype=per_pair.dtype)
    counts[..., first, second] = counts[..., second, first] = per_pair
    return counts


def made_up(
    range_rates, null_rates, num_tasks=3, num_units=16, noise=0.02, valid=400, widths=8, missing=0.0, seed=0, **fields
):
    """A report of blocks whose pairs have the given rates, (D,) or (D, P), with noise from batch to batch."""
    generator = torch.Generator().manual_seed(seed)
    num_pairs = num_tasks * (num_tasks - 1) // 2
    rates = [torch.as_tensor(r, dtype=torch.float64) for r in (range_rates, null_rates)]
    rates = [(r if r.ndim == 2 else r[:, None]).expand(-1, num_pairs) for r in rates]
    num_blocks = len(rates[0])
    there = torch.rand(num_units, 1, num_pairs, generator=generator) >= missing
    possible = (there * valid).expand(num_units, num_blocks, num_pairs).clone()

    def counted(rate):
        around = noise * torch.randn(num_units, num_blocks, 1, generator=generator, dtype=torch.float64)
        return torch.binomial(possible.double(), (rate + around).clamp(0, 1), generator=generator).long()

    units = Units(counted(rates[0]), counted(rates[1]), possible, torch.ones(num_units, dtype=torch.int64))
    widths = [widths] * num_blocks if isinstance(widths, int) else widths
    values = [torch.rand(p, generator=generator, dtype=torch.float64).sort(descending=True).values for p in widths]
    arguments = {
        "tasks": NAMES[:num_tasks] if num_tasks <= len(NAMES) else tuple(f"task{k}" for k in range(num_tasks)),
        "blocks": tuple(f"encoder.layer.{d}" for d in range(num_blocks)),
        "ranks": torch.ones(num_blocks, dtype=torch.int64),
        "range_counts": square(units.range.sum(0), num_tasks),
        "null_counts": square(units.null.sum(0), num_tasks),
        "valid_counts": square(units.valid.sum(0), num_tasks),
        "eigenvalues": torch.stack(values) if len(set(widths)) == 1 else values,
        "num_samples": 8 * num_units,
        "units": units,
        "num_batches": num_units,
    }
    return dtme.ConflictReport(**{**arguments, **fields})


def other_split(report):
    """The same gradients split at other ranks: here with range and null counts changed over."""
    units = report.units
    return Split(report.ranks + 1, report.null_counts, report.range_counts, units.null, units.range)


def numbers(blocks):
    """The numbers in the names of blocks."""
    return [int(name.split(".")[-1]) for name in blocks]
