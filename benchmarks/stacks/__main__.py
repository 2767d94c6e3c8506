"""Run every situation and write the table: ``python -m benchmarks.stacks``."""

import argparse
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.clients import import_torchvision

RESULTS = Path(__file__).parents[1] / "results" / "stacks.json"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stacks", description=__doc__)
    parser.add_argument("what", nargs="?", choices=("run", "table", "summary"), default="run")
    parser.add_argument("--only", default="", help="a regular expression that titles must contain, as in 'PEFT: merge'")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the rows are kept, as JSON")
    options = parser.parse_args()
    if options.what != "run":
        print({"table": markdown, "summary": summary}[options.what](json.loads(options.out.read_text())["rows"]))
        return 0
    import_torchvision()
    torch.set_num_threads(1)
    from .rows import rows

    found = []
    for row in rows():
        if not re.search(options.only, row.title):
            continue
        start, missing = time.perf_counter(), row.missing()
        line: dict[str, Any] = {"stack": row.stack, "name": row.name, "against": row.against, "limit": row.limit}
        if missing:
            line["skipped"] = f"{', '.join(missing)} not installed"
        else:
            try:
                line["difference"] = row.measure()
            except Exception as error:  # a row of the table, whatever it is
                line["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        line["seconds"] = round(time.perf_counter() - start, 1)
        found.append(line)
        print(f"{'right' if is_right(line) else 'WRONG'}  {row.title}: {said(line)}", flush=True)
    if not options.only:
        options.out.write_text(json.dumps({"torch": torch.__version__, "rows": found}, indent=1) + "\n")
        print(f"written to {options.out}")
    return 0 if all(is_right(line) for line in found) else 1


def is_right(line: dict[str, Any]) -> bool:
    return "skipped" in line or line.get("difference", float("inf")) <= line["limit"]


def said(line: dict[str, Any]) -> str:
    if "difference" in line:
        return f"{line['difference']:.1e}"
    return str(line.get("skipped") or line["error"])


def markdown(lines: list[dict[str, Any]]) -> str:
    """The rows, as the documentation shows them."""
    table = ["| stack | situation | compared with | difference | limit |", "|---|---|---|---|---|"]
    for line in lines:
        cells = (line["stack"], line["name"], line["against"], said(line), f"{line['limit']:.0e}")
        table.append(f"| {' | '.join(cells)} |")
    return "\n".join(table)


def summary(lines: list[dict[str, Any]]) -> str:
    """A line for every stack: how many situations are right, and the difference that is nearest to its limit."""
    table = ["| stack | situations right | difference nearest its limit | that limit |", "|---|---|---|---|"]
    for stack in dict.fromkeys(line["stack"] for line in lines):
        rows = [line for line in lines if line["stack"] == stack]
        measured = [line for line in rows if "difference" in line]
        nearest = max(measured, key=_nearness, default=None)
        cells = "- | -" if nearest is None else f"{nearest['difference']:.1e} | {nearest['limit']:.0e}"
        table.append(f"| {stack} | {sum(map(is_right, rows))} of {len(rows)} | {cells} |")
    return "\n".join(table)


def _nearness(line: dict[str, Any]) -> float:
    """In parts of the limit; where not a bit may differ, the difference itself."""
    difference: float = line["difference"]
    return difference / line["limit"] if line["limit"] else difference


if __name__ == "__main__":
    sys.exit(main())
