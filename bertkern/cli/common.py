"""What every command may need: its parser, and how it speaks to a person."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


class UsageError(Exception):
    """A mistake of the caller; the message says what was expected and what came."""


def add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int | None],
    about: str,
    *examples: str,
    more: str = "",
    add_help: bool = True,
) -> argparse.ArgumentParser:
    """Adds a command to `commands`, and returns its parser.

    Args:
        run: what runs it; returns the exit status, None for 0.
        about: one line without a full stop.
        examples: command lines without `python -m bertkern`.
        more: printed under them.
        add_help: False where the command has a --help of its own.
    """
    lines = "\n".join(f"  python -m bertkern {line}" for line in examples)
    sub = commands.add_parser(
        name,
        help=about,
        description=about[0].upper() + about[1:] + ".",
        epilog=f"examples:\n{lines}{more}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=add_help,
    )
    sub.set_defaults(command=run)
    return sub


def model_argument(sub: argparse.ArgumentParser) -> None:
    """MODEL, which `models.load_model` reads."""
    sub.add_argument("model", metavar="MODEL", help="folder with a config.json, or a name on the Hugging Face hub")


class _Out(argparse.Action):
    """Takes the folder once, by its position or by --out; `places` are the two actions."""

    places: list[argparse.Action]

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        if namespace.out is not None:
            parser.error(f"expected OUT once. Got {namespace.out} and {values}.")
        namespace.out = values
        for place in self.places:
            place.required = False


def out_arguments(sub: argparse.ArgumentParser) -> None:
    """OUT, the folder that `models.save_model` writes, and --force; --out OUT is understood, too."""
    about = "folder to write, with the tokenizer beside the weights"
    # A position that may be left out would not be found behind options.
    position = sub.add_argument("out", metavar="OUT", action=_Out, type=Path, help=about)
    option = sub.add_argument("--out", action=_Out, type=Path, help=argparse.SUPPRESS)
    position.places = option.places = [position, option]
    sub.add_argument("--force", action="store_true", help="write into OUT even if it holds files")


def check_folder(name: str, folder: Path) -> None:
    """Raises UsageError where files cannot be written into `folder`, which may not be there yet; `name`: what it is."""
    there = next(above for above in (folder, *folder.absolute().parents) if above.exists())
    if not there.is_dir():
        raise UsageError(f"{name}: expected a folder. Got the file {there}.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"{name}: expected a folder to write into. Got {there}.")


def first_line(error: object) -> str:
    """The first line of an error's text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[0] if len(lines) == 1 else f"{lines[0]} (BERTKERN_VERBOSE=1 shows all of it)"


def news(text: str) -> None:
    """A line for a person, on stderr: stdout is the result's."""
    print(text, file=sys.stderr)
