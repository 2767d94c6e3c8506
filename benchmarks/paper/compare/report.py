"""``compare-report``: folders of runs as one page on whether conflict beats chance, and the method plain adapters."""

import argparse
from pathlib import Path

from ..fair.numbers import as_text
from ..report.folder import write_texts
from .figures import draw
from .findings import Findings, find
from .folders import read_settings
from .numbers import numbers
from .page import page


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", nargs="+", type=Path, metavar="OUT", help="folders that `run` filled, one per setting")
    parser.add_argument("--to", type=Path, required=True, help="folder of report.md, compare.json and the figures")


def run(args: argparse.Namespace) -> None:
    try:
        print(write(find(read_settings(args.out)), args.to))
    except (ValueError, OSError) as error:  # an OSError names its file
        raise SystemExit(str(error)) from error


def write(findings: Findings, to: Path) -> Path:
    """Write ``report.md``, ``compare.json`` and the figures, the same for the same runs; returns the page's path."""
    pictures = draw(findings, to)
    return write_texts(to, {"compare.json": as_text(numbers(findings)) + "\n", "report.md": page(findings, pictures)})
