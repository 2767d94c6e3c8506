"""``python -m benchmarks.paper report OUT``: turn a folder of runs into a page, its numbers and its figures."""

import argparse
from pathlib import Path

from .comparison import BASELINE, Comparison, compare
from .figures import draw
from .folder import read_folder, write_texts
from .numbers import as_text, numbers
from .page import page
from .tables import main_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", nargs="+", type=Path, metavar="OUT", help="folders that `run` wrote; each gets a report")
    parser.add_argument("--baseline", default=BASELINE, help=f"the arm that others are compared with ({BASELINE})")
    parser.add_argument("--table", action="store_true", help="print the main table and write nothing")
    parser.add_argument("--to", type=Path, help="where the report goes (OUT/report)")


def run(args: argparse.Namespace) -> None:
    if args.to and len(args.out) > 1:
        raise SystemExit(f"--to is for one folder, got {len(args.out)}")
    for out in args.out:
        try:
            comparison = compare(read_folder(out), args.baseline)
            print(main_table(comparison) if args.table else write(comparison, args.to or out / "report"))
        except (ValueError, OSError) as error:  # an OSError names its file
            raise SystemExit(str(error)) from error


def write(comparison: Comparison, to: Path) -> Path:
    """Write ``report.md``, ``report.json`` and the figures, the same for the same runs; returns the page's path."""
    pictures = draw(comparison, to)
    return write_texts(to, {"report.json": as_text(numbers(comparison)), "report.md": page(comparison, pictures)})
