"""Expand every transformer that can be built small, and compare it with itself and with plain hooks.

``python -m benchmarks.models`` runs the sweep; ``python -m benchmarks.models table`` writes its table in Markdown.
"""

import argparse
import re
from pathlib import Path

from . import runner, table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=__doc__)
    parser.add_argument("what", nargs="?", choices=("run", "table"), default="run")
    parser.add_argument("--only", default="", help="a regular expression that names must contain, as in 'timm/swin'")
    parser.add_argument("--out", type=Path, default=Path("out/models.jsonl"), help="rows, one JSON object per line")
    parser.add_argument("--resume", action="store_true", help="go on with the rows that are there")
    parser.add_argument("--seconds", type=int, default=runner.SECONDS, help="limit per model")
    options = parser.parse_args()
    if options.what == "table":
        print(table.markdown(runner.read_rows(options.out)))
        return
    from . import models

    models.prepare()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if not options.resume:
        options.out.unlink(missing_ok=True)
    done = {row["model"] for row in runner.read_rows(options.out)}
    names = [name for name in models.names() if re.search(options.only, name) and name not in done]
    runner.run(names, models.rows, options.out, options.seconds)
    print(table.text(runner.read_rows(options.out)))


if __name__ == "__main__":
    main()
