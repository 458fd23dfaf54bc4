"""Sentences a second of a real encoder behind sentence-transformers, each of its int8 backends beside bertkern's.

    python -m bertkern bench sentences
    python -m bertkern bench sentences --python onnxruntime=PATH --python openvino=PATH

all-MiniLM-L6-v2 embeds the 2,758 sentences of the STS Benchmark's test set by `SentenceTransformer.encode` in batches
of 32, sorted by length as `encode` does; one call is the whole set, tokenizing included. Spearman's correlation with
the human scores stands beside the speed. PATH is an interpreter that has `sentence-transformers[onnx,openvino]` and
`datasets`; sentence-transformers makes the int8 files itself, see engines/sentence_engine.py.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from . import engines, fetch, models, peak
from .demo import FP32_SPEARMAN, spearman
from .harness import Python, Worker, WorkerError, counted, ratio, take_turns
from .opening import REFERENCE, Probe, check, expect_known, open_reference, rivals, start
from .options import count, parse_specs
from .results import Run

ENGINES = tuple(engines.SENTENCES)
AXIS = "sentences a batch"
ROUNDS = 5

OPTIONS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "engines": ("specs", parse_specs),
    "model": ("model", str),
    "batch": ("batch", count("batch")),
    "sentences": ("sentences", count("sentences")),
}


def run(
    specs: Sequence[str] = ENGINES,
    model: str = "minilm",
    batch: int = 32,
    sentences: int | None = None,
    threads: int = 2,
    rounds: int = ROUNDS,
    seconds: float = 0.0,
    python: Python = None,
    report: Callable[[str], None] = lambda text: None,
    tick: Callable[[str, int, int], None] | None = None,
) -> Run:
    """Measures engines of one encoder; arguments as in `encoder.run`.

    Args:
        model: one with a tokenizer; its outputs are pooled by the mean.
        batch: sentences that one call of the model gets.
        sentences: of the test set, for the speed alone; None: all.

    Returns: rows with metrics spearman, latency_ms (of the whole set), sentences_s and ratio.
    """
    expect_known(specs, "sentence")
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        probe = stack.enter_context(Probe(threads, python))
        whole = models.resolve(model, lambda **what: probe.ask("make_model", **what), tick)
        pairs = fetch.sts_pairs(fetch.fetch(fetch.STSB, tick))
        lines = [first for first, _, _ in pairs] + [second for _, second, _ in pairs]
        scores = np.array([score for _, _, score in pairs])
        options = {"model": str(whole.folder)}
        workers, opened, absent = start(specs, "sentence", threads, python, stack, lambda _: options, report)
        run = Run(f"sentences-{whole.name}-{threads}t", peak.cpu_model(), peak.isa(), threads, absent=absent)
        run.facts = {"model": whole.name, "pairs": len(pairs), "rounds": rounds, "batch": batch}

        everything, expected = _write(scratch / "all.json", lines), str(scratch / "expected.npz")
        with Worker(REFERENCE, threads, python) as reference:
            open_reference(reference, f"sentence/{REFERENCE}", **options)
            reference.ask("prepare", path=everything, batch=batch)
            reference.ask("save", path=expected)
        for done, worker in enumerate(list(workers)):
            if tick:
                tick(f"{worker.spec}: {len(lines):,} sentences", done, len(workers))
            saved = str(scratch / f"{worker.spec}.npz")
            try:
                worker.ask("prepare", path=everything, batch=batch)
                worker.ask("save", path=saved)
                with np.load(expected) as reference_, np.load(saved) as got:
                    agreement = check(worker.spec, engines.agreement(dict(reference_), dict(got)))
                    vectors = got["vectors"]
            except WorkerError as error:
                report(str(error))
                absent[worker.spec] = f"failed: {error}"
                workers.remove(worker)
                continue
            cosines = (vectors[: len(pairs)] * vectors[len(pairs) :]).sum(1)
            value = spearman(cosines, scores)
            if worker.spec == REFERENCE and model == "minilm" and abs(value - FP32_SPEARMAN) > 5e-5:
                report(f"{REFERENCE}: expected a Spearman correlation of {FP32_SPEARMAN}. Got {value:.5f}.")
            config = {"pairs": len(pairs), "sqnr_db": round(agreement["sqnr_db"], 1), **opened[worker.spec]["notes"]}
            versions = opened[worker.spec]["versions"]
            run.add("sentences", worker.spec, "spearman", ("test set", "STS-B"), (value,) * 3, config, versions)
        if not workers:
            return run

        chosen = lines if sentences is None else lines[:: max(1, len(lines) // sentences)][:sentences]
        timed = _write(scratch / "timed.json", chosen)
        for worker in workers:
            worker.ask("prepare", path=timed, batch=batch)
        progress = counted(tick, rounds * len(workers), f"{len(chosen):,} sentences {{}}".format)
        samples = take_turns(workers, rounds, seconds, probe.quiet, progress=progress)
        x = (AXIS, str(batch))
        for spec, s in samples.items():
            config = {"accepted": round(s.accepted_share, 2), "rounds": rounds, "sentences": len(chosen)}
            versions = opened[spec]["versions"]
            run.add("sentences", spec, "latency_ms", x, (s.median, s.p20, s.p80), config, versions)
            rates = tuple(len(chosen) / ms * 1e3 for ms in (s.median, s.p80, s.p20))
            run.add("sentences", spec, "sentences_s", x, rates, config, versions)
        for slow, fast in rivals(samples):
            run.add("sentences", f"{slow} / {fast}", "ratio", x, ratio(samples[slow], samples[fast]))
        return run


def _write(path: Path, lines: Sequence[str]) -> str:
    path.write_text(json.dumps(list(lines)))
    return str(path)
