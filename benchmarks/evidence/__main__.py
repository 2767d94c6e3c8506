"""``python -m benchmarks.evidence COMMAND``: what the analysis claims, tried on small trained models."""

import argparse
import sys
from collections.abc import Sequence

from . import gains, settle

COMMANDS = {
    "settle": (settle, "does an analysis that ends early give the plan of the full one?"),
    "gains": (gains, "do gains and rates say in which block tasks gain most from maps of their own?"),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.evidence", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(
            name, help=summary, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    args.run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
