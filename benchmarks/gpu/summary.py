"""What a run has found, as a table: targets, times with their floors, failures, limits of the kernels, best tiles."""

from collections.abc import Iterator
from pathlib import Path

from benchmarks.kernels import lines

from .targets import Ceilings, ceilings, judge, times


def summary(path: Path) -> Iterator[str]:
    """Lines of text, the targets last, so that they are what the end of a log shows."""
    for versions in lines.read(path, "versions"):
        yield ", ".join(f"{key} {value}" for key, value in versions.items() if key != "kind")
    reach = ceilings(path)
    yield f"copy {reach.copy / 1e12:.2f} TB/s, bfloat16 product {reach.product / 1e12:.0f} TFLOP/s"
    yield from _failures(path)
    yield from _kernels(path)
    yield from _sweeps(path)
    yield from _times(path, reach)
    yield from _smoke(path)
    yield from _targets(path)


def _failures(path: Path) -> Iterator[str]:
    for line in lines.read(path):
        where = ", ".join(str(line[key]) for key in ("group", "rival", "test", "report", "name") if key in line)
        if line.get("error") and line.get("final", True):
            yield f"FAILED {where}: {line['error']}"
        elif line["kind"] == "stage" and line["status"] != "done":
            yield f"stage {where}: {line['status']}"


def _kernels(path: Path) -> Iterator[str]:
    """How much of the multiprocessors and of the memory every kernel used."""
    found = [line for line in lines.read(path, "ncu") if "metrics" in line]
    if found:
        yield f"\n{'by ncu, % of the highest':44}{'compute':>9}{'memory':>9}{'time':>9}"
    for line in found:
        cells = [line["metrics"].get(f"{name} Throughput [%]", "") for name in ("Compute (SM)", "Memory")]
        duration = next((v for k, v in line["metrics"].items() if k.startswith("Duration")), "")
        yield f"{line['kernel'][:42]:44}{cells[0]!s:>9}{cells[1]!s:>9}{duration!s:>9}"


def _sweeps(path: Path) -> Iterator[str]:
    """Candidates that beat what ships."""
    for group, rivals in times(path).items():
        ours = rivals.get("ours")
        better = [(s, name) for name, s in rivals.items() if name.startswith("ours:") and ours and s < 0.98 * ours]
        for seconds, name in sorted(better):
            yield f"FASTER {group}: {name.removeprefix('ours: ')} takes {seconds / ours:.2f} of what ships"


def _times(path: Path, reach: Ceilings) -> Iterator[str]:
    """Ratios to ours, and to the floor of the bytes and operations that a report counts as necessary."""
    yield f"\n{'':44}{'ms':>9}{'x ours':>8}{'x floor':>9}{'same bits':>11}"
    every = lines.races(path)
    for group, rivals in times(path).items():
        yield group
        for rival, seconds in rivals.items():
            line = every[group, rival]
            rate, flops = (line["extra"][key] for key in ("GB/s", "TFLOP/s"))
            share = max(1e9 * rate / reach.copy, 1e12 * flops / reach.product)
            ratio = f"{seconds / rivals['ours']:.2f}" if "ours" in rivals else ""
            bits = {True: "yes", False: "NO", None: ""}[line["extra"]["repeats"]]
            unfinished = "" if line["final"] else "  (3 runs)"
            yield f"    {rival[:39]:40}{1e3 * seconds:>9.3f}{ratio:>8}{1 / share:>9.2f}{bits:>11}{unfinished}"


def _smoke(path: Path) -> Iterator[str]:
    found = list(lines.read(path, "smoke"))
    if found:
        good = sum(line["passed"] is True for line in found)
        yield f"\nsmoke: {good} of {len(found)} operations x dtypes are as right as they have to be"


def _targets(path: Path) -> Iterator[str]:
    yield f"\n{'target':62}{'measured':>9}{'':>4}{'bound':>6}"
    for target, value in judge(path):
        measured = "" if value is None else f"{value:.2f}"
        sign = ">=" if target.at_least else "<="
        yield f"{target.text:62}{measured:>9}{sign:>4}{target.bound:>6.2f}  {target.verdict(value)}"
