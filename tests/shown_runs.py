"""What the tests of the benchmarks do with every kind of run."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import plots, results, tables


def show(run: results.Run, tmp_path: Path) -> str:
    """The run's tables; it is drawn, saved and read again, too."""
    from rich.console import Console

    pytest.importorskip("matplotlib")
    console = Console(width=160, record=True, file=(tmp_path / "screen").open("w"))
    tables.show(run, console)
    assert plots.save(run, tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    assert results.load(run.save(tmp_path)[0]) == run
    return console.export_text()
