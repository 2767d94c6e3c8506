"""Does an analysis that ends early (settle=) give the plan of the full pass, and does it know when it has none?

Every seed is a trained model and a set of scenes in a random order, which the full pass reads to its end. Seeds 2 j and
2 j + 1 have the same model and halves of the scenes that share none: the other's full pass is the independent one. The
full pass is called stable where its plan is that of at least 95 % of its resamples.
"""

import argparse
import statistics
import time
from typing import Any

import torch

import dtme
from dtme.stability import agreement

from .common import Ordered, Results, Row, check_positive, losses, scenes, settings_of, table, trained
from .common import add_arguments as add_common

CONFIDENCE = 0.95
CONFIGURATIONS: dict[str, dict[str, float]] = {
    "half, half": {"modulation": 0.5, "expansion": 0.5},
    "third, third": {"modulation": 0.34, "expansion": 0.34},
    "sixth, sixth": {"modulation": 0.17, "expansion": 0.17},
    "sixth, none": {"modulation": 0.17, "expansion": 0.0},
}
"""Shares of the blocks that are modulated, and expanded."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sizes = {"scenes": 8192, "size": 32, "patch": 8, "depth": 6, "width": 64, "steps": 400, "batch": 16}
    add_common(parser, seeds=20, out="benchmarks/results/settle.json", **sizes)
    parser.add_argument("--models", type=int, default=5, help="trained models, which the seeds take in turn")


def run(args: argparse.Namespace) -> None:
    check_positive(args, "seeds", "scenes", "size", "patch", "depth", "width", "steps", "batch", "models")
    settings = settings_of(args) | {"confidence": CONFIDENCE, "configurations": CONFIGURATIONS}
    results = Results(args.out, settings, args.fresh)
    missing = results.missing(args.seeds)
    data = scenes(args) if missing else None
    for seed in missing:
        assert data is not None
        started = time.perf_counter()
        results.add(one_seed(args, data, seed), summary)
        print(f"seed {seed}: {time.perf_counter() - started:.0f} s", flush=True)
    print(f"\n{show(summary(results.rows))}\n\nwrote {args.out}")


def one_seed(args: argparse.Namespace, data: Any, seed: int) -> Row:
    """The full pass and, for every configuration, the settled one; by turns the one or the others come first."""
    pair, half = divmod(seed, 2)
    number = pair % args.models
    model = trained(args, data, number)
    permutation = torch.randperm(args.scenes, generator=torch.Generator().manual_seed(pair))
    loader = Ordered(data, permutation.chunk(2)[half], args.batch)
    row: Row = {"seed": seed, "model": number, "batches": len(loader), "settled": {}}
    passes = [None, *CONFIGURATIONS]
    for name in passes if seed % 4 < 2 else passes[::-1]:
        options = {} if name is None else {"settle": CONFIDENCE, "plan_options": CONFIGURATIONS[name]}
        started = time.perf_counter()
        report = dtme.analyze(model, loader, losses(), progress=False, **options)
        seconds = time.perf_counter() - started
        if name is None:
            row["full"] = full_row(report, seconds)
        else:
            row["settled"][name] = settled_row(report, name, seconds, len(loader), args.batch)
    return row


def plan_of(report: dtme.ConflictReport, name: str) -> dict[str, list[str]]:
    """The blocks of a plan: all tasks get the modules there."""
    plan = report.plan(**CONFIGURATIONS[name])
    return {"modulation": list(plan.modulation), "expansion": list(plan.expansion)}


def full_row(report: dtme.ConflictReport, seconds: float) -> Row:
    return {
        "seconds": seconds,
        "ranks": report.ranks.tolist(),
        "range rates": report.range_rates.tolist(),
        "null rates": report.null_rates.tolist(),
        "range intervals": report.intervals("range").tolist(),
        "null intervals": report.intervals("null").tolist(),
        "plans": {name: plan_of(report, name) for name in CONFIGURATIONS},
        "agreement": {name: agreement(report, **options) for name, options in CONFIGURATIONS.items()},
    }


def settled_row(report: dtme.ConflictReport, name: str, seconds: float, batches: int, batch: int) -> Row:
    return {
        "seconds": seconds,
        "settled": report.settled,
        "first pass": -(-report.num_samples // batch) / batches,
        "second pass": report.num_batches / batches,
        "ranks": report.ranks.tolist(),
        "plan": plan_of(report, name),
        "agreement": agreement(report, **CONFIGURATIONS[name]),
    }


# --- what comes of it -------------------------------------------------------------------------------------------------


def summary(rows: list[Row]) -> dict[str, Row]:
    return {name: summary_of(rows, name) for name in CONFIGURATIONS}


def summary_of(rows: list[Row], name: str) -> Row:
    """One configuration over all seeds: counts, and medians over the seeds whose full pass is stable."""
    by_seed = {row["seed"]: row for row in rows}
    stable = [row for row in rows if row["full"]["agreement"][name] >= CONFIDENCE]
    unstable = [row for row in rows if row not in stable]

    def same(row: Row, other: Row) -> bool:
        return row["settled"][name]["plan"] == other["full"]["plans"][name]

    def median(rows: list[Row], key: str) -> float | None:
        return statistics.median(row["settled"][name][key] for row in rows) if rows else None

    partners = [(row, by_seed[row["seed"] ^ 1]) for row in rows if row["seed"] ^ 1 in by_seed]
    times = [row["settled"][name]["seconds"] / row["full"]["seconds"] for row in stable]
    said = [row for row in rows if row["settled"][name]["settled"]]
    return {
        "stable": len(stable),
        "stable, same plan": sum(same(row, row) for row in stable),
        "stable, settled": sum(row["settled"][name]["settled"] for row in stable),
        "stable, first pass read": median(stable, "first pass"),
        "stable, second pass read": median(stable, "second pass"),
        "stable, time": statistics.median(times) if times else None,
        "unstable": len(unstable),
        "unstable, not settled": sum(not row["settled"][name]["settled"] for row in unstable),
        "settled": len(said),
        "settled, same plan": sum(same(row, row) for row in said),
        "settled, second pass read": median(said, "second pass"),
        "pairs": len(partners),
        "settled plan is the independent full plan": sum(same(row, other) for row, other in partners),
        "full plan is the independent full plan": sum(
            row["full"]["plans"][name] == other["full"]["plans"][name] for row, other in partners
        ),
        "settled, in pairs": sum(row in said for row, _ in partners),
        "settled, the independent full plan": sum(same(row, other) for row, other in partners if row in said),
    }


def show(found: dict[str, Row]) -> str:
    def percent(share: float | None) -> str:
        return "–" if share is None else f"{share:.0%}"

    head = ["modulated, expanded", "stable", "same plan", "1st pass", "2nd pass", "time", "unstable", "not settled"]
    lines = [[*head, "settled", "same plan", "as independent", "full as independent"]]
    for name, row in found.items():
        lines.append(
            [
                name,
                f"{row['stable']}",
                f"{row['stable, same plan']}/{row['stable']}",
                percent(row["stable, first pass read"]),
                percent(row["stable, second pass read"]),
                percent(row["stable, time"]),
                f"{row['unstable']}",
                f"{row['unstable, not settled']}/{row['unstable']}",
                f"{row['settled']}",
                f"{row['settled, same plan']}/{row['settled']}",
                f"{row['settled, the independent full plan']}/{row['settled, in pairs']}",
                f"{row['full plan is the independent full plan']}/{row['pairs']}",
            ]
        )
    title = "Seeds whose full pass is stable, then those where it is not, then those that say they have settled;"
    return f"{title}\nwhat was read and the time are medians, as shares of the full pass\n\n{table(lines)}"
