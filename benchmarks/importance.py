"""What head importance costs: `bertkern.head_importance` beside a plain forward and backward pass of the same model.

    python -m bertkern bench importance
    python -m bertkern bench importance --sentences 1000 --rounds 1

The plain pass computes the loss and the gradients of all weights, as a training step does; the scores need those of the
heads' contexts alone. Both go over the same sentences in the same batches. The scores of a few sentences are compared
with the definition first: a factor on each head, one sentence at a time, in float64. The cost asked for is at most 2.5.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from . import models, peak
from .harness import Python, Worker, counted, ratio, take_turns
from .opening import Probe, check, open_reference, start
from .options import count
from .results import Run

IMPORTANCE, BACKWARD = "bertkern-importance", "torch-backward"
AXIS = "sentences x tokens"
ROUNDS = 3
ASKED = 2.5
CHECKED = 3  # sentences

OPTIONS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "model": ("model", str),
    "sentences": ("sentences", count("sentences")),
    "tokens": ("tokens", count("tokens")),
    "batch": ("batch", count("batch")),
}


def run(
    model: str = "bert-base",
    sentences: int = 64,
    tokens: int = 128,
    batch: int = 8,
    threads: int = 2,
    rounds: int = ROUNDS,
    seconds: float = 0.0,
    python: Python = None,
    report: Callable[[str], None] = lambda text: None,
    tick: Callable[[str, int, int], None] | None = None,
) -> Run:
    """Measures both; arguments as in `encoder.run`.

    Args:
        sentences: random ones, with random labels.
        tokens: of each.
        batch: sentences in a batch.

    Returns: rows with metrics latency_ms (all sentences) and cost (of the scores, in forward and backward passes).

    Raises RuntimeError where one of the two is absent, `harness.WorkerError` where the scores are wrong.
    """
    specs: Sequence[str] = (IMPORTANCE, BACKWARD)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        probe = stack.enter_context(Probe(threads, python))
        whole = models.resolve(model, lambda **what: probe.ask("make_model", **what), tick)
        if tokens > whole.longest:
            raise ValueError(f"tokens: expected at most {whole.longest}. Got {tokens}.")
        options = {"model": str(whole.folder)}
        workers, opened, absent = start(specs, "gradient", threads, python, stack, lambda _: options, report)
        if absent:
            raise RuntimeError(f"bench importance: {'; '.join(f'{name}: {why}' for name, why in absent.items())}.")
        run = Run(f"importance-{whole.name}-{threads}t", peak.cpu_model(), peak.isa(), threads)
        run.facts = {"model": whole.name, "rounds": rounds, "batch": batch, "reference": "float64"}
        few = {"sentences": min(CHECKED, sentences), "tokens": tokens, "batch": batch}
        expected = str(scratch / "expected.npz")
        if tick:
            tick("reference", 0, 0)
        with Worker("reference", threads, python) as reference:
            open_reference(reference, "gradient/reference", **options)
            reference.ask("prepare", **few)
            reference.ask("save", path=expected)
        ours = workers[0]
        ours.ask("prepare", **few)
        agreement = check(IMPORTANCE, ours.ask("compare", path=expected))

        for worker in workers:
            worker.ask("prepare", sentences=sentences, tokens=tokens, batch=batch)
        progress = counted(tick, rounds * len(workers), f"{sentences} sentences {{}}".format)
        samples = take_turns(workers, rounds, seconds, probe.quiet, progress=progress)
        x = (AXIS, f"{sentences}x{tokens}")
        for spec, s in samples.items():
            config = {"batch": batch, "rounds": rounds, "accepted": round(s.accepted_share, 2)}
            if spec == IMPORTANCE:
                config["sqnr_db"] = round(agreement["sqnr_db"], 1)
            values = (s.median, s.p20, s.p80)
            run.add("importance", spec, "latency_ms", x, values, config, opened[spec]["versions"])
        values = ratio(samples[IMPORTANCE], samples[BACKWARD])
        run.add("importance", IMPORTANCE, "cost", x, values, {"asked": ASKED})
        return run
