"""The command line: ``python -m opdc info | demo | bench``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

import opdc.info

COMMANDS = {
    "info": "what this installation runs on: versions, instruction set, threads",
    "demo": "a real on-policy distillation on the CPU in about a minute, or several that compare",
    "bench": "opdc against eager PyTorch, torch.compile and the bandwidth of the memory",
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaint is one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists the arguments)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status of the process."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(prog="python -m opdc", description="Losses of on-policy distillation.")
    parser.add_argument("--version", action="version", version=f"opdc {opdc.info.version('opdc')}")
    subparsers = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary)
        if words[:1] == [name]:
            # Only the command that runs is imported: info has to work where the packages that
            # demo and bench need are missing.
            command = import_module(f"opdc.{name}")
            command.add_arguments(subparser)
            subparser.set_defaults(run=command.run)
    arguments = parser.parse_args(words)
    try:
        return int(arguments.run(arguments))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130  # as a shell reports Ctrl-C


if __name__ == "__main__":
    sys.exit(main())
