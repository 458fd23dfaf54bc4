"""What runs in a child: `python -m benchmarks.gpu.job NAME ARGUMENTS-AS-JSON`, a JSON line for whatever it finds.

{"row": [kernel, provider, metric, [x name, x], [median, p20, p80], config, versions]}
{"at": "case|provider"}      what runs now, so that a hang or a crash has a name
{"absent": {name: why}}      {"fact": {name: value}}      {"done": true}
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, TextIO

# NAME: module of this package, whose `job(say, device, **arguments)` runs.
JOBS = {"card": "card", "peaks": "peaks", "ops": "ops", "models": "models", "profile": "profile"}


class Say:
    """Writes the lines."""

    def __init__(self, out: TextIO):
        self.out = out

    def __call__(self, **line: Any) -> None:
        self.out.write(json.dumps(line) + "\n")
        self.out.flush()

    def row(
        self,
        kernel: str,
        provider: str,
        metric: str,
        x: tuple[str, str],
        values: Sequence[float],
        config: dict[str, Any] | None = None,
        versions: dict[str, str] | None = None,
    ) -> None:
        """A row as `results.Run.add` takes it."""
        self(row=[kernel, provider, metric, list(x), [float(value) for value in values], config or {}, versions or {}])


def main() -> None:
    """Runs the job that the command line names."""
    name, arguments = sys.argv[1], json.loads(sys.argv[2])
    # Libraries print: only what is said here reaches the parent.
    say = Say(os.fdopen(os.dup(1), "w"))
    os.dup2(2, 1)
    importlib.import_module(f".{JOBS[name]}", __package__).job(say, **arguments)
    say(done=True)


if __name__ == "__main__":
    main()
