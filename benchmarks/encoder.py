"""A whole encoder, end to end: latency of any engines on the same inputs, interleaved.

    python -m bertkern bench encoder --threads 2 --shapes 1x32,1x128,8x128,1x384
    python -m bertkern bench encoder --engines bertkern-int8@avx2,torch-fp32@avx2 --shapes 1x128
    python -m bertkern bench encoder --pattern 16x4@0.8 --engines bertkern-int8,bertkern-int8:dense,deepsparse-int8
    python -m bertkern bench encoder --model bert-base-d26 --engines bertkern-int8,torch-fp32

With a pattern every engine gets the same pruned weights (`models.write_pruned`); `NAME:dense` is the engine on the
whole model, and time_share then what the pruned one takes of its time. bert-base-d26 is such a pair for each engine.
Outputs are compared with torch's on the same weights.

The share of the peak counts the multiplications of the linear layers over real tokens, nothing else; of a pruned model
those that are left.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from . import models, peak
from .harness import Python, Samples, Spec, Worker, counted, ratio, take_turns
from .opening import OURS, REFERENCE, Probe, does_all, open_reference, rivals, spelled, start, verified
from .options import parse_specs
from .results import Run

SHAPES = "1x16,1x32,1x128,8x128,1x384,3x77"
AXIS = "batch x tokens"
ROUNDS = 15


class Batches(Protocol):
    """What one call computes, and its name on the axis."""

    tokens: int  # of the longest sequence

    def __str__(self) -> str: ...

    def lengths(self) -> np.ndarray:
        """Tokens of each sequence."""

    def real(self) -> float:
        """The share of the positions that are tokens."""

    def batches(self, vocab: int) -> list[dict[str, np.ndarray]]:
        """Inputs of the model, one dict a batch; int64 [batch, tokens]."""


@dataclass(frozen=True)
class Case:
    """A batch; with padding, sequence lengths are spread evenly so that this share of the positions is padding."""

    batch: int
    tokens: int
    padding: float = 0.0

    def __str__(self) -> str:
        return f"{self.batch}x{self.tokens}" + (f":{self.padding:g}" if self.padding else "")

    @staticmethod
    def parse(text: str) -> Case:
        """`8x128`, or `8x128:0.4` for 40 % padding. Raises ValueError."""
        match = re.fullmatch(r"(\d+)x(\d+)(?::(0?\.\d+))?", text.strip())
        if not match or not int(match[1]) or not int(match[2]):
            raise ValueError(f"shape: expected BATCHxTOKENS or BATCHxTOKENS:PADDING, like 8x128:0.4. Got {text!r}.")
        return Case(int(match[1]), int(match[2]), float(match[3] or 0))

    def lengths(self) -> np.ndarray:
        """Tokens of each sequence; the first is full, so that the batch is as long as it says."""
        spread = np.linspace(0.0, 2.0 * self.padding, self.batch) if self.batch > 1 else np.zeros(1)
        return np.maximum(1, np.round(self.tokens * (1.0 - np.minimum(spread, 1.0)))).astype(int)

    def real(self) -> float:
        return float(self.lengths().mean()) / self.tokens

    def batches(self, vocab: int) -> list[dict[str, np.ndarray]]:
        return [self.inputs(vocab)]

    def inputs(self, vocab: int) -> dict[str, np.ndarray]:
        """Random token ids, attention mask, token types; int64 [batch, tokens]."""
        rng = np.random.default_rng(self.batch * 1000 + self.tokens)
        ids = rng.integers(min(1000, vocab - 1), vocab, (self.batch, self.tokens))
        mask = (np.arange(self.tokens)[None] < self.lengths()[:, None]).astype(np.int64)
        return {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def parse_shapes(text: str) -> list[Case]:
    """`1x32,8x128:0.4` as cases."""
    return [Case.parse(part) for part in text.split(",")]


def save_batches(path: Path, chosen: Sequence[dict[str, np.ndarray]]) -> str:
    """Writes batches in the form that the engines read."""
    np.savez(path, **{f"{name}_{i}": value for i, batch in enumerate(chosen) for name, value in batch.items()})
    return str(path)


OPTIONS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "engines": ("specs", parse_specs),
    "model": ("model", str),
    "pattern": ("pattern", models.parse_pattern),
    "shapes": ("shapes", parse_shapes),
}


def run(
    specs: Sequence[str] = (OURS, "torch-int8", REFERENCE),
    shapes: Sequence[Batches] = tuple(parse_shapes(SHAPES)),
    model: str = "bert-base",
    threads: int = 2,
    rounds: int = ROUNDS,
    seconds: float = 0.25,
    python: Python = None,
    pattern: str = "dense",
    kind: str = "encoder",
    axis: str = AXIS,
    report: Callable[[str], None] = lambda text: None,
    tick: Callable[[str, int, int], None] | None = None,
) -> Run:
    """Measures engines on shapes; see the module's head for the method.

    Args:
        specs: engines, see `harness.Spec`.
        shapes: cases, each one interleaved run.
        model: see `models.resolve`; "bert-base-d26" is bert-base with the pattern d26, and dense beside it.
        threads: of every engine and of the probe.
        rounds: turns an engine takes on each shape.
        seconds: of one turn.
        python: the interpreter for the engines' processes, see `harness.interpreter`. Default: this one.
        pattern: of the engines whose spec names none, see `models.parse_pattern`.
        kind, axis: how the rows name the benchmark, and what the shapes are.
        report: called with one line of news at a time.
        tick: called with (what, done, total) as turns complete.

    Returns: rows with metrics latency_ms (of a batch), ratio (how many times faster than each rival bertkern is),
        share_of_peak, time_share (of the time of the same engine where it computes all, see `opening.does_all`).
    """
    if model == "bert-base-d26":
        model, pattern = "bert-base", "d26"
        specs = [*specs, *(f"{spec}:dense" for spec in specs if not Spec.parse(spec).pattern)]
    patterns = {spec: models.parse_pattern(made.pattern) for spec, made in spelled(specs, pattern).items()}
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        probe = stack.enter_context(Probe(threads, python))

        def make(**what: Any) -> None:
            probe.ask("make_model", **what)

        whole = models.resolve(model, make, tick)
        variants = {p: models.pruned(whole, p, make) for p in dict.fromkeys(patterns.values())}
        references = {}
        for p, variant in variants.items():
            references[p] = stack.enter_context(Worker(REFERENCE, threads, python))
            open_reference(references[p], f"model/{REFERENCE}", model=str(variant.folder))

        def folder(spec: str) -> dict[str, Any]:
            return {"model": str(variants[patterns[spec]].folder)}

        workers, opened, absent = start(specs, "model", threads, python, stack, folder, report)
        name = whole.name if pattern == "dense" else f"{whole.name}-{pattern}"
        run = Run(f"{kind}-{name}-{threads}t", peak.cpu_model(), peak.isa(), threads, absent=absent)
        run.facts = {"model": name, "rounds": rounds, "seconds": seconds}
        run.facts["engines"] = {spec: said["notes"] for spec, said in opened.items()}

        for case in shapes:
            if case.tokens > whole.longest:
                report(f"{case}: left out, {whole.name} takes at most {whole.longest} tokens")
                continue
            batches = case.batches(whole.vocab)
            inputs = save_batches(scratch / "inputs.npz", batches)
            expected = {p: str(scratch / f"{p}-expected.npz") for p in variants}
            for p, reference in references.items():
                reference.ask("prepare", inputs=inputs)
                reference.ask("save", path=expected[p])
            ready, agreement = verified(
                workers, case, lambda _, i=inputs: {"inputs": i}, lambda s, e=expected: e[patterns[s]], report
            )
            if not ready:
                continue
            progress = counted(tick, rounds * len(ready), f"{case} {{}}".format)
            peaks = [probe.peak()]
            samples = take_turns(ready, rounds, seconds, probe.quiet, progress=progress)
            peaks.append(probe.peak())
            for s in samples.values():
                s.ms = [ms / len(batches) for ms in s.ms]
            x, used = (axis, str(case)), {spec: variants[patterns[spec]] for spec in samples}
            best = max((p for p in peaks if p), default=None)
            _record(run, kind, x, used, case, len(batches), samples, agreement, opened, best)
            for slow, fast in rivals(samples, pattern):
                run.add(kind, f"{slow} / {fast}", "ratio", x, ratio(samples[slow], samples[fast]))
            _record_time_share(run, kind, x, used, case, samples, pattern)
        return run


def _record(
    run: Run,
    kind: str,
    x: tuple[str, str],
    used: dict[str, models.Model],
    case: Batches,
    batches: int,
    samples: dict[str, Samples],
    agreement: dict[str, dict[str, float]],
    opened: dict[str, dict[str, Any]],
    best: float | None,
) -> None:
    for spec, s in samples.items():
        macs = used[spec].macs_per_token * used[spec].kept * int(case.lengths().sum()) / batches
        config = {
            "model": used[spec].name,
            "padding": round(1.0 - case.real(), 4),
            "rounds": len(s.ms),
            "accepted": round(s.accepted_share, 2),
            "cosine": round(agreement[spec]["cosine"], 6),
            "sqnr_db": round(agreement[spec]["sqnr_db"], 1),
        }
        versions = opened[spec]["versions"]
        run.add(kind, spec, "latency_ms", x, (s.median, s.p20, s.p80), config, versions)
        if best:
            shares = [macs / (ms * 1e6) / best for ms in (s.median, s.p80, s.p20)]
            config = config | {"peak_gmac_s": round(best, 1)}
            run.add(kind, spec, "share_of_peak", x, tuple(shares), config, versions)


def _record_time_share(
    run: Run,
    kind: str,
    x: tuple[str, str],
    used: dict[str, models.Model],
    case: Batches,
    samples: dict[str, Samples],
    pattern: str,
) -> None:
    """What each engine takes of its own time where it computes all, beside the share of the multiply-adds left."""
    parsed = spelled(samples, pattern)
    for spec, ours in parsed.items():
        twin = next((other for other, theirs in parsed.items() if does_all(theirs, ours)), None)
        if twin:
            kept = used[spec].kept if parsed[twin].pattern != ours.pattern else case.real()
            config = {"model": used[spec].name, "kept": round(kept, 4)}
            run.add(kind, spec, "time_share", x, ratio(samples[spec], samples[twin]), config)
