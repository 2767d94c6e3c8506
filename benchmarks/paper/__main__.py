"""``python -m benchmarks.paper COMMAND``: each command is a module with ``add_arguments(parser)`` and ``run(args)``."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "run": (".runner.command", "run an experiment of the evaluation, or go on with it"),
    "pretrain": (".pretrain", "pretrain a backbone by masked reconstruction"),
    "compare": (".compare.command", "whether conflict chooses better than chance: run it, and report the answers"),
    "report": (".report.command", "turn a folder of runs into tables and figures"),
    "signal": (".signal.command", "measure the conflicts of a joint training image by image"),
    "fair": (".fair.command", "whether joint training was only tuned too little: run it, or go on with it"),
    "fair-report": (".fair.report", "turn what `fair` ran into tables and figures"),
    "signal-report": (".signal.report", "turn folders of conflict measurements into one page, its numbers and figures"),
    "compare-report": (".compare.report", "whether conflict beats chance, and the method plain adapters: one page"),
    "parameters": (".parameters", "what the paper's method and its rivals add to a network"),
    "smoke": (".smoke", "try every data set and arm for a few steps"),
    "scenes": ("..rooms.show", "draw the rendered rooms"),
    "demo": (".demo", "train, analyse, expand and compare on the rendered rooms"),
}


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    summary = "The evaluation: experiments, their reports, and a demo."
    parser = argparse.ArgumentParser("python -m benchmarks.paper", description=summary)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if argv[:1] == [name]:  # only the chosen command is imported
            implementation = import_module(module, __package__)
            implementation.add_arguments(command)
            command.set_defaults(run=implementation.run)
            if hasattr(implementation, "with_presets"):
                argv = [name, *implementation.with_presets(argv[1:])]
    args = parser.parse_args(argv)
    return args.run(args) or 0


if __name__ == "__main__":
    sys.exit(main())
