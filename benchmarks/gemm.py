"""One linear layer on one thread: milliseconds, and the share of the int8 peak measured in the same process.

    python -m bertkern bench gemm
    python -m bertkern bench gemm --rows 128 --layers 3072x768 --epilogues fp32,gelu+q8

A single row reads every weight once, so there it rotates over weights beyond the last-level cache, and the yardstick is
our own read probe. bertkern-kernel is bertkern-int8 without the call through Python, dispatch and allocation (some
10 microseconds, which is what small shapes show most of). Shapes are M x N x K: M rows of tokens, weight [N, K].
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from . import peak
from .encoder import check, precision, rivals, start
from .harness import Python, Samples, Worker, WorkerError, ratio, take_turns
from .results import Run

ROWS = "1,7,16,32,128,1024"
LAYERS = "768x768,3072x768,768x3072,833x717,1200x312,312x1200"
EPILOGUES = "fp32,bf16,gelu+q8"
PROVIDERS = "bertkern-kernel,bertkern-int8,bertkern-linear,torch-int8,torch-bf16,torch-fp32"
REFERENCE = "torch-fp32"
AXIS = "M x N x K, epilogue"
ROUNDS = 15
PAUSE_S = 0.005  # one thread spins for nobody


def parse_specs(text: str) -> list[str]:
    """`bertkern-int8,torch-fp32@avx2` as a list."""
    return text.split(",")


def parse_rows(text: str) -> list[int]:
    """`1,128` as numbers of rows. Raises ValueError."""
    for part in text.split(","):
        if not part.isdigit() or not int(part):
            raise ValueError(f"rows: expected a whole number of at least 1. Got {part!r}.")
    return [int(part) for part in text.split(",")]


def parse_layers(text: str) -> list[tuple[int, int]]:
    """`3072x768,768x3072` as (N, K) pairs. Raises ValueError."""
    layers = []
    for part in text.split(","):
        n, _, k = part.strip().partition("x")
        if not (n.isdigit() and k.isdigit() and int(n) and int(k)):
            raise ValueError(f"layer: expected OUTxIN, like 3072x768. Got {part!r}.")
        layers.append((int(n), int(k)))
    return layers


def parse_epilogues(text: str) -> list[str]:
    """`fp32,gelu+q8` as a list. Raises ValueError."""
    chosen = text.split(",")
    for name in chosen:
        if name not in EPILOGUES.split(","):
            raise ValueError(f"epilogue: expected one of {EPILOGUES}. Got {name!r}.")
    return chosen


# What the command line may set: its name there, the argument of `run`, how its text is read.
OPTIONS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "engines": ("specs", parse_specs),
    "rows": ("rows", parse_rows),
    "layers": ("layers", parse_layers),
    "epilogues": ("epilogues", parse_epilogues),
}


def last_level_cache() -> int:
    """Bytes of the largest cache that the kernel lists for core 0; 32 MiB where it lists none."""
    sizes = [32 << 20]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20}.get(text[-1], 0))
    return max(sizes)


def run(
    specs: Sequence[str] = tuple(PROVIDERS.split(",")),
    rows: Sequence[int] = tuple(map(int, ROWS.split(","))),
    layers: Sequence[tuple[int, int]] = tuple(parse_layers(LAYERS)),
    epilogues: Sequence[str] = tuple(EPILOGUES.split(",")),
    rounds: int = 7,
    seconds: float = 0.05,
    python: Python = None,
    report: Callable[[str], None] = lambda text: None,
    tick: Callable[[str, int, int], None] | None = None,
) -> Run:
    """Measures providers on every combination of rows, layer and epilogue; arguments as in `encoder.run`.

    Returns: rows with metrics latency_ms, share_of_peak (int8 providers, M > 1), gb_s and share_of_read (M = 1), ratio.
    """
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        reference = stack.enter_context(Worker(REFERENCE, 1, python))
        reference.ask("open", engine=f"linear/{REFERENCE}", threads=1)
        workers, opened, absent = start(specs, "linear", 1, python, stack)
        for spec, reason in absent.items():
            report(f"{spec}: absent, {reason}" if reason.startswith("needs") else reason)
        run = Run("gemm-1t", peak.cpu_model(), peak.isa(), 1, absent=absent)
        run.facts = {"rounds": rounds, "seconds": seconds}
        if not workers:
            return run
        run.facts["read_gb_s"] = max(workers[0].ask("read", threads=1)["read"] for _ in range(3))

        cases = [(m, n, k, e) for e in epilogues for n, k in layers for m in rows]
        for done, (m, n, k, epilogue) in enumerate(cases):
            if tick:
                tick(f"{m}x{n}x{k} {epilogue}", done, len(cases))
            copies = 2 + 3 * last_level_cache() // (n * k) if m == 1 else 1
            expected = str(scratch / "expected.npz")
            reference.ask("prepare", m=m, n=n, k=k, epilogue=epilogue)
            reference.ask("save", path=expected)
            ready, agreement = [], {}
            for worker in workers:
                try:
                    worker.ask("prepare", m=m, n=n, k=k, epilogue=epilogue, copies=copies)
                    agreement[worker.spec] = check(worker.spec, worker.ask("compare", path=expected))
                    ready.append(worker)
                except WorkerError as error:
                    if "has no epilogue" not in str(error):
                        report(f"{m}x{n}x{k} {epilogue}: left out: {error}")
            if ready:
                peaks = {w.spec: [w.ask("peak", threads=1)["peak"]] for w in ready}
                samples = take_turns(ready, rounds, seconds, lambda w: w.ask("quiet", threads=1)["quiet"], PAUSE_S)
                for w in ready:
                    peaks[w.spec].append(w.ask("peak", threads=1)["peak"])
                _record(run, (m, n, k, epilogue), samples, agreement, opened, peaks)
        if tick:
            tick("done", len(cases), len(cases))
        return run


def _record(
    run: Run,
    case: tuple[int, int, int, str],
    samples: dict[str, Samples],
    agreement: dict[str, dict[str, float]],
    opened: dict[str, dict[str, Any]],
    peaks: dict[str, list[float | None]],
) -> None:
    m, n, k, epilogue = case
    x = (AXIS, f"{m}x{n}x{k} {epilogue}")
    bytes_an_element = {"int8": 1, "bf16": 2, "fp32": 4}
    for spec, s in samples.items():
        config = {
            "weights": "cold" if m == 1 else "hot",
            "rounds": len(s.ms),
            "accepted": round(s.accepted_share, 2),
            "sqnr_db": round(agreement[spec]["sqnr_db"], 1),
        }
        versions = opened[spec]["versions"]
        times = (s.median, s.p80, s.p20)
        run.add("gemm", spec, "latency_ms", x, (s.median, s.p20, s.p80), config, versions)
        if m == 1:
            rate = [n * k * bytes_an_element[precision(spec)] / (ms * 1e6) for ms in times]
            run.add("gemm", spec, "gb_s", x, tuple(rate), config, versions)
            share = tuple(r / run.facts["read_gb_s"] for r in rate)
            run.add("gemm", spec, "share_of_read", x, share, config, versions)
        elif precision(spec) == "int8" and all(peaks[spec]):
            best = max(peaks[spec])
            share = tuple(m * n * k / (ms * 1e6) / best for ms in times)
            run.add("gemm", spec, "share_of_peak", x, share, config | {"peak_gmac_s": round(best, 1)}, versions)
    for slow, fast in rivals(samples):
        run.add("gemm", f"{slow} / {fast}", "ratio", x, ratio(samples[slow], samples[fast]))
