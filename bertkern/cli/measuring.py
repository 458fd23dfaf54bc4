"""What the commands that measure share: where the benchmarks are, their options, progress and results."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import UsageError, check_folder, news

if TYPE_CHECKING:
    from types import ModuleType


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def timing_arguments(sub: argparse.ArgumentParser, rounds: int | None, threads: str | None = "") -> None:
    """--threads and --rounds; `rounds` is the default of those, None: the benchmark's own.

    Args:
        threads: what the help calls the default of --threads, which is None then; "": the cores at hand are; None:
            there is no such option.
    """
    if threads is not None:
        told = threads or "the cores at hand, %(default)s"
        sub.add_argument("--threads", type=_positive, default=None if threads else cores(), help=f"default: {told}")
    default = rounds or "3 to 15, by benchmark"
    sub.add_argument("--rounds", type=_positive, default=rounds, help=f"turns of each engine; default: {default}")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1. Got {text!r}.")
    return int(text)


# What `--plot` can be written as.
DRAWN = (".png", ".svg", ".pdf")


def check_targets(folder: Path | None, plot: Path | None = None, rows: Path | None = None, name: str = "") -> None:
    """Raises UsageError where results could not be written, which is better known before they are measured.

    Args:
        folder, plot: of `save`.
        rows: of --json, a file.
        name: of --name.
    """
    for option, file in (("--plot", plot), ("--json", rows)):
        if file is not None and file.is_dir():
            raise UsageError(f"{option}: expected a file. Got the folder {str(file)!r}.")
    if plot is not None and plot.suffix.lower() not in DRAWN:
        raise UsageError(f"--plot: expected a name that ends in {', '.join(DRAWN)}. Got {plot}.")
    if name != Path(name).name:
        raise UsageError(f"--name: expected a part of a file's name. Got {name!r}.")
    for option, place in (("--out", folder), ("--plot", plot and plot.parent), ("--json", rows and rows.parent)):
        if place is not None:
            check_folder(option, place)
    if (folder or plot) and importlib.util.find_spec("matplotlib") is None:
        raise UsageError("plots need matplotlib. Run: pip install matplotlib")


def save(run: Any, folder: Path | None, plot: Path | None) -> None:
    """Writes the rows and their plot into `folder`, the plot alone to `plot`; raises RuntimeError without rows."""
    if not run.rows:
        raise RuntimeError("nothing was measured; the lines above say why.")
    plots = benchmarks("plots")
    written = []
    if folder:
        written += run.save(folder)
        written.append(plots.save(run, folder / f"{run.name}.png"))
    if plot:
        written.append(plots.save(run, plot))
    if written:
        news("written: " + ", ".join(map(str, written)))


def benchmarks(name: str) -> ModuleType:
    """A module of the benchmarks: the folder of that name in a checkout, `bertkern.benchmarks` where installed."""
    root = Path(__file__).resolve().parents[2]
    if (root / "benchmarks" / "harness.py").is_file():
        if str(root) not in sys.path:
            sys.path.insert(0, str(root))
        return importlib.import_module(f"benchmarks.{name}")
    try:
        return importlib.import_module(f"bertkern.benchmarks.{name}")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("bertkern.benchmarks"):
            raise
        raise RuntimeError("this installation has no benchmarks: run from a checkout, or pip install .") from None


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr, as a function (what, done, total); total 0 = unknown."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total or None)
