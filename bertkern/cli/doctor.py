"""`doctor`: what this machine and this installation can do."""

from __future__ import annotations

import argparse
import json
from typing import Any

from .common import add_command


def add(commands: Any) -> None:
    """Adds the command."""
    about = "what this machine and this installation can do"
    sub = add_command(commands, "doctor", run, about, "doctor", "doctor --json")
    sub.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Prints what the build and the machine offer; status 1 where the operators do not load."""
    from bertkern import doctor as examination

    facts = examination.collect()
    print(json.dumps(facts, indent=1, default=str) if arguments.json else examination.text(facts))
    return 1 if facts["build"]["error"] else 0
