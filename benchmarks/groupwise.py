"""One linear layer with group-wise low-bit weights, on one thread by default, beside our int8 and other 4-bit kernels.

    python -m bertkern bench groupwise
    python -m bertkern bench groupwise --rows 1,128 --layers 3072x768 --groupings 4n128,2+4n128,4k64

4n128 means 4 bits in 128 groups of output features, 4k64 groups of 64 along K, 2+4n128 groups of 2 and 4 bits in turn.
Weights lie on one grid, so that every provider holds the same ones exactly; torch's and ONNX Runtime's 4-bit kernels
get them in the groups along K that they have, of 64 where the grouping has none. A single row rotates over weights
beyond the last-level cache. Kernels of ours that start from int8 codes are timed inside the operator, as in `gemm`.

Ratios: the other's time to that of the group-wise kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from . import engines
from .groupings import Grouping, parse_groupings
from .harness import Python, Samples, Spec, ratio
from .one_layer import THREADS, Case, last_level_cache, open_sweep, parse_layers, settings
from .opening import expect_known, precision
from .options import counts, parse_specs
from .results import Run

ROWS = "1,4,16,128"
LAYERS = "768x768,3072x768,768x3072"
GROUPINGS = "8n128,4n128,3n128,2n128,2+4n128,4k64,2k64"
AXIS = "M x N x K, grouping"
ROUNDS = 7

OPTIONS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "engines": ("specs", parse_specs),
    "rows": ("rows", counts("rows")),
    "layers": ("layers", parse_layers),
    "groupings": ("groupings", parse_groupings),
}


def run(
    specs: Sequence[str] = tuple(engines.GROUPWISE),
    rows: Sequence[int] = tuple(map(int, ROWS.split(","))),
    layers: Sequence[tuple[int, int]] = tuple(parse_layers(LAYERS)),
    groupings: Sequence[Grouping] = tuple(parse_groupings(GROUPINGS)),
    threads: int = THREADS,
    rounds: int = ROUNDS,
    seconds: float = 0.02,
    cold: int | None = None,
    python: Python = None,
    report: Callable[[str], None] = lambda text: None,
    tick: Callable[[str, int, int], None] | None = None,
) -> Run:
    """Measures providers on every combination of rows, layer and grouping; arguments as in `encoder.run`.

    Args:
        cold: bytes of int8 weights that a single row goes through before it meets one again; None: three last-level
            caches.

    Returns: rows with metrics latency_ms, ratio, share_of_peak (int8 activations, M > 1), bytes (of the weight).
    """
    expect_known(specs, "groupwise")
    cold = 3 * last_level_cache() if cold is None else cold
    cases = [Case(m, n, k, grouping) for grouping in groupings for n, k in layers for m in rows]

    def copies(case: Case) -> dict[str, int]:
        # As many layers as of int8 weights: a model of fewer bits is smaller, and may well stay in the cache.
        return {"copies": 2 + cold // (case.n * case.k) if case.m == 1 else 1}

    with open_sweep("groupwise", "groupwise", specs, threads, rounds, seconds, python, report) as sweep:
        for case, turns in sweep.measure(cases, "grouping", copies, tick):
            _record(sweep.run, case, *turns)
        return sweep.run


def _ours(spec: str) -> bool:
    return Spec.parse(spec).name.startswith("bertkern-groupwise")


def _record(
    run: Run,
    case: tuple[int, int, int, Grouping],
    samples: dict[str, Samples],
    agreement: dict[str, dict[str, float]],
    opened: dict[str, dict[str, Any]],
    peaks: dict[str, list[float | None]],
) -> None:
    m, n, k, grouping = case
    x = (AXIS, f"{m}x{n}x{k} {grouping}")
    for spec, s in samples.items():
        config = settings(m, s, agreement[spec])
        run.add("groupwise", spec, "latency_ms", x, (s.median, s.p20, s.p80), config, opened[spec]["versions"])
        if m > 1 and precision(spec) == "int8" and all(peaks[spec]):
            best = max(peaks[spec])
            share = tuple(m * n * k / (ms * 1e6) / best for ms in (s.median, s.p80, s.p20))
            run.add("groupwise", spec, "share_of_peak", x, share, {"peak_gmac_s": round(best, 1)})
    for fast in filter(_ours, samples):
        for slow in samples:
            same = Spec.parse(fast).isa == Spec.parse(slow).isa
            if same and not _ours(slow) and precision(fast) in (precision(slow), "int8"):
                run.add("groupwise", f"{slow} / {fast}", "ratio", x, ratio(samples[slow], samples[fast]))
