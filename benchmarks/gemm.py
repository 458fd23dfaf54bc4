"""One linear layer, on one thread by default: milliseconds, and the share of the int8 peak of the same process.

    python -m bertkern bench gemm
    python -m bertkern bench gemm --rows 128 --layers 3072x768 --epilogues fp32,gelu+q8 --threads 2

A single row reads every weight once, so there it rotates over weights beyond the last-level cache, and the yardstick is
our own read probe. bertkern-kernel is bertkern-int8 without the call through Python, dispatch and allocation (some
10 microseconds, which is what small shapes show most of). Shapes are M x N x K: M rows of tokens, weight [N, K].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .harness import Python, Samples, ratio
from .one_layer import (
    THREADS,
    Case,
    last_level_cache,
    open_sweep,
    parse_layers,
    settings,
)
from .opening import precision, rivals
from .options import counts, parse_names, parse_specs
from .results import Run

ROWS = "1,7,16,32,128,1024"
LAYERS = "768x768,3072x768,768x3072,833x717,1200x312,312x1200"
EPILOGUES = "fp32,bf16,gelu+q8"
PROVIDERS = "bertkern-kernel,bertkern-int8,bertkern-linear,torch-int8,torch-bf16,torch-fp32"
AXIS = "M x N x K, epilogue"
ROUNDS = 15

parse_epilogues = parse_names("epilogue", EPILOGUES.split(","))

# What the command line may set: its name there, the argument of `run`, how its text is read.
OPTIONS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "engines": ("specs", parse_specs),
    "rows": ("rows", counts("rows")),
    "layers": ("layers", parse_layers),
    "epilogues": ("epilogues", parse_epilogues),
}


def run(
    specs: Sequence[str] = tuple(PROVIDERS.split(",")),
    rows: Sequence[int] = tuple(map(int, ROWS.split(","))),
    layers: Sequence[tuple[int, int]] = tuple(parse_layers(LAYERS)),
    epilogues: Sequence[str] = tuple(EPILOGUES.split(",")),
    threads: int = THREADS,
    rounds: int = 7,
    seconds: float = 0.05,
    python: Python = None,
    report: Callable[[str], None] = lambda text: None,
    tick: Callable[[str, int, int], None] | None = None,
) -> Run:
    """Measures providers on every combination of rows, layer and epilogue; arguments as in `encoder.run`.

    Returns: rows with metrics latency_ms, share_of_peak (int8 providers, M > 1), gb_s and share_of_read (M = 1), ratio.
    """
    cases = [Case(m, n, k, epilogue) for epilogue in epilogues for n, k in layers for m in rows]

    def copies(case: Case) -> dict[str, int]:
        return {"copies": 2 + 3 * last_level_cache() // (case.n * case.k) if case.m == 1 else 1}

    with open_sweep("gemm", "linear", specs, threads, rounds, seconds, python, report) as sweep:
        if sweep.workers:
            sweep.run.facts["read_gb_s"] = max(sweep.workers[0].ask("read", threads=threads)["read"] for _ in range(3))
        for case, turns in sweep.measure(cases, "epilogue", copies, tick):
            _record(sweep.run, case, *turns)
        return sweep.run


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
        config = settings(m, s, agreement[spec])
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
