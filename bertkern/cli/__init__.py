"""The command line: `python -m bertkern {doctor,inspect,quantize,prune,bench,demo}`, a module for each command.

Each command imports what it needs when it runs; mistakes of the caller are found before anything is changed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from . import bench, demo, doctor, inspect, prune, quantize
from .common import UsageError, first_line

COMMANDS = (doctor, inspect, quantize, prune, bench, demo)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    arguments = build_parser().parse_args(argv)
    try:
        return arguments.command(arguments) or 0
    except UsageError as error:
        return _complain(error, 2)
    except KeyboardInterrupt:
        return _complain("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get("BERTKERN_VERBOSE"):
            raise
        if isinstance(error, ModuleNotFoundError) and error.name:
            package = error.name.partition(".")[0]
            return _complain(f"{package} is not installed here. Run: pip install {package}", 1)
        expected = isinstance(error, (ImportError, OSError, RuntimeError, ValueError))
        return _complain(first_line(error) if expected else f"{type(error).__name__}: {first_line(error)}", 1)


def build_parser() -> argparse.ArgumentParser:
    """The parser with all commands, their options and examples."""
    parser = argparse.ArgumentParser(
        prog="python -m bertkern",
        description="Pruned and quantized BERT models, really fast.",
        epilog="Each command has its own --help with examples. BERTKERN_VERBOSE=1 shows tracebacks.",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser


def _complain(error: object, status: int) -> int:
    print(f"bertkern: {error}", file=sys.stderr)
    return status
