"""`inspect`: the report of a model."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from .common import add_command, model_argument
from .models import load_model


def add(commands: Any) -> None:
    """Adds the command."""
    sub = add_command(
        commands,
        "inspect",
        run,
        "what pruning left in a model, what that could gain, and what bertkern would do with it",
        "inspect ./my-bert",
        "inspect sentence-transformers/all-MiniLM-L6-v2 --json",
    )
    model_argument(sub)
    sub.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> None:
    """Prints the report of a model."""
    model = load_model(arguments.model)
    import bertkern

    report = bertkern.inspect(model)
    if arguments.json:
        print(json.dumps(report.to_dict(), indent=1))
    elif sys.stdout.isatty():
        from rich.console import Console

        Console().print(report)
    else:
        print(report)
