"""One operator: every provider of the table on every case, checked, then in turns."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Any

from ..harness import Samples, ratio
from . import problems, providers
from .timing import Timed, clock_of, ready, take_turns

ROUNDS = 7


def job(
    say: Any,
    op: str,
    device: str = "cuda",
    skip: Collection[str] = (),
    peaks: dict[str, float] | None = None,
    seconds: float = 1e9,
    rounds: int = ROUNDS,
    cases: dict[str, Any] | None = None,
) -> None:
    """Measures.

    Args:
        skip: "case|provider", or "case" alone: done, or what hung.
        peaks: of peaks.job: tflop_s by bf16, int8, fp8; gb_s of copy; ms of launch.
        seconds: no case begins after them.
        cases: arguments of the function that makes the cases.
    """
    end, clock, skip = time.monotonic() + seconds, clock_of(device), set(skip)
    here = _here(say, op, device)
    for case in getattr(problems, f"{op}_cases")(**(cases or {})):
        if case.x in skip:
            continue
        if time.monotonic() > end:
            say(fact={f"unfinished {op}": f"from {case.x} on"})
            return
        _measure(say, clock, case, device, [p for p in here if f"{case.x}|{p.name}" not in skip], peaks or {}, rounds)
        say(at=f"{case.x}|", finished=case.x)


def _here(say: Any, op: str, device: str) -> list[providers.Provider]:
    found = []
    for provider in providers.of(op):
        lacking = provider.lacks(device)
        if lacking is None:
            found.append(provider)
        else:
            say(absent={f"{op} {provider.name}": lacking})
    return found


def _measure(
    say: Any,
    clock: Any,
    case: problems.Case,
    device: str,
    here: list[providers.Provider],
    peaks: dict[str, float],
    rounds: int,
) -> None:
    say(at=f"{case.x}|")
    problem = problems.problem(case, device)
    timed: list[Timed] = []
    agreement: dict[str, float] = {}
    for provider in here:
        if provider.compiled and not case.compiled:
            continue
        say(at=f"{case.x}|{provider.name}")
        try:
            with provider.chosen():
                weights, call = provider.make(problem)
                db = providers.agreement_db(problem, call(weights))
                if db < provider.floor_db:
                    raise ValueError(f"wrong on {case.x}: {db:.1f} dB from float64, {provider.floor_db:g} asked for")
                timed.append(ready(clock, provider.name, call, weights, case.cold))
                agreement[provider.name] = db
        except Exception as error:  # whatever a provider raises is said, and costs its column alone
            text = (str(error).splitlines() or [""])[0][:300]
            say(absent={f"{case.op} {provider.name}": f"{case.x}: {type(error).__name__}: {text}"})
    say(at=f"{case.x}|")
    samples = take_turns(clock, timed, rounds)
    how = {one.name: one.how for one in timed}
    for provider in here:
        if provider.name in samples:
            _rows(say, problem, provider, samples[provider.name], agreement[provider.name], how[provider.name], peaks)
    for fast in samples:
        for slow in samples:
            if fast.startswith("bertkern") and not slow.startswith("bertkern"):
                say.row(
                    case.op, f"{slow} / {fast}", "ratio", (problems.AXES[case.op], case.x),
                    ratio(samples[slow], samples[fast]),
                )  # fmt: skip


def _rows(
    say: Any,
    problem: problems.Problem,
    provider: providers.Provider,
    s: Samples,
    db: float,
    how: str,
    peaks: dict[str, float],
) -> None:
    case = problem.case
    x = (problems.AXES[case.op], case.x)
    config = {"timing": how, "rounds": len(s.ms), "sqnr_db": round(db, 1)}
    say.row(case.op, provider.name, "latency_ms", x, (s.median, s.p20, s.p80), config)
    ordered = (s.median, s.p80, s.p20)
    macs = problem.facts.get("kept_macs", problem.macs) if provider.skips else problem.macs
    if macs:
        rates = [2 * macs / (ms * 1e9) for ms in ordered]
        say.row(case.op, provider.name, "tflop_s", x, rates)
        if peaks.get(provider.peak):
            config = {"peak": f"{provider.peak} {peaks[provider.peak]:.4g} TFLOP/s"}
            say.row(case.op, provider.name, "share_of_peak", x, [rate / peaks[provider.peak] for rate in rates], config)
    if not macs or case.op == "groupwise":
        # What moves bytes rather than multiplies; of 4-bit layers those of 4 bits, whoever reads more.
        rates = [problem.bytes / (ms * 1e6) for ms in ordered]
        say.row(case.op, provider.name, "gb_s", x, rates)
        if peaks.get("copy"):
            config = {"peak": f"copy {peaks['copy']:.4g} GB/s"}
            say.row(case.op, provider.name, "share_of_copy", x, [rate / peaks["copy"] for rate in rates], config)
