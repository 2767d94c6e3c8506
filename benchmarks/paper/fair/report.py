"""``fair-report``: what ``fair`` ran into one or several OUT, as a page, its numbers and its figures."""

import argparse
from pathlib import Path

from ..report.folder import write_texts
from .comparison import Study
from .figures import draw
from .folders import read_studies
from .numbers import as_text, numbers
from .page import page


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", nargs="+", type=Path, metavar="OUT", help="folders that `fair` filled")
    parser.add_argument("--to", type=Path, required=True, help="folder of report.md, fair.json and the figures")


def run(args: argparse.Namespace) -> None:
    try:
        print(write(read_studies(args.out), args.to))
    except (ValueError, OSError) as error:  # an OSError names its file
        raise SystemExit(str(error)) from error


def write(studies: list[Study], to: Path) -> Path:
    """Write ``report.md``, ``fair.json`` and the figures, the same for the same runs; returns the page's path."""
    pictures = draw(studies, to)
    return write_texts(to, {"fair.json": as_text(numbers(studies)) + "\n", "report.md": page(studies, pictures)})
