"""The sections, in their order."""

from __future__ import annotations

from ..results import Row, Run
from . import checks, goals
from .campaign import Context, Section

# Of the seconds of "ops"; what comes first has the rest of what was not used.
SHARES = {"gemm": 0.34, "sparse": 0.38, "groupwise": 0.14, "attention": 0.08, "rowwise": 0.06}


def ops(context: Context) -> bool:
    """The card's peaks, then operator by operator."""
    whole = context.left()
    done = context.job("peaks", 40)
    peaks = context.run.facts.get("peaks", {})
    for op, share in SHARES.items():
        seconds = min(share * whole, context.left())
        if seconds < 2:
            context.run.facts[f"unfinished {op}"] = "not begun"
            done = False
            continue
        done &= context.job("ops", seconds + 20, op=op, peaks=peaks, seconds=seconds)
    return done and not any(fact.startswith("unfinished") for fact in context.run.facts)


def models(context: Context) -> bool:
    return context.job("models", context.left(), silence=120.0)


def rows_of(runs: dict[str, Run]) -> list[Row]:
    return [row for run in runs.values() for row in run.rows]


def profile(context: Context) -> bool:
    """The worst miss among the goals, of ours and of its rival."""
    worst = goals.worst(goals.judge(rows_of(context.others)))
    if worst is None:
        context.run.absent["profile"] = "nothing was measured before, so there is no worst miss"
        return False
    x = worst.x
    if worst.goal.kernel == "attention" and " h" not in x:
        x = f"{x} h1"
    names = [name for name in (worst.fast, worst.slow) if name]
    context.run.facts |= {"of": worst.goal.name, "asked": worst.goal.asked, "measured": worst.measured}
    context.report(f"  {worst.goal.name}: asked {worst.goal.asked:g}, measured {worst.measured:.3g} at {x}")
    return context.job("profile", context.left(), kernel=worst.goal.kernel, x=x, names=names)


SECTIONS = (
    Section("smoke", 100.0, "each kernel, and what the CUDA library has", checks.smoke),
    Section("tests", 90.0, "pytest -m gpu", checks.tests),
    Section("sanitizer", 70.0, "compute-sanitizer", checks.sanitizer),
    Section("ops", 165.0, "peaks, and operators beside peers", ops),
    Section("models", 150.0, "BERT-base beside torch", models),
    Section("profile", 40.0, "kernels of the worst miss", profile),
)
