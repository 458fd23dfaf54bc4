"""What was asked for on an H200-class card, as a table, and what the rows say of it.

The figures were estimates until a card ran the benchmarks; a row that misses one says where the floor is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..results import Row


@dataclass(frozen=True)
class Goal:
    """A figure.

    Attributes:
        name: what is asked, for people.
        kernel: whose rows: gemm, sparse, groupwise, attention, model.
        fast: ours, a pattern of providers; the fastest of those measured counts.
        slow: rivals, a pattern; the fastest counts. Empty: the figure is of ours alone.
        points: a pattern of the axis' points; the worst counts.
        asked: a ratio slow / fast at least, or where `slow` is empty a value at most.
        metric: latency_ms, or another.
    """

    name: str
    kernel: str
    fast: str
    slow: str
    points: str
    asked: float
    metric: str = "latency_ms"

    @property
    def at_most(self) -> bool:
        return not self.slow


@dataclass(frozen=True)
class Verdict:
    """A goal and its worst point; measured is None where no rows speak of it."""

    goal: Goal
    measured: float | None
    x: str = ""
    fast: str = ""
    slow: str = ""

    @property
    def met(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured <= self.goal.asked if self.goal.at_most else self.measured >= self.goal.asked

    @property
    def shortfall(self) -> float:
        """How many times better it would have to be; 0 where nothing was measured."""
        if self.measured is None or self.measured <= 0:
            return 0.0
        return self.measured / self.goal.asked if self.goal.at_most else self.goal.asked / self.measured


_LARGE = "(4096x1024|1024x4096)"
_INT8, _OURS, _DENSE = "bertkern-.*-int8", "bertkern-.*", "torch-bf16"
GOALS = (
    Goal("int8 + bias, N or K 4096, M=4096, over bf16", "gemm", _INT8, _DENSE, f"4096x{_LARGE} bias hot", 1.6),
    Goal("int8 + bias, 1024x1024, M=4096, over bf16", "gemm", _INT8, _DENSE, "4096x1024x1024 bias hot", 1.3),
    Goal("int8 + GELU, M=4096, over bf16 + GELU", "gemm", _INT8, _DENSE, f"4096x{_LARGE} gelu hot", 1.7),
    Goal("int8, M=128, cold, over bf16", "gemm", _INT8, _DENSE, f"128x({_LARGE[1:-1]}|1024x1024) bias cold", 1.15),
    Goal("int8 over _int_mm + epilogue", "gemm", _INT8, "torch-int_mm", ".*", 1.0),
    Goal("int8 over bare cuBLASLt int8", "gemm", _INT8, "cublaslt-int8-bare", ".* bias .*", 0.9),
    Goal("int8 over _scaled_mm fp8", "gemm", _INT8, "torch-scaled_mm-fp8", ".*", 0.9),
    Goal("64x64 blocks, 40 % zeros, large FFN, M=8192, over dense", "sparse", _OURS, _DENSE,
         f"8192x{_LARGE} 64x64@0.4", 1.0),
    Goal("64x64 blocks, 90 % zeros, large FFN, M=8192, over dense", "sparse", _OURS, _DENSE,
         f"8192x{_LARGE} 64x64@0.9", 4.5),
    Goal("128x128 blocks, 30 % zeros, large FFN, M=8192, over dense", "sparse", _OURS, _DENSE,
         f"8192x{_LARGE} 128x128@0.3", 1.0),
    Goal("128x128 blocks, 90 % zeros, large FFN, M=8192, over dense", "sparse", _OURS, _DENSE,
         f"8192x{_LARGE} 128x128@0.9", 5.0),
    Goal("64x64 and 128x128, 90 % zeros, base FFN, M=4096, over dense", "sparse", _OURS, _DENSE,
         "4096x(3072x768|768x3072) (64x64|128x128)@0.9", 2.5),
    Goal("blocks over torch's BSR", "sparse", _OURS, "torch-bsr-bf16", ".*", 1.0),
    Goal("4 bits, 4096x4096, M 1-16, cold, over fp16", "groupwise", _OURS, "torch-fp16", r"\d+x4096x4096 .* cold", 2.0),
    Goal("4 bits, 8192x8192, M 1-16, cold, over fp16", "groupwise", _OURS, "torch-fp16", r"\d+x8192x8192 .* cold", 2.8),
    Goal("4 bits, base shapes, M 1-16, cold, over fp16", "groupwise", _OURS, "torch-fp16",
         r"\d+x(768|3072)x.* cold", 1.0),
    Goal("BERT-base 1x128 int8, graph replay, ms", "model", "bertkern-int8", "", "1x128", 0.35, "device_ms"),
    Goal("BERT-base 1x128 bf16, graph replay, ms", "model", "bertkern-bf16", "", "1x128", 0.42, "device_ms"),
    Goal("BERT-base 1x128, host overhead of a call, us", "model", "bertkern-(int8|bf16)", "", "1x128", 60.0, "host_us"),
    Goal("BERT-base 1x128 over compiled bf16", "model", _OURS, "torch-compile-bf16", "1x128", 1.3),
    Goal("BERT-base 64x128 half padded, int8, over eager bf16", "model", "bertkern-int8", "torch-eager-bf16",
         "64x128:0.5", 3.0),
    Goal("BERT-base 64x128 half padded, int8, over compiled", "model", "bertkern-int8", "torch-compile-bf16",
         "64x128:0.5", 2.0),
    Goal("half the heads and 65 % of the FFN gone, over eager", "model", _OURS, "torch-eager-bf16",
         "64x128:0.5 pruned", 4.5),
    Goal("attention 64x384: time over kept heads, off proportion", "attention", _OURS, "", "64x384", 0.15,
         "off_proportion"),
)  # fmt: skip


def judge(rows: Iterable[Row], goals: Iterable[Goal] = GOALS) -> list[Verdict]:
    """Each goal's worst point among the rows."""
    rows = [*rows, *off_proportion(rows := list(rows))]
    return [_verdict(goal, rows) for goal in goals]


