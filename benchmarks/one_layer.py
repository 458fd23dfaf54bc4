"""What the benchmarks of one linear layer share; `gemm`, `sparse` and `groupwise` say what is swept, and what counts.

Every provider draws the same data, is compared with torch's fp32, and takes turns with the others on each case.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from . import peak
from .harness import PAUSE_S as TEAM_PAUSE_S
from .harness import Python, Samples, Spec, Worker, WorkerError, take_turns
from .opening import check, precision, start
from .results import Run

REFERENCE = "torch-fp32"
THREADS = 1  # unless the user asks for more
PAUSE_S = 0.005  # one thread spins for nobody


def parse_layers(text: str) -> list[tuple[int, int]]:
    """`3072x768,768x3072` as (N, K) pairs. Raises ValueError."""
    layers = []
    for part in text.split(","):
        n, _, k = part.strip().partition("x")
        if not (n.isdecimal() and k.isdecimal() and int(n) and int(k)):
            raise ValueError(f"layer: expected OUTxIN, like 3072x768. Got {part!r}.")
        layers.append((int(n), int(k)))
    return layers


def last_level_cache() -> int:
    """Bytes of the largest cache that the kernel lists for core 0; 32 MiB where it lists none."""
    sizes = [32 << 20]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20}.get(text[-1], 0))
    return max(sizes)


class Case(NamedTuple):
    """M rows, a weight [N, K], and what is swept beside them."""

    m: int
    n: int
    k: int
    what: Any

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k} {self.what}"


class Turns(NamedTuple):
    """What one case gave, by provider."""

    samples: dict[str, Samples]
    agreement: dict[str, dict[str, float]]
    opened: dict[str, dict[str, Any]]
    peaks: dict[str, list[float | None]]  # before and after, in the provider's precision


@dataclass
class Sweep:
    """Providers that are open, and the run that their rows go to; made by `open_sweep`."""

    run: Run
    workers: list[Worker]
    opened: dict[str, dict[str, Any]]
    reference: Worker
    expected: str  # where the reference saves its outputs
    rounds: int
    seconds: float
    report: Callable[[str], None]

    def measure(
        self,
        cases: Sequence[Case],
        axis: str,
        own: Callable[[Case], dict[str, Any]],
        tick: Callable[[str, int, int], None] | None,
    ) -> Iterator[tuple[Case, Turns]]:
        """Measures the providers on one case after the other; those that do not know a case are left out.

        Args:
            axis: how the providers call what is swept.
            own: what they, not the reference, are given with a case.
        """
        for done, case in enumerate(cases if self.workers else ()):
            if tick:
                tick(str(case), done, len(cases))
            layer = {"m": case.m, "n": case.n, "k": case.k, axis: str(case.what)}
            self.reference.ask("prepare", **layer)
            self.reference.ask("save", path=self.expected)
            ready, agreement = [], {}
            for worker in self.workers:
                try:
                    worker.ask("prepare", **layer, **own(case))
                    agreement[worker.spec] = check(worker.spec, worker.ask("compare", path=self.expected))
                    ready.append(worker)
                except WorkerError as error:
                    if not any(f"has no {unknown}" in str(error) for unknown in ("epilogue", "blocks", "grouping")):
                        self.report(f"{case}: left out: {error}")
            if ready:
                peaks = {worker.spec: [_peak(worker)] for worker in ready}
                pause = PAUSE_S if self.run.threads == 1 else TEAM_PAUSE_S
                samples = take_turns(ready, self.rounds, self.seconds, _quiet, pause)
                for worker in ready:
                    peaks[worker.spec].append(_peak(worker))
                yield case, Turns(samples, agreement, self.opened, peaks)
        if tick and self.workers:
            tick("done", len(cases), len(cases))


@contextmanager
def open_sweep(
    name: str,
    family: str,
    specs: Sequence[str],
    threads: int,
    rounds: int,
    seconds: float,
    python: Python,
    report: Callable[[str], None],
) -> Iterator[Sweep]:
    """Starts the reference and the providers of a family, one process each, and ends them; arguments as of
    `encoder.run`, `name` that of the run without its threads. Raises ValueError for a spec with a pattern, which is of
    models.
    """
    for spec in specs:
        if Spec.parse(spec).pattern:
            raise ValueError(f"engine: expected a name without a pattern. Got {spec!r}: here zeros are swept apart.")
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        reference = stack.enter_context(Worker(REFERENCE, threads, python))
        reference.ask("open", engine=f"{family}/{REFERENCE}", threads=threads)
        workers, opened, absent = start(specs, family, threads, python, stack, report=report)
        facts = {"rounds": rounds, "seconds": seconds}
        run = Run(f"{name}-{threads}t", peak.cpu_model(), peak.isa(), threads, facts, absent)
        yield Sweep(run, workers, opened, reference, str(scratch / "expected.npz"), rounds, seconds, report)


def settings(m: int, samples: Samples, agreement: dict[str, float]) -> dict[str, Any]:
    """The config of a provider's rows at M = `m`."""
    return {
        "weights": "cold" if m == 1 else "hot",
        "rounds": len(samples.ms),
        "accepted": round(samples.accepted_share, 2),
        "sqnr_db": round(agreement["sqnr_db"], 1),
    }


def _quiet(worker: Worker) -> float:
    return worker.ask("quiet", threads=worker.threads)["quiet"]


def _peak(worker: Worker) -> float | None:
    return worker.ask("peak", threads=worker.threads, precision=precision(worker.spec))["peak"]
