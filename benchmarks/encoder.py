"""A whole encoder, end to end: latency of any engines on the same inputs, interleaved.

    python -m bertkern bench encoder --threads 2 --shapes 1x32,1x128,8x128,1x384
    python -m bertkern bench encoder --engines bertkern-int8@avx2,torch-fp32@avx2 --shapes 1x128

The share of the peak counts the multiplications of the linear layers over real tokens, nothing else.
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
from .harness import Samples, Worker, WorkerError, ratio, take_turns
from .results import Run

SHAPES = "1x16,1x32,1x128,8x128,1x384,3x77"
REFERENCE = "torch-fp32"
OURS = "bertkern-int8"
AXIS = "batch x tokens"


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


def start(
    specs: Sequence[str], family: str, threads: int, python: str | None, stack: ExitStack, **options: Any
) -> tuple[list[Worker], dict[str, dict[str, Any]], dict[str, str]]:
    """Starts one worker an engine and opens it.

    Returns: workers that live until `stack` closes, what each said at opening, and the absent ones with the reason.
    Raises ValueError for a name that does not exist.
    """
    workers, opened, absent = [], {}, {}
    for spec in specs:
        name = spec.partition("@")[0]
        if f"{family}/{name}" not in engines.ALL:
            known = [k.partition("/")[2] for k in engines.ALL if k.startswith(family + "/")]
            raise ValueError(f"engine: expected one of {', '.join(known)}. Got {name!r}.")
        worker = stack.enter_context(Worker(spec, threads, python))
        try:
            reply = worker.ask("open", engine=f"{family}/{name}", threads=threads, **options)
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
    """fp32, bf16 or int8, of an engine or a linear layer's provider."""
    name = spec.partition("@")[0]
    return (engines.MODELS.get(name) or engines.LINEARS[name]).precision


def check(spec: str, got: dict[str, float]) -> dict[str, float]:
    """Returns what `engines.agreement` found, or raises WorkerError where the engine's outputs are wrong."""
    cosine, sqnr = engines.COSINE_FLOOR[precision(spec)], engines.SQNR_FLOOR_DB[precision(spec)]
    if got["sqnr_db"] < sqnr or got["cosine"] < cosine:
        raise WorkerError(
            f"{spec}: outputs differ from {REFERENCE}: expected cosine >= {cosine} and SQNR >= {sqnr:g} dB. "
            f"Got {got['cosine']:.5f} and {got['sqnr_db']:.1f} dB."
        )
    return got


def rivals(specs: Iterable[str]) -> list[tuple[str, str]]:
    """(rival, bertkern) pairs worth a ratio: under one cap; float bertkern only beside its own precision."""
    specs = list(specs)
    pairs = []
    for fast in (spec for spec in specs if spec.startswith("bertkern")):
        for slow in (spec for spec in specs if not spec.startswith("bertkern")):
            same_cap = fast.partition("@")[2] == slow.partition("@")[2]
            if same_cap and precision(fast) in ("int8", precision(slow)):
                pairs.append((slow, fast))
    return pairs


def run(
    specs: Sequence[str] = (OURS, "torch-int8", REFERENCE),
    shapes: Sequence[Case] = tuple(parse_shapes(SHAPES)),
    model: str = "bert-base",
    threads: int = 2,
    rounds: int = 15,
    seconds: float = 0.25,
    python: str | None = None,
    report: Callable[[str], None] = lambda text: None,
    tick: Callable[[str, int, int], None] | None = None,
) -> Run:
    """Measures engines on shapes; see the module's head for the method.

    Args:
        specs: engine names, `NAME@ISA` to cap one.
        shapes: cases, each one interleaved run.
        model: see `models.resolve`.
        threads: of every engine and of the probe.
        rounds: turns an engine takes on each shape.
        seconds: of one turn.
        python: the interpreter for the engines' processes. Default: this one.
        report: called with one line of news at a time.
        tick: called with (what, done, total) as turns complete.

    Returns: rows with metrics latency_ms, ratio (how many times faster than each rival bertkern is), share_of_peak.
    """
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        probe_worker = stack.enter_context(Worker("probe", threads, python))
        found = models.resolve(model, lambda **make: probe_worker.ask("make_model", **make), tick)
        reference = stack.enter_context(Worker(REFERENCE, threads, python))
        opened = reference.ask("open", engine=f"model/{REFERENCE}", model=str(found.folder), threads=threads)
        if "absent" in opened:
            raise WorkerError(f"{REFERENCE}: the reference of every benchmark needs {opened['absent']}.")
        workers, opened, absent = start(specs, "model", threads, python, stack, model=str(found.folder))
        for spec, reason in absent.items():
            report(f"{spec}: absent, {reason}" if reason.startswith("needs") else reason)
        run = Run(f"encoder-{found.name}-{threads}t", peak.cpu_model(), peak.isa(), threads, absent=absent)
        run.facts = {"model": found.name, "rounds": rounds, "seconds": seconds}
        run.facts["engines"] = {spec: said["notes"] for spec, said in opened.items()}

        def probe(_: Worker) -> float:
            return probe_worker.ask("quiet", threads=threads)["quiet"]

        def yardstick() -> float | None:
            return probe_worker.ask("peak", threads=threads)["peak"]

        for case in shapes:
            if case.tokens > found.longest:
                report(f"{case}: left out, {found.name} takes at most {found.longest} tokens")
                continue
            inputs, expected = str(scratch / f"{case}.npz"), str(scratch / f"{case}-expected.npz")
            np.savez(inputs, **{f"{name}_0": value for name, value in case.inputs(found.vocab).items()})
            reference.ask("prepare", inputs=inputs)
            reference.ask("save", path=expected)
            ready, agreement = [], {}
            for worker in workers:
                try:
                    worker.ask("prepare", inputs=inputs)
                    agreement[worker.spec] = check(worker.spec, worker.ask("compare", path=expected))
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
            _record(run, found, case, samples, agreement, opened, max((p for p in peaks if p), default=None))
        return run


def _record(
    run: Run,
    model: models.Model,
    case: Case,
    samples: dict[str, Samples],
    agreement: dict[str, dict[str, float]],
    opened: dict[str, dict[str, Any]],
    best: float | None,
) -> None:
    x = (AXIS, str(case))
    macs = model.macs_per_token * int(case.lengths().sum())
    for spec, s in samples.items():
        config = {
            "model": model.name,
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
    for slow, fast in rivals(samples):
        run.add("encoder", f"{slow} / {fast}", "ratio", x, ratio(samples[slow], samples[fast]))
