"""The demo: a real sentence encoder, quantized, on a real test set.

    python -m bertkern demo

all-MiniLM-L6-v2 embeds the 2,758 sentences of the STS Benchmark test set, in fp32 and in int8; Spearman's correlation
of the cosines with human scores tells what int8 costs, and sentences a second what it gains. Needs transformers, no
sentence-transformers, no hub.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from . import engines, fetch, peak
from .encoder import save_batches
from .harness import Python, WorkerError, counted, ratio, take_turns
from .opening import OURS, REFERENCE, Probe, check, start
from .results import Run

ENGINES = (REFERENCE, "torch-int8", OURS)
FP32_SPEARMAN = 0.8203  # what this model has on this test set; anything else means that something is not as pinned
BATCH = 32
AXIS = "sentences a call"
LONGEST = 256  # tokens; what the model's own sentence-transformers configuration truncates to


def tokenize(sentences: Sequence[str], folder: Path) -> list[list[int]]:
    """Token ids of each sentence by the tokenizer.json in `folder`, [CLS] and [SEP] among them."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(LONGEST)
    return [encoding.ids for encoding in tokenizer.encode_batch(list(sentences))]


def padded(rows: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    """The model's inputs for one batch, as long as its longest sentence."""
    ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
    mask = np.zeros_like(ids)
    for row, (place, seen) in zip(rows, zip(ids, mask, strict=True), strict=True):
        place[: len(row)], seen[: len(row)] = row, 1
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def batches(sentences: Sequence[str], folder: Path, size: int) -> tuple[list[dict[str, np.ndarray]], np.ndarray]:
    """Tokenizes, sorts by length, and pads each batch to its longest sentence.

    Returns: the batches, and the order: `order[i]` is the sentence that stands at place i of the batches.
    """
    tokens = tokenize(sentences, folder)
    order = np.argsort([len(t) for t in tokens], kind="stable")
    starts = range(0, len(order), size)
    return [padded([tokens[i] for i in order[at : at + size]]) for at in starts], order


def embeddings(saved: str, order: np.ndarray) -> np.ndarray:
    """Mean over real tokens, of unit length; back in the order of the sentences. fp32 [sentences, hidden]."""
    rows = []
    with np.load(saved) as arrays:
        for i in range(sum(name.startswith("mask_") for name in arrays)):
            mask = arrays[f"mask_hidden_{i}"][..., None].astype(np.float32)
            rows.append((arrays[f"hidden_{i}"] * mask).sum(1) / mask.sum(1))
    pooled = np.concatenate(rows)
    out = np.empty_like(pooled)
    out[order] = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
    return out


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation; equal values share the mean of their ranks."""

    def ranks(values: np.ndarray) -> np.ndarray:
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        last = np.cumsum(counts)
        return (last - (counts - 1) / 2)[inverse]

    return float(np.corrcoef(ranks(np.asarray(a)), ranks(np.asarray(b)))[0, 1])


def run(
    specs: Sequence[str] = ENGINES,
    threads: int = 2,
    rounds: int = 7,
    seconds: float = 0.2,
    python: Python = None,
    report: Callable[[str], None] = lambda text: None,
    tick: Callable[[str, int, int], None] | None = None,
) -> Run:
    """Runs the demo; arguments as in `encoder.run`.

    Returns: rows with metrics spearman, size_mb, sentences_s (batches of 32, and one by one) and ratio;
    `facts["report"]` tells what bertkern swapped.
    """
    folder = fetch.fetch(fetch.MINILM, tick)
    pairs = fetch.sts_pairs(fetch.fetch(fetch.STSB, tick))
    sentences = [first for first, _, _ in pairs] + [second for _, second, _ in pairs]
    scores = np.array([score for _, _, score in pairs])
    grouped, order = batches(sentences, folder, BATCH)

    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        probe = stack.enter_context(Probe(threads, python))
        options = {"model": str(folder)}
        workers, opened, absent = start(specs, "model", threads, python, stack, lambda _: options, report)
        run = Run(f"demo-minilm-{threads}t", peak.cpu_model(), peak.isa(), threads, absent=absent)
        run.facts = {"model": "all-MiniLM-L6-v2", "pairs": len(pairs), "rounds": rounds}

        everything, first = save_batches(scratch / "all.npz", grouped), None
        for done, worker in enumerate(list(workers)):
            if tick:
                tick(f"{worker.spec}: {len(sentences):,} sentences", done, len(workers))
            saved = str(scratch / f"{worker.spec}.npz")
            try:
                worker.ask("prepare", inputs=everything)
                worker.ask("save", path=saved)
                first = first or saved  # the reference stands first
                with np.load(first) as expected, np.load(saved) as got:
                    agreement = check(worker.spec, engines.agreement(dict(expected), dict(got)))
            except WorkerError as error:
                report(str(error))
                absent[worker.spec] = f"failed: {error}"
                workers.remove(worker)
                continue
            vectors = embeddings(saved, order)
            cosines = (vectors[: len(pairs)] * vectors[len(pairs) :]).sum(1)
            value, versions = spearman(cosines, scores), opened[worker.spec]["versions"]
            if worker.spec == REFERENCE and abs(value - FP32_SPEARMAN) > 5e-5:
                report(f"{REFERENCE}: expected a Spearman correlation of {FP32_SPEARMAN}. Got {value:.5f}.")
            config = {"pairs": len(pairs), "sqnr_db": round(agreement["sqnr_db"], 1)}
            run.add("demo", worker.spec, "spearman", ("test set", "STS-B"), (value,) * 3, config, versions)
            told = worker.ask("describe")
            if told["size_mb"]:
                run.add("demo", worker.spec, "size_mb", ("file", "weights"), (told["size_mb"],) * 3, {}, versions)
            if told["report"]:
                run.facts["report"] = told["report"]
        if not workers:
            return run

        # Speed on a sample that keeps the mix of lengths: every tenth batch, and single sentences spread over all.
        singles, _ = batches(sentences[:: len(sentences) // 24], folder, 1)
        for name, chosen, size in (("1", singles, 1), (str(BATCH), grouped[5::10], BATCH)):
            inputs = save_batches(scratch / f"speed-{name}.npz", chosen)
            for worker in workers:
                worker.ask("prepare", inputs=inputs)
            progress = counted(tick, rounds * len(workers), f"{{}}, {name} at a time".format)
            samples = take_turns(workers, rounds, seconds, probe.quiet, progress=progress)
            count = sum(len(batch["input_ids"]) for batch in chosen)
            for spec, s in samples.items():
                rates = tuple(count / ms * 1e3 for ms in (s.median, s.p80, s.p20))
                config = {"accepted": round(s.accepted_share, 2), "rounds": rounds, "sentences": count, "batch": size}
                run.add("demo", spec, "sentences_s", (AXIS, name), rates, config, opened[spec]["versions"])
                if OURS in samples and spec != OURS:
                    run.add("demo", f"{spec} / {OURS}", "ratio", (AXIS, name), ratio(s, samples[OURS]))
    return run