def _verdict(goal: Goal, rows: list[Row]) -> Verdict:
    def best(pattern: str) -> dict[str, Row]:
        found: dict[str, Row] = {}
        for row in rows:
            fits = row.kernel == goal.kernel and row.metric == goal.metric and re.fullmatch(goal.points, row.x_value)
            if fits and re.fullmatch(pattern, row.provider):
                least = found.get(row.x_value)
                found[row.x_value] = row if least is None or row.median < least.median else least
        return found

    fast = best(goal.fast)
    if goal.at_most:
        worst = max(fast.values(), key=lambda row: row.median, default=None)
        return Verdict(goal, worst.median, worst.x_value, worst.provider) if worst else Verdict(goal, None)
    slow = best(goal.slow)
    pairs = [(slow[x].median / fast[x].median, x) for x in fast if x in slow]
    if not pairs:
        return Verdict(goal, None)
    measured, x = min(pairs)
    return Verdict(goal, measured, x, fast[x].provider, slow[x].provider)


def off_proportion(rows: Iterable[Row]) -> list[Row]:
    """Of each attention provider the largest distance of a time, less that of an empty launch, from its share of the
    time on all heads: |time / (all heads' time * kept / all) - 1|.
    """
    rows = list(rows)
    launch = next((row.median for row in rows if row.kernel == "peak" and row.provider == "launch"), 0.0)
    times: dict[tuple[str, str], dict[int, Row]] = {}
    for row in rows:
        x, _, heads = row.x_value.rpartition(" h")
        if row.kernel == "attention" and row.metric == "latency_ms" and heads.isdigit():
            times.setdefault((row.provider, x), {})[int(heads)] = row
    found = []
    for (provider, x), kept in times.items():
        every = max(kept)
        whole = kept[every].median - launch
        if whole > 0 and len(kept) > 1:
            off = max(abs((row.median - launch) * every / (heads * whole) - 1) for heads, row in kept.items())
            found.append(Row("attention", provider, "off_proportion", "batch x tokens", x, off, off, off))
    return found


def table(verdicts: Iterable[Verdict]) -> list[list[str]]:
    """Asked, measured, met and where, as text."""
    lines = []
    for verdict in verdicts:
        goal, sign = verdict.goal, "<=" if verdict.goal.at_most else ">="
        unit = "" if goal.at_most else "x"
        measured = "-" if verdict.measured is None else f"{verdict.measured:.3g}{unit}"
        met = {None: "not measured", True: "met", False: "missed"}[verdict.met]
        where = " / ".join(filter(None, (verdict.slow, verdict.fast)))
        lines.append([goal.name, f"{sign} {goal.asked:g}{unit}", measured, met, f"{verdict.x} {where}".strip()])
    return lines


def worst(verdicts: Iterable[Verdict]) -> Verdict | None:
    """The one that is missed by most; where all are met, the one that is met by least."""
    return max((v for v in verdicts if v.measured is not None), key=lambda v: v.shortfall, default=None)


def lines(verdicts: Iterable[Verdict], write: Callable[[str], None] = print) -> None:
    """The table, aligned."""
    cells = [["figure", "asked", "measured", "", "worst at"], *table(verdicts)]
    widths = [max(len(row[i]) for row in cells) for i in range(4)]
    for row in cells:
        write("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]).rstrip())
