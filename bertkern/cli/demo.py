"""`demo`: what int8 costs and gains on a real model and a real test set."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .common import add_command, news
from .measuring import benchmarks, check_targets, progress, save, timing_arguments


def add(commands: Any) -> None:
    """Adds the command."""
    sub = add_command(
        commands,
        "demo",
        run,
        "all-MiniLM-L6-v2 on the STS Benchmark: accuracy, speed and size of int8 beside fp32",
        "demo",
        "demo --threads 1 --rounds 3 --out build/demo",
        more="\nFetches 84 MB on the first run.\n",
    )
    sub.add_argument("--engines", default="torch-fp32,torch-int8,bertkern-int8", help="default: %(default)s")
    sub.add_argument("--out", type=Path, default=Path("build/demo"), help="rows and plot; default: %(default)s")
    timing_arguments(sub, rounds=7)


def run(arguments: argparse.Namespace) -> None:
    """Runs the demo; see benchmarks/demo.py."""
    check_targets(arguments.out)
    module = benchmarks("demo")
    with progress() as tick:
        measured = module.run(arguments.engines.split(","), arguments.threads, arguments.rounds, report=news, tick=tick)
    if "report" in measured.facts:
        print(measured.facts["report"])
        print()
    benchmarks("tables").show(measured)
    save(measured, arguments.out, None)
