"""What the sensitivity of all layers costs: `bertkern.hessian_sensitivity` with its defaults.

    python -m bertkern bench hessian
    python -m bertkern bench hessian --sentences 32 --tokens 32

The model has a random head of two classes, the sentences and their labels are random: ten samples of a tenth of them.
The magnitude of the last layer's eigenvalue over a few sentences is compared with power iteration in float64 first.
What BERT-base may take on 128 sentences of 64 tokens is 15 minutes on two cores.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from . import models, peak
from .harness import Python, Worker, WorkerError, counted, take_turns
from .opening import Probe, open_reference, start
from .options import count
from .results import Run

HESSIAN, REFERENCE = "bertkern-hessian", "gradient/hessian-reference"
AXIS = "sentences x tokens"
ROUNDS = 1
ASKED = 15.0  # minutes
CHECKED = 3  # sentences
WRONG_BY = 0.05  # of the eigenvalue

OPTIONS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "model": ("model", str),
    "sentences": ("sentences", count("sentences")),
    "tokens": ("tokens", count("tokens")),
}


def run(
    model: str = "bert-base",
    sentences: int = 128,
    tokens: int = 64,
    threads: int = 2,
    rounds: int = ROUNDS,
    python: Python = None,
    report: Callable[[str], None] = lambda text: None,
    tick: Callable[[str, int, int], None] | None = None,
) -> Run:
    """Measures it; arguments as in `encoder.run`.

    Args:
        sentences: random ones, with random labels.
        tokens: of each.

    Returns: rows with metrics latency_ms and minutes; the table of what was found stands in the facts.

    Raises RuntimeError where the engine is absent, `harness.WorkerError` where the eigenvalue is wrong.
    """
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        probe = stack.enter_context(Probe(threads, python))
        whole = models.resolve(model, lambda **what: probe.ask("make_model", **what), tick)
        if tokens > whole.longest:
            raise ValueError(f"tokens: expected at most {whole.longest}. Got {tokens}.")
        options = {"model": str(whole.folder)}
        workers, opened, absent = start([HESSIAN], "gradient", threads, python, stack, lambda _: options, report)
        if absent:
            raise RuntimeError(f"bench hessian: {'; '.join(f'{name}: {why}' for name, why in absent.items())}.")
        (ours,) = workers
        run = Run(f"hessian-{whole.name}-{threads}t", peak.cpu_model(), peak.isa(), threads)
        few = {"sentences": min(CHECKED, sentences), "tokens": tokens, "batch": CHECKED, "last": True}
        expected = str(scratch / "expected.npz")
        if tick:
            tick("reference", 0, 0)
        with Worker("reference", threads, python) as reference:
            open_reference(reference, REFERENCE, **options)
            reference.ask("prepare", **few)
            reference.ask("save", path=expected)
        ours.ask("prepare", **few)
        agreement = ours.ask("compare", path=expected)["sqnr_db"]
        if agreement < -20 * math.log10(WRONG_BY):
            raise WorkerError(
                f"{HESSIAN}: expected an eigenvalue within {WRONG_BY:.0%} of float64's. Got {agreement:.1f} dB of SQNR."
            )

        ours.ask("prepare", sentences=sentences, tokens=tokens, batch=sentences)
        progress = counted(tick, rounds, f"{sentences} sentences {{}}".format)
        samples = take_turns(workers, rounds, 0.0, probe.quiet, progress=progress)[HESSIAN]
        found = ours.ask("describe")["report"]
        run.facts = {"model": whole.name, "rounds": rounds, "reference": "float64", "found": found}
        x = (AXIS, f"{sentences}x{tokens}")
        values = (samples.median, samples.p20, samples.p80)
        config = {"rounds": rounds, "accepted": round(samples.accepted_share, 2), "sqnr_db": round(agreement, 1)}
        run.add("hessian", HESSIAN, "latency_ms", x, values, config, opened[HESSIAN]["versions"])
        minutes = tuple(value / 60e3 for value in values)
        run.add("hessian", HESSIAN, "minutes", x, minutes, {"asked": ASKED})
        report(found)
        return run
