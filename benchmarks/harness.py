"""Fair timing of rival engines: one process each, turns with a pause between, a probe of the machine around each.

The parent needs neither torch nor any engine: it starts workers (`worker.py`), speaks JSON lines with them over pipes,
and keeps the statistics.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

PAUSE_S = 0.05  # long enough for the spinning idle threads of every engine tried to go to sleep
PROBE_TOLERANCE = 0.04  # a turn counts if the probes around it are within this share of the best probe of the run

# What caps the instruction set of each library, for engines asked for as NAME@ISA.
ISA_VARIABLES = {
    "avx2": {
        "BERTKERN_CPU_ISA": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "CT2_FORCE_CPU_ISA": "AVX2",
        "NM_ARCH": "avx2",
    },
    "avx512": {"BERTKERN_CPU_ISA": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "avx512vnni": {"BERTKERN_CPU_ISA": "avx512vnni", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
    "avx512bf16": {"BERTKERN_CPU_ISA": "avx512bf16", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "portable": {"BERTKERN_CPU_ISA": "portable", "ATEN_CPU_CAPABILITY": "default"},
}


Python = Mapping[str, str] | str | None  # interpreters of the engines, see `interpreter`


class Spec(NamedTuple):
    """An engine as a user asks for it, `NAME[@ISA][:PATTERN]`: `torch-fp32@avx2`, `bertkern-int8:16x4@0.8`."""

    name: str
    isa: str
    pattern: str

    @staticmethod
    def parse(text: str) -> Spec:
        engine, _, pattern = text.partition(":")
        name, _, isa = engine.partition("@")
        return Spec(name, isa, pattern)


def parse_python(options: Sequence[str] | None) -> dict[str, str]:
    """`PATH` and `NAME=PATH` options as interpreters by the beginning of an engine's name, "" for all others.

    Raises ValueError for one that is not there.
    """
    found = {}
    for option in options or ():
        name, equals, path = option.rpartition("=")
        if shutil.which(path) is None or (equals and not name):
            raise ValueError(f"python: expected an interpreter, PATH or NAME=PATH. Got {option!r}.")
        found[name] = path
    return found


def interpreter(python: Python, name: str) -> str:
    """The interpreter of an engine: of `parse_python`'s mapping the longest beginning of its name that is there."""
    if not isinstance(python, Mapping):
        return python or sys.executable
    fits = [key for key in python if name.startswith(key)]
    return python[max(fits, key=len)] if fits else sys.executable


class WorkerError(RuntimeError):
    """An engine failed; the message is the worker's own, followed by the last lines it printed."""


