"""A child process with a timeout, whose hang or crash costs nothing but itself."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Outcome:
    """How a child ended.

    Attributes:
        code: exit status, negative for a signal; None where it had to be killed.
        seconds: wall time.
        tail: last lines of what it printed to stderr.
    """

    code: int | None
    seconds: float
    tail: str

    @property
    def ok(self) -> bool:
        return self.code == 0

    def __str__(self) -> str:
        how = f"killed after {self.seconds:.0f} s" if self.code is None else f"exit status {self.code}"
        last = self.tail.strip().splitlines()[-1:] if self.code != 0 else []
        return ": ".join(["ok" if self.ok else how, *last])


def run(
    command: Sequence[str],
    seconds: float,
    each_line: Callable[[str], None] | None = None,
    *,
    silence: float | None = None,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Outcome:
    """Runs a command to its end or its timeout; then it and what it started are killed.

    Args:
        seconds: for all of it.
        each_line: called with each line of its stdout, as it comes.
        silence: kill it, too, after so many seconds without a line.
        environment: added to this process's.
    """
    begin = time.monotonic()
    heard = [begin]
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        child = subprocess.Popen(
            list(command),
            stdout=subprocess.PIPE,
            stderr=log,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            cwd=folder,
            env={**os.environ, **(environment or {})},
            start_new_session=True,  # so that its own children end with it
        )

        def read() -> None:
            for line in child.stdout:
                heard[0] = time.monotonic()
                if each_line is not None:
                    each_line(line.rstrip("\n"))

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        code = _wait(child, begin + seconds, silence, heard)
        _kill(child)
        reader.join(timeout=5)
        log.seek(0)
        tail = "\n".join(log.read().splitlines()[-15:])
    return Outcome(code, time.monotonic() - begin, tail)


def _wait(child: subprocess.Popen, end: float, silence: float | None, heard: list[float]) -> int | None:
    while True:
        now = time.monotonic()
        until = end if silence is None else min(end, heard[0] + silence)
        if now >= until:
            return child.poll()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.wait(min(until - now, 1.0))


def _kill(child: subprocess.Popen) -> None:
    """Ends the group, if only what the child left behind; one that is stuck in a driver is left to it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(5)
