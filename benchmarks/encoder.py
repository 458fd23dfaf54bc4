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
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import engines, models, peak
from .harness import Python, Samples, Spec, Worker, WorkerError, ratio, take_turns
from .results import Run

SHAPES = "1x16,1x32,1x128,8x128,1x384,3x77"
REFERENCE = "torch-fp32"
OURS = "bertkern-int8"
AXIS = "batch x tokens"
ROUNDS = 15


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

    def inputs(self, vocab: int) -> dict[str, np.ndarray]:
        """Random token ids, attention mask, token types; int64 [batch, tokens]."""
        rng = np.random.default_rng(self.batch * 1000 + self.tokens)
        ids = rng.integers(min(1000, vocab - 1), vocab, (self.batch, self.tokens))
        mask = (np.arange(self.tokens)[None] < self.lengths()[:, None]).astype(np.int64)
        return {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def parse_shapes(text: str) -> list[Case]:
    """`1x32,8x128:0.4` as cases."""
    return [Case.parse(part) for part in text.split(",")]


OPTIONS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "engines": ("specs", lambda text: text.split(",")),
    "pattern": ("pattern", models.parse_pattern),
    "shapes": ("shapes", parse_shapes),
}


def start(
    specs: Sequence[str],
    family: str,
    threads: int,
    python: Python,
    stack: ExitStack,
    options: Callable[[str], dict[str, Any]] = lambda spec: {},
) -> tuple[list[Worker], dict[str, dict[str, Any]], dict[str, str]]:
    """Starts one worker an engine and opens it with its options.

    Returns: workers that live until `stack` closes, what each said at opening, and the absent ones with the reason.
    Raises ValueError for a name that does not exist.
    """
    workers, opened, absent = [], {}, {}
    for spec in specs:
        name = Spec.parse(spec).name
        if f"{family}/{name}" not in engines.ALL:
            known = [k.partition("/")[2] for k in engines.ALL if k.startswith(family + "/")]
            raise ValueError(f"engine: expected one of {', '.join(known)}. Got {name!r}.")
        worker = stack.enter_context(Worker(spec, threads, python))
        try:
            reply = worker.ask("open", engine=f"{family}/{name}", threads=threads, **options(spec))
        except WorkerError as error:
            reply = {"failed": f"failed: {error}"}
        if "versions" in reply:
            workers.append(worker)
            opened[spec] = reply
        else:
            absent[spec] = f"needs {reply['absent']}" if "absent" in reply else reply["failed"]
            worker.close()
    return workers, opened, absent


def precision(spec: str) -> str:
    """fp32, bf16 or int8, of an engine or a linear layer's provider; one name has one precision."""
    name = Spec.parse(spec).name
    return next(table[name].precision for table in engines.FAMILIES.values() if name in table)


def check(spec: str, got: dict[str, float]) -> dict[str, float]:
    """Returns what `engines.agreement` found, or raises WorkerError where the engine's outputs are wrong."""
    cosine, sqnr = engines.COSINE_FLOOR[precision(spec)], engines.SQNR_FLOOR_DB[precision(spec)]
    if got["sqnr_db"] < sqnr or got["cosine"] < cosine:
        raise WorkerError(
            f"{spec}: outputs differ from {REFERENCE}: expected cosine >= {cosine} and SQNR >= {sqnr:g} dB. "
            f"Got {got['cosine']:.5f} and {got['sqnr_db']:.1f} dB."
        )
    return got


def rivals(specs: Iterable[str], pattern: str = "dense") -> list[tuple[str, str]]:
    """(rival, bertkern) pairs worth a ratio: under one cap; float bertkern only beside its own precision.

    On a pruned model, rivals on the same one and on the whole one count, and so does bertkern itself on the whole one.

    Args:
        pattern: of specs that name none.
    """
    parsed = {spec: Spec.parse(spec) for spec in specs}
    parsed = {spec: made._replace(pattern=made.pattern or pattern) for spec, made in parsed.items()}
    pairs = []
    for fast, ours in parsed.items():
        for slow, theirs in parsed.items() if ours.name.startswith("bertkern") else ():
            twin = theirs == ours._replace(pattern="dense") != ours
            rival = not theirs.name.startswith("bertkern") and precision(fast) in ("int8", precision(slow))
            if twin or (rival and theirs.isa == ours.isa and theirs.pattern in ("dense", ours.pattern)):
                pairs.append((slow, fast))
    return pairs