class Worker:
    """One engine in a process of its own.

    Args:
        spec: see `Spec`; an ISA caps the instruction set where the engine's library can be capped.
        threads: threads that the engine may use.
        python: the interpreter that has the engine's packages, or several, see `interpreter`. Default: this one.

    Example: `with Worker("torch-fp32", threads=2) as w: w.ask("open", model=...); w.ask("turn", seconds=0.2)["ms"]`
    """

    def __init__(self, spec: str, threads: int, python: Python = None):
        self.spec = spec
        self.name, isa, _ = Spec.parse(spec)
        if isa and isa not in ISA_VARIABLES:
            raise ValueError(f"engine {spec!r}: expected an ISA of {', '.join(ISA_VARIABLES)}. Got {isa!r}.")
        self.threads = threads
        package = __package__ or "benchmarks"
        root = Path(__file__).resolve().parents[package.count(".") + 1]
        env = dict(os.environ)
        env.update(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads), TOKENIZERS_PARALLELISM="false")
        env["OPENBLAS_NUM_THREADS"] = "1"  # numpy's, which only the probes use
        env.update(ISA_VARIABLES.get(isa, {}))
        env["PYTHONPATH"] = os.pathsep.join(p for p in (str(root), env.get("PYTHONPATH", "")) if p)
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed by close()
        self._process = subprocess.Popen(
            [interpreter(python, self.name), "-m", f"{package}.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=env,
        )

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Sends one request and waits for its reply. Raises `WorkerError` if the engine failed or died."""
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(f"{self.spec}: the process ended during '{do}'.{self._tail()}")
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(f"{self.spec}: {do}: {reply['error']}")
        return reply

    def _tail(self, lines: int = 6) -> str:
        self._log.seek(0)
        text = self._log.read().strip().splitlines()[-lines:]
        return "\n  " + "\n  ".join(text) if text else ""

    def close(self) -> None:
        """Ends the process."""
        if self._process.poll() is None:
            try:
                self._process.stdin.close()
                self._process.wait(timeout=5)
            except (subprocess.TimeoutExpired, BrokenPipeError):
                self._process.kill()
                self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile by linear interpolation. Raises ValueError on an empty sequence."""
    if not values:
        raise ValueError("quantile: expected at least one value. Got none.")
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


@dataclass
class Samples:
    """The turns of one engine on one case: milliseconds a call, and the lower of the two probes around each turn."""

    ms: list[float] = field(default_factory=list)
    probe: list[float | None] = field(default_factory=list)
    calls: int = 0
    best_probe: float | None = None

    def accepted(self) -> list[bool]:
        """Which turns ran on an undisturbed machine; all of them where nothing was probed."""
        if self.best_probe is None:
            return [True] * len(self.ms)
        floor = self.best_probe * (1 - PROBE_TOLERANCE)
        return [p is not None and p >= floor for p in self.probe]

    def kept(self) -> list[float]:
        """Accepted turns; if none was, all of them (`accepted_share` then says 0)."""
        return [ms for ms, ok in zip(self.ms, self.accepted(), strict=True) if ok] or self.ms

    @property
    def accepted_share(self) -> float:
        return sum(self.accepted()) / len(self.ms) if self.ms else 0.0

    @property
    def median(self) -> float:
        return quantile(self.kept(), 0.5)

    @property
    def p20(self) -> float:
        return quantile(self.kept(), 0.2)

    @property
    def p80(self) -> float:
        return quantile(self.kept(), 0.8)


def ratio(slow: Samples, fast: Samples) -> tuple[float, float, float]:
    """How many times faster `fast` is: median, p20, p80 over the rounds in which both turns were accepted.

    Rounds are paired, so a clock that drifts during the run cancels. Without a common round: the ratio of medians.
    """
    pairs = zip(slow.ms, slow.accepted(), fast.ms, fast.accepted(), strict=True)
    ratios = [a / b for a, a_ok, b, b_ok in pairs if a_ok and b_ok]
    if not ratios:
        r = slow.median / fast.median
        return r, r, r
    return quantile(ratios, 0.5), quantile(ratios, 0.2), quantile(ratios, 0.8)


def counted(
    tick: Callable[[str, int, int], None] | None, total: int, what: Callable[[str], str]
) -> Callable[[str], None]:
    """The `progress` of `take_turns` that calls `tick` with (what(spec), turns done, total)."""
    done = itertools.count(1)

    def progress(spec: str) -> None:
        if tick:
            tick(what(spec), next(done), total)

    return progress


def take_turns(
    workers: Iterable[Worker],
    rounds: int,
    seconds: float,
    probe: Callable[[Worker], float | None] | None = None,
    pause: float = PAUSE_S,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Samples]:
    """Times prepared workers, interleaved.

    Each round gives every worker one turn, starting one worker further each time so that no engine always follows the
    same rival. A turn is one untimed call and then calls for `seconds` (at least one); its sample is their median.

    Args:
        workers: workers whose case is prepared.
        rounds: turns of each worker.
        seconds: time of one turn.
        probe: how undisturbed the machine is (any unit), measured around each turn; None = accept every turn.
        pause: seconds of silence after each turn.
        progress: called with the worker's name after each turn.

    Returns: samples by worker spec.
    """
    workers = list(workers)
    samples = {w.spec: Samples() for w in workers}
    for r in range(rounds):
        shift = r % len(workers)
        for worker in workers[shift:] + workers[:shift]:
            time.sleep(pause)
            before = probe(worker) if probe else None
            turn = worker.ask("turn", seconds=seconds)["ms"]
            time.sleep(pause if probe else 0)
            after = probe(worker) if probe else None
            mine = samples[worker.spec]
            mine.ms.append(quantile(turn, 0.5))
            mine.calls += len(turn)
            mine.probe.append(None if before is None or after is None else min(before, after))
            if progress:
                progress(worker.spec)
    probes = [p for s in samples.values() for p in s.probe if p is not None]
    for s in samples.values():
        s.best_probe = max(probes) if probes else None
    return samples
