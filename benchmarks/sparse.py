"""One linear layer with zeros in its weight, on one thread by default: how many zeros make skipping them pay.

    python -m bertkern bench sparse
    python -m bertkern bench sparse --rows 128 --layers 3072x768 --blocks 16x4,1x1 --zeros 0,0.5,0.8,0.9 --dtypes int8

Zeros lie in blocks, rows x columns of the weight [N, K], drawn evenly; 1x1 is unstructured. Bias is added, fp32 (of
bf16 layers: bf16) comes out. int8 layers of ours start from codes and are timed inside the operator, as in `gemm`;
all others are timed through their Python call. A single row takes its weights from beyond the last-level cache, each
provider as many copies as that takes: zeros that let a whole model fit into the cache gain more than shown here.

Ratios: a sparse kernel beside the dense one of the same data type, beside torch's fp32 and beside its own rivals. The
break-even is the share of zeros from which on the sparse kernel is the faster one, interpolated along the sweep. The
share of the peak, that of all threads together, counts only multiply-adds of blocks that are left. SciPy's product has
one thread, however many there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from . import engines
from .harness import Python, Samples, Spec, Worker, ratio
from .one_layer import (
    REFERENCE,
    THREADS,
    Case,
    last_level_cache,
    open_sweep,
    parse_layers,
    settings,
)
from .opening import expect_known, of_dtypes, precision
from .options import counts, parse_names, parse_specs
from .patterns import Pattern, parse_blocks, parse_zeros
from .results import Row, Run

ROWS = "1,128"
LAYERS = "3072x768,768x3072"
BLOCKS = "1x1,1x4,16x4,32x32"
ZEROS = "0,0.1,0.5,0.75,0.8,0.9"
DTYPES = "int8,fp32"
ROUNDS = 5
AXIS = "M x N x K, block@zeros"
BREAK_EVEN_AXIS = "M x N x K, block"
SKIPPING = tuple(name for name in engines.SPARSES if "-sparse-" in name or "-csr-" in name or "-bsr-" in name)

parse_dtypes = parse_names("dtype", tuple(engines.SQNR_FLOOR_DB))

OPTIONS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "engines": ("specs", parse_specs),
    "rows": ("rows", counts("rows")),
    "layers": ("layers", parse_layers),
    "blocks": ("blocks", parse_blocks),
    "zeros": ("zeros", parse_zeros),
    "dtypes": ("dtypes", parse_dtypes),
}


def skips(spec: str) -> bool:
    """Whether a provider skips zeros."""
    return Spec.parse(spec).name in SKIPPING


def pairs(specs: Iterable[str]) -> list[tuple[str, str]]:
    """(slow, fast) pairs worth a ratio, under one cap: fast skips zeros; slow is a dense kernel or a rival of ours."""
    specs = list(specs)
    found = []
    for fast in filter(skips, specs):
        for slow in specs:
            name = Spec.parse(slow).name
            own = name == f"bertkern-{precision(fast)}"
            rival = (
                fast.startswith("bertkern") and not name.startswith("bertkern") and precision(slow) == precision(fast)
            )
            if Spec.parse(fast).isa == Spec.parse(slow).isa and (own or rival or name == REFERENCE):
                found.append((slow, fast))
    return found


def run(
    specs: Sequence[str] | None = None,
    rows: Sequence[int] = tuple(map(int, ROWS.split(","))),
    layers: Sequence[tuple[int, int]] = tuple(parse_layers(LAYERS)),
    blocks: Sequence[tuple[int, int]] = tuple(parse_blocks(BLOCKS)),
    zeros: Sequence[float] = tuple(parse_zeros(ZEROS)),
    dtypes: Sequence[str] = tuple(DTYPES.split(",")),
    threads: int = THREADS,
    rounds: int = ROUNDS,
    seconds: float = 0.02,
    cold: int | None = None,
    python: Python = None,
    report: Callable[[str], None] = lambda text: None,
    tick: Callable[[str, int, int], None] | None = None,
) -> Run:
    """Measures providers on every combination of rows, layer, block and zeros; arguments as in `encoder.run`.

    Args:
        specs: providers; None: all of the data types.
        zeros: shares, ascending.
        dtypes: of int8, fp32, bf16; providers of others are left out.
        cold: bytes of weights that a single row goes through before it meets one again; None: two last-level caches.

    Returns: rows with metrics latency_ms, ratio, share_of_peak (M > 1), break_even (a share of zeros).
    """
    specs = specs or tuple(engines.SPARSES)
    expect_known(specs, "sparse")
    specs = of_dtypes(specs, dtypes)
    cold = 2 * last_level_cache() if cold is None else cold
    cases = [Case(m, n, k, Pattern(b, z)) for m in rows for n, k in layers for b in blocks for z in zeros]

    def weights(case: Case) -> dict[str, int]:
        return {"cold": cold if case.m == 1 else 0}

    with open_sweep("sparse", "sparse", specs, threads, rounds, seconds, python, report) as sweep:
        for case, turns in sweep.measure(cases, "pattern", weights, tick):
            _record(sweep.run, case, *turns)
        _record_break_even(sweep.run, cases, sweep.workers)
        return sweep.run


def _record(
    run: Run,
    case: tuple[int, int, int, Pattern],
    samples: dict[str, Samples],
    agreement: dict[str, dict[str, float]],
    opened: dict[str, dict[str, Any]],
    peaks: dict[str, list[float | None]],
) -> None:
    m, n, k, pattern = case
    x = (AXIS, f"{m}x{n}x{k} {pattern}")
    left = int(pattern.mask(n, k).sum())
    for spec, s in samples.items():
        config = settings(m, s, agreement[spec])
        run.add("sparse", spec, "latency_ms", x, (s.median, s.p20, s.p80), config, opened[spec]["versions"])
        if m > 1 and all(peaks[spec]):
            best = max(peaks[spec])
            work = left if skips(spec) else n * k
            share = tuple(m * work / (ms * 1e6) / best for ms in (s.median, s.p80, s.p20))
            key = "peak_gmac_s" if precision(spec) == "int8" else f"{precision(spec)}_peak_gmac_s"
            run.add("sparse", spec, "share_of_peak", x, share, {key: round(best, 1)})
    for slow, fast in pairs(samples):
        run.add("sparse", f"{slow} / {fast}", "ratio", x, ratio(samples[slow], samples[fast]))


def break_even(points: Sequence[tuple[float, float]]) -> float | None:
    """The share of zeros from which on a ratio stays at 1 or above.

    Args:
        points: (zeros, ratio), ascending.

    Returns: interpolated between the logarithms of the ratios; the first share where none is below 1, None where the
        last is. Example: `break_even([(0, 0.5), (0.5, 2.0)])` is 0.25.
    """
    below = [i for i, (_, gain) in enumerate(points) if gain < 1.0]
    if not points or (below and below[-1] == len(points) - 1):
        return None
    if not below:
        return points[0][0]
    (z0, g0), (z1, g1) = points[below[-1] : below[-1] + 2]
    return z0 + (z1 - z0) * math.log(1.0 / g0) / math.log(g1 / g0)


def _record_break_even(run: Run, cases: Sequence[tuple[int, int, int, Pattern]], workers: Sequence[Worker]) -> None:
    """Of each sparse kernel beside dense ones of its data type; no row where it is slower up to the end."""
    sweeps = dict.fromkeys((m, n, k, pattern.block) for m, n, k, pattern in cases)
    shares = list(dict.fromkeys(pattern.zeros for *_, pattern in cases))
    found = {(row.provider, row.x_value): row for row in run.rows if row.metric == "ratio"}
    for slow, fast in pairs(worker.spec for worker in workers):
        if skips(slow) or precision(slow) != precision(fast):
            continue
        for m, n, k, block in sweeps:
            layer, provider = f"{m}x{n}x{k}", f"{slow} / {fast}"
            rows = [(z, found.get((provider, f"{layer} {Pattern(block, z)}"))) for z in shares]
            measured: list[tuple[float, Row]] = [(z, row) for z, row in rows if row]
            at = break_even([(z, row.median) for z, row in measured])
            if at is None:
                continue
            # Where even the slow end of the ratios says never, the sweep's end is the least that it can be.
            ends = [break_even([(z, getattr(row, q)) for z, row in measured]) for q in ("p80", "p20")]
            values = (at, *(measured[-1][0] if end is None else end for end in ends))
            config = {"from": measured[0][0], "to": measured[-1][0]}
            run.add(
                "sparse", provider, "break_even", (BREAK_EVEN_AXIS, f"{layer} {Pattern(block, 0).name}"), values, config
            )
