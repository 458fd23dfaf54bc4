"""Attention alone: `bertkern.ops.attention` beside torch's `scaled_dot_product_attention` and the formula itself.

    python -m bertkern bench attention
    python -m bertkern bench attention --shapes 8x128,1x384 --kept 6,3 --dtypes fp32 --threads 2
    python -m bertkern bench attention --shapes 8x128:0.4,32x64:0.5 --heads 12 --head-dim 32

Each provider gets q, k, v as it likes them best: torch contiguous [B, H, L, d], bertkern packed [T, H, d]. With padding
torch also gets a mask of the keys; bertkern gets the tokens alone. NAME:6 is the provider on 6 heads, the others being
gone, NAME:mask6 on all heads with a run-time mask that leaves 6; all take turns in one run, and time_share is what they
take of the provider's time on all heads.

Multiply-adds are those of the two products over real tokens and kept heads, the softmax is free; the peak is that of
the data type on as many threads. Outputs are compared with the tests' float64 reference first.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from . import peak
from .encoder import Case, parse_shapes
from .harness import Python, Samples, Spec, Worker, counted, ratio, take_turns
from .opening import Probe, expect_known, of_dtypes, open_reference, precision, start, verified
from .options import count, parse_names, parse_specs
from .results import Run

SHAPES = "1x16,8x16,1x64,1x128,8x128,1x384,8x384,1x1024,1x2048,1x4096"
ENGINES = ("bertkern-fp32", "torch-fp32", "torch-eager-fp32", "bertkern-bf16", "torch-bf16", "torch-eager-bf16")
KEPT = "9,6,3,1,mask6"
MASK = "mask"
AXIS = "batch x tokens"
ROUNDS = 15


def kept_heads(pattern: str, heads: int) -> tuple[int, bool]:
    """(6, False) of `6`, (6, True) of `mask6`, all of the heads of the empty pattern. Raises ValueError."""
    if not pattern:
        return heads, False
    number = pattern.removeprefix(MASK)
    if not number.isdecimal() or not 1 <= int(number) <= heads:
        raise ValueError(f"kept: expected heads from 1 to {heads}, like 6 or mask6. Got {pattern!r}.")
    return int(number), pattern.startswith(MASK)


OPTIONS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "engines": ("specs", parse_specs),
    "shapes": ("shapes", parse_shapes),
    "heads": ("heads", count("heads")),
    "head_dim": ("head_dim", count("head-dim")),
    "kept": ("kept", lambda text: text.split(",")),
    "dtypes": ("dtypes", parse_names("dtype", ("fp32", "bf16"))),
}


def run(
    specs: Sequence[str] = ENGINES,
    shapes: Sequence[Case] = tuple(parse_shapes(SHAPES)),
    heads: int = 12,
    head_dim: int = 64,
    kept: Sequence[str] | None = None,
    dtypes: Sequence[str] = ("fp32", "bf16"),
    threads: int = 2,
    rounds: int = ROUNDS,
    seconds: float = 0.05,
    python: Python = None,
    report: Callable[[str], None] = lambda text: None,
    tick: Callable[[str, int, int], None] | None = None,
) -> Run:
    """Measures providers on every shape; arguments as in `encoder.run`.

    Args:
        heads, head_dim: of the layer.
        kept: heads left, see `kept_heads`; bertkern's providers run on each, too. None: those of KEPT below `heads`.
        dtypes: providers of others are left out.

    Returns: rows with metrics latency_ms, gmac_s, share_of_peak, ratio (torch's time to bertkern's, same data type),
        time_share (of the time on all heads).
    """
    expect_known(specs, "attention")
    if kept is None:
        kept = [text for text in KEPT.split(",") if int(text.removeprefix(MASK)) < heads]
    specs = of_dtypes(specs, dtypes)
    fewer = [f"{spec}:{text}" for spec in specs for text in kept if _ours(spec) and not Spec.parse(spec).pattern]
    specs = list(dict.fromkeys([*specs, *fewer]))
    left = {spec: kept_heads(Spec.parse(spec).pattern, heads) for spec in specs}
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        probe = stack.enter_context(Probe(threads, python))
        reference = stack.enter_context(Worker("reference", threads, python))
        open_reference(reference, "attention/reference")
        workers, opened, absent = start(specs, "attention", threads, python, stack, report=report)
        run = Run(f"attention-{heads}x{head_dim}-{threads}t", peak.cpu_model(), peak.isa(), threads, absent=absent)
        run.facts = {"model": f"{heads} heads of {head_dim}", "rounds": rounds, "seconds": seconds}
        run.facts["reference"] = "float64"
        for case in shapes:
            layer = {"lengths": case.lengths().tolist(), "tokens": case.tokens, "heads": heads, "head_dim": head_dim}
            expected = {}
            for count_ in sorted({left[worker.spec][0] for worker in workers}, reverse=True):
                if tick:
                    tick(f"{case} reference, {count_} heads", 0, 0)
                expected[count_] = str(scratch / f"expected-{count_}.npz")
                reference.ask("prepare", **layer, kept=count_, masked=False)
                reference.ask("save", path=expected[count_])
            inputs = {spec: {**layer, "kept": number, "masked": masked} for spec, (number, masked) in left.items()}
            ready, agreement = verified(
                workers, case, inputs.__getitem__, lambda spec, e=expected: e[left[spec][0]], report
            )
            if not ready:
                continue
            types = dict.fromkeys(precision(worker.spec) for worker in ready)
            peaks = {name: [probe.peak(name)] for name in types}
            progress = counted(tick, rounds * len(ready), f"{case} {{}}".format)
            samples = take_turns(ready, rounds, seconds, probe.quiet, progress=progress)
            for name, found in peaks.items():
                found.append(probe.peak(name))
            _record(run, case, head_dim, left, samples, agreement, opened, peaks)
        return run


def _ours(spec: str) -> bool:
    return spec.startswith("bertkern")


def _record(
    run: Run,
    case: Case,
    head_dim: int,
    left: dict[str, tuple[int, bool]],
    samples: dict[str, Samples],
    agreement: dict[str, dict[str, float]],
    opened: dict[str, dict[str, Any]],
    peaks: dict[str, list[float | None]],
) -> None:
    x = (AXIS, str(case))
    squares = int((case.lengths() ** 2).sum())
    for spec, s in samples.items():
        config = {
            "kept": left[spec][0],
            "padding": case.padding,
            "rounds": len(s.ms),
            "accepted": round(s.accepted_share, 2),
            "sqnr_db": round(agreement[spec]["sqnr_db"], 1),
        }
        versions = opened[spec]["versions"]
        run.add("attention", spec, "latency_ms", x, (s.median, s.p20, s.p80), config, versions)
        rate = [2 * squares * left[spec][0] * head_dim / (ms * 1e6) for ms in (s.median, s.p80, s.p20)]
        run.add("attention", spec, "gmac_s", x, tuple(rate), config, versions)
        found = peaks[precision(spec)]
        if all(found):
            config = config | {f"{precision(spec)}_peak_gmac_s": round(max(found), 1)}
            run.add("attention", spec, "share_of_peak", x, tuple(r / max(found) for r in rate), config, versions)
    for fast, slow in ((fast, slow) for fast in samples for slow in samples):
        ours, theirs = Spec.parse(fast), Spec.parse(slow)
        if not _ours(fast) or ours.isa != theirs.isa or theirs.pattern:
            continue
        if not _ours(slow) and not ours.pattern and precision(slow) == precision(fast):
            run.add("attention", f"{slow} / {fast}", "ratio", x, ratio(samples[slow], samples[fast]))
        elif ours.name == theirs.name and ours.pattern:
            values = ratio(samples[fast], samples[slow])
            run.add("attention", fast, "time_share", x, values, {"kept": left[fast][0], "heads": left[slow][0]})
