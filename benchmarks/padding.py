"""Real sentences in batches padded to the longest: what the padding costs, end to end.

    python -m bertkern bench padding
    python -m bertkern bench padding --texts stsb --batch 32 --batches 8 --model minilm

A batch has as many sentences as come one after another in a shuffled test set, and is as long as its longest. bertkern
computes real tokens alone; NAME-padded is the same model with `keep_padding=True`, which computes every position. Its
time_share should be near the share of positions that are tokens; at most 1.15 times that share is asked for.

stsb: the sentences of the STS Benchmark's test set; rotten-tomatoes: film reviews. Token counts are those of the
model's own tokenizer.json, else of BERT's uncased one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import encoder, fetch, q8bert
from .demo import padded, tokenize
from .harness import Python
from .opening import REFERENCE, expect_known
from .options import count, parse_names, parse_specs
from .results import Run

ENGINES = ("bertkern-int8", "bertkern-int8-padded", "bertkern-fp32", "bertkern-fp32-padded", REFERENCE)
AXIS = "texts, batch"
ROUNDS = 7
ASKED = 1.15  # times the share of real tokens
SOURCES = {"stsb": fetch.STSB, "rotten-tomatoes": fetch.REVIEWS}


OPTIONS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "engines": ("specs", parse_specs),
    "model": ("model", str),
    "texts": ("texts", parse_names("texts", tuple(SOURCES))),
    "batch": ("batch", count("batch")),
    "batches": ("batches", count("batches")),
}


@dataclass(frozen=True)
class Texts:
    """Batches of token ids, for `encoder.run`."""

    name: str
    rows: tuple[tuple[tuple[int, ...], ...], ...]  # token ids by batch and sentence

    def __str__(self) -> str:
        return f"{self.name}, {len(self.rows[0])}"

    @property
    def tokens(self) -> int:
        return int(self.lengths().max())

    def lengths(self) -> np.ndarray:
        """Tokens of each sentence."""
        return np.array([len(sentence) for batch in self.rows for sentence in batch])

    def real(self) -> float:
        """The share of the positions that are tokens."""
        return float(self.lengths().sum() / sum(len(batch) * max(map(len, batch)) for batch in self.rows))

    def batches(self, vocab: int) -> list[dict[str, np.ndarray]]:
        """Inputs of the model. Raises ValueError where its table of tokens is too small."""
        largest = max(max(sentence) for batch in self.rows for sentence in batch)
        if largest >= vocab:
            raise ValueError(f"model: expected a vocabulary of more than {largest} tokens. Got {vocab}.")
        return [padded(batch) for batch in self.rows]


def sentences(name: str, tick: fetch.Progress | None = None) -> list[str]:
    """The sentences of a test set. Raises `fetch.FetchError` where it cannot be had."""
    folder = fetch.fetch(SOURCES[name], tick)
    if name == "stsb":
        pairs = fetch.sts_pairs(folder)
        return [first for first, _, _ in pairs] + [second for _, second, _ in pairs]
    return [text for text, _ in q8bert.reviews(folder)[1]]


def run(
    specs: Sequence[str] = ENGINES,
    texts: Sequence[str] = tuple(SOURCES),
    model: str = "bert-base",
    batch: int = 32,
    batches: int = 4,
    threads: int = 2,
    rounds: int = ROUNDS,
    seconds: float = 0.25,
    python: Python = None,
    report: Callable[[str], None] = lambda text: None,
    tick: Callable[[str, int, int], None] | None = None,
) -> Run:
    """Measures engines on batches of real sentences; arguments as in `encoder.run`.

    Args:
        texts: of SOURCES; one that cannot be fetched is reported and left out.
        batch: sentences in a batch.
        batches: of each of the texts, all in one call; fewer where the sentences do not last.

    Returns: rows as of `encoder.run`, latency_ms for one batch; of time_share, config has the share of real tokens
        (`kept`) and what is asked for (`asked`).
    """
    expect_known(specs, "model")
    own = Path(model).expanduser() / "tokenizer.json"
    cases = []
    for name in texts:
        try:
            lines = sentences(name, tick)
            vocabulary = own.parent if own.is_file() else fetch.fetch(fetch.MINILM, tick)
        except fetch.FetchError as error:
            report(f"{name}: left out: {error}")
            continue
        random.Random(0).shuffle(lines)
        most = max(1, min(batches, len(lines) // batch))
        rows = [tuple(row) for row in tokenize(lines[: most * batch], vocabulary)]
        cases.append(Texts(name, tuple(tuple(rows[at : at + batch]) for at in range(0, len(rows), batch))))
    if not cases:
        raise fetch.FetchError("bench padding: none of the texts could be fetched; the lines above say why.")
    measured = encoder.run(
        specs,
        cases,
        model,
        threads,
        rounds,
        seconds,
        python,
        kind="padding",
        axis=AXIS,
        report=report,
        tick=tick,
    )
    measured.facts["real"] = {str(case): round(case.real(), 4) for case in cases}
    for row in measured.rows:
        if row.metric == "time_share":
            row.config["asked"] = round(ASKED * row.config["kept"], 4)
    return measured