def run(
    specs: Sequence[str] = (OURS, "torch-int8", REFERENCE),
    shapes: Sequence[Case] = tuple(parse_shapes(SHAPES)),
    model: str = "bert-base",
    threads: int = 2,
    rounds: int = ROUNDS,
    seconds: float = 0.25,
    python: Python = None,
    pattern: str = "dense",
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
        report: called with one line of news at a time.
        tick: called with (what, done, total) as turns complete.

    Returns: rows with metrics latency_ms, ratio (how many times faster than each rival bertkern is), share_of_peak,
        time_share (of the same engine's time on the whole model).
    """
    if model == "bert-base-d26":
        model, pattern = "bert-base", "d26"
        specs = [*specs, *(f"{spec}:dense" for spec in specs if not Spec.parse(spec).pattern)]
    patterns = {spec: models.parse_pattern(Spec.parse(spec).pattern or pattern) for spec in specs}
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        probe_worker = stack.enter_context(Worker("probe", threads, python))

        def make(**what: Any) -> None:
            probe_worker.ask("make_model", **what)

        whole = models.resolve(model, make, tick)
        variants = {p: models.pruned(whole, p, make) for p in dict.fromkeys(patterns.values())}
        references = {}
        for p, variant in variants.items():
            references[p] = stack.enter_context(Worker(REFERENCE, threads, python))
            opened = references[p].ask("open", engine=f"model/{REFERENCE}", model=str(variant.folder), threads=threads)
            if "absent" in opened:
                raise WorkerError(f"{REFERENCE}: the reference of every benchmark needs {opened['absent']}.")
        workers, opened, absent = start(
            specs, "model", threads, python, stack, lambda spec: {"model": str(variants[patterns[spec]].folder)}
        )
        for spec, reason in absent.items():
            report(f"{spec}: absent, {reason}" if reason.startswith("needs") else reason)
        name = whole.name if pattern == "dense" else f"{whole.name}-{pattern}"
        run = Run(f"encoder-{name}-{threads}t", peak.cpu_model(), peak.isa(), threads, absent=absent)
        run.facts = {"model": name, "rounds": rounds, "seconds": seconds}
        run.facts["engines"] = {spec: said["notes"] for spec, said in opened.items()}

        def probe(_: Worker) -> float:
            return probe_worker.ask("quiet", threads=threads)["quiet"]

        def yardstick() -> float | None:
            return probe_worker.ask("peak", threads=threads)["peak"]

        for case in shapes:
            if case.tokens > whole.longest:
                report(f"{case}: left out, {whole.name} takes at most {whole.longest} tokens")
                continue
            inputs = str(scratch / f"{case}.npz")
            np.savez(inputs, **{f"{name}_0": value for name, value in case.inputs(whole.vocab).items()})
            expected = {p: str(scratch / f"{case}-{p}-expected.npz") for p in variants}
            for p, reference in references.items():
                reference.ask("prepare", inputs=inputs)
                reference.ask("save", path=expected[p])
            ready, agreement = [], {}
            for worker in workers:
                try:
                    worker.ask("prepare", inputs=inputs)
                    got = worker.ask("compare", path=expected[patterns[worker.spec]])
                    agreement[worker.spec] = check(worker.spec, got)
                    ready.append(worker)
                except WorkerError as error:
                    report(f"{case}: left out: {error}")
            if not ready:
                continue
            done, total = [0], rounds * len(ready)

            def progress(spec: str, case: Case = case, done: list[int] = done, total: int = total) -> None:
                done[0] += 1
                if tick:
                    tick(f"{case} {spec}", done[0], total)

            peaks = [yardstick()]
            samples = take_turns(ready, rounds, seconds, probe, progress=progress)
            peaks.append(yardstick())
            used = {spec: variants[patterns[spec]] for spec in samples}
            _record(run, used, case, samples, agreement, opened, max((p for p in peaks if p), default=None))
            for slow, fast in rivals(samples, pattern):
                run.add("encoder", f"{slow} / {fast}", "ratio", (AXIS, str(case)), ratio(samples[slow], samples[fast]))
            _record_time_share(run, used, case, samples)
        return run


def _record(
    run: Run,
    used: dict[str, models.Model],
    case: Case,
    samples: dict[str, Samples],
    agreement: dict[str, dict[str, float]],
    opened: dict[str, dict[str, Any]],
    best: float | None,
) -> None:
    x = (AXIS, str(case))
    for spec, s in samples.items():
        macs = used[spec].macs_per_token * used[spec].kept * int(case.lengths().sum())
        config = {
            "model": used[spec].name,
            "padding": case.padding,
            "rounds": len(s.ms),
            "accepted": round(s.accepted_share, 2),
            "cosine": round(agreement[spec]["cosine"], 6),
            "sqnr_db": round(agreement[spec]["sqnr_db"], 1),
        }
        versions = opened[spec]["versions"]
        run.add("encoder", spec, "latency_ms", x, (s.median, s.p20, s.p80), config, versions)
        if best:
            shares = [macs / (ms * 1e6) / best for ms in (s.median, s.p80, s.p20)]
            config = config | {"peak_gmac_s": round(best, 1)}
            run.add("encoder", spec, "share_of_peak", x, tuple(shares), config, versions)


def _record_time_share(run: Run, used: dict[str, models.Model], case: Case, samples: dict[str, Samples]) -> None:
    """What each engine takes on a pruned model of its own time on the whole one, beside the multiply-adds kept."""
    engine = {spec: Spec.parse(spec)[:2] for spec in samples}
    for spec, model in used.items():
        twin = next((other for other in samples if engine[other] == engine[spec] and used[other].kept == 1.0), None)
        if twin and model.kept < 1.0:
            values = ratio(samples[spec], samples[twin])
            config = {"model": model.name, "kept": round(model.kept, 4)}
            run.add("encoder", spec, "time_share", (AXIS, str(case)), values, config)
