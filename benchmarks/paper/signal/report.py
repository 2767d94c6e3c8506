"""``python -m benchmarks.paper signal-report FOLDER... --to DIR``: what the conflict signal is worth, as a page."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..report.folder import write_texts
from ..report.numbers import clean
from .figures import draw
from .findings import DIGITS, NEAR, findings
from .folder import read_folder
from .page import TABLES, appendix, page

FORMAT = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER", help="folders of measurements, one per setting"
    )
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="where the report goes")
    parser.add_argument(
        "--share", type=float, default=NEAR, help=f"of the training, whose details are shown, or the nearest ({NEAR:g})"
    )


def run(args: argparse.Namespace) -> None:
    try:
        print(write([findings(read_folder(folder), args.share) for folder in args.folders], args.to))
    except (ValueError, OSError) as error:  # an OSError names its file
        raise SystemExit(str(error)) from error


def write(settings: Sequence[dict[str, Any]], to: Path) -> Path:
    """Write ``signal.json``, the figures, ``tables.md`` and ``report.md``; returns the path of the last.

    The same folders give the same bytes.
    """
    pictures = draw(settings, to)
    texts = {"signal.json": as_text(settings), TABLES: appendix(settings), "report.md": page(settings, pictures)}
    return write_texts(to, texts)


def as_text(settings: Sequence[dict[str, Any]]) -> str:
    """JSON with a line per key of a setting and per share, and null for what is not known."""

    def dump(value: Any) -> str:
        return json.dumps(clean(value, DIGITS), ensure_ascii=False, allow_nan=False, separators=(",", ":"))

    texts = []
    for setting in settings:
        lines = []
        for key, value in setting.items():
            text = dump(value)
            if key == "by_share":
                text = "{\n" + ",\n".join(f"{dump(share)}:{dump(found)}" for share, found in value.items()) + "}"
            lines.append(f"{dump(key)}:{text}")
        texts.append("{" + ",\n".join(lines) + "}")
    return f'{{"format":{FORMAT},"settings":[\n' + ",\n".join(texts) + "\n]}\n"
