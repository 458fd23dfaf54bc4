"""The two tasks of the Q-BERT benchmark: data, training by transformers' Trainer, scores. Needs torch."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import demo, fetch
from .q8bert import reviews

BATCH = 32
LONGEST = 64  # tokens, in training


class Pairs(nn.Module):
    """A sentence encoder on pairs [B, 2, L]: the cosine of their means over real tokens, squared error to the label."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None, labels: Any = None
    ) -> dict[str, Tensor]:
        ids, mask = input_ids.flatten(0, 1), attention_mask.flatten(0, 1)
        weight = mask[..., None].float()
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        means = ((states * weight).sum(1) / weight.sum(1)).unflatten(0, (-1, 2))
        cosines = nn.functional.cosine_similarity(means[:, 0], means[:, 1], dim=-1)
        if labels is None:
            return {"logits": cosines}
        return {"loss": nn.functional.mse_loss(cosines, labels.float()), "logits": cosines}


def bucketed(examples: Sequence[Any], seed: int) -> list[list[Any]]:
    """Batches of examples of similar length: of sixteen batches' worth at a time, drawn at random."""
    shuffled = list(examples)
    random.Random(seed).shuffle(shuffled)
    made = []
    for start in range(0, len(shuffled), 16 * BATCH):
        near = sorted(shuffled[start : start + 16 * BATCH], key=lambda example: max(map(len, _texts(example))))
        made += [near[at : at + BATCH] for at in range(0, len(near), BATCH)]
    return made


def _texts(example: Sequence[Any]) -> list[str]:
    return [part for part in example if isinstance(part, str)]


class Task:
    """A model, what it learns from and how it is judged.

    Attributes:
        name, metric: as the rows have them.
        learning_rate, low_bit_rate: of training on, as a float model and as a low-bit one; the paper's 2e-5 is for
            BERT-base, models this small bear more.
        calibration: sentences of the training set, shuffled.
    """

    name: str
    metric: str
    learning_rate: float
    low_bit_rate: float

    def __init__(self, cache: Path, quick: bool, tick: Callable[[str, int, int], None] | None = None):
        from transformers import AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.cache, self.quick = cache, quick
        self.folder = fetch.fetch(fetch.MINILM, tick)
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.read(tick)
        if quick:
            self.test, self.examples = self.test[::8], self.examples[: 8 * BATCH]

    def read(self, tick: Callable[[str, int, int], None] | None) -> None:
        """Sets `examples` and `test`."""
        raise NotImplementedError

    def model(self, seed: int = 0) -> nn.Module:
        """The trained fp32 model that is to be quantized, or trained on from it."""
        raise NotImplementedError

    def score(self, model: nn.Module) -> float:
        """On the test set."""
        raise NotImplementedError

    def trainable(self, model: nn.Module) -> nn.Module:
        """What takes the batches of `collate`, and gives their loss."""
        raise NotImplementedError

    def collate(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        """A batch with labels."""
        raise NotImplementedError

    @property
    def steps(self) -> int:
        """Of a training: once through the examples."""
        return -(-len(self.examples) // BATCH)

    def batches(self, count: int) -> list[dict[str, Tensor]]:
        """Labelled batches of the training set."""
        return [self.collate(self.examples[i * BATCH : (i + 1) * BATCH]) for i in range(count)]

    def train(
        self,
        model: nn.Module,
        seed: int,
        callbacks: Iterable[Any] = (),
        rate: float | None = None,
        passes: int = 1,
    ) -> nn.Module:
        """The model after training so many times through the examples, in evaluation mode."""
        from transformers import Trainer, TrainingArguments, set_seed

        set_seed(seed)
        with tempfile.TemporaryDirectory() as scratch:
            arguments = TrainingArguments(
                output_dir=scratch,
                max_steps=passes * self.steps,
                per_device_train_batch_size=1,  # an example is a batch already
                learning_rate=rate or self.learning_rate,
                warmup_steps=self.steps // 10,
                logging_strategy="no",
                save_strategy="no",
                report_to=[],
                use_cpu=True,
                seed=seed,
                remove_unused_columns=False,
                disable_tqdm=True,
            )
            Trainer(
                self.trainable(model),
                arguments,
                train_dataset=bucketed(self.examples, seed),
                data_collator=lambda batches: self.collate(batches[0]),
                callbacks=list(callbacks),
            ).train()
        return model.eval()

    def encoded(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """A batch of sentences, each as long as the longest."""
        return dict(self.tokenizer(list(texts), padding=True, truncation=True, max_length=LONGEST, return_tensors="pt"))


class StsB(Task):
    """all-MiniLM-L6-v2 on the STS Benchmark: Spearman's correlation of cosines with scores."""

    name, metric = "STS-B", "spearman"
    learning_rate, low_bit_rate = 1e-4, 2e-4

    def read(self, tick: Callable[[str, int, int], None] | None) -> None:
        folder = fetch.fetch(fetch.STSB, tick)
        self.test = fetch.sts_pairs(folder)
        self.examples = fetch.sts_pairs(folder, "train")
        random.Random(0).shuffle(self.examples)

    @property
    def calibration(self) -> list[str]:
        return list(dict.fromkeys(text for first, second, _ in self.examples for text in (first, second)))

    def model(self, seed: int = 0) -> nn.Module:
        from transformers import AutoModel

        return AutoModel.from_pretrained(self.folder, dtype=torch.float32).eval()

    def trainable(self, model: nn.Module) -> nn.Module:
        return Pairs(model)

    def collate(self, examples: Sequence[tuple[str, str, float]]) -> dict[str, Tensor]:
        encoded = self.encoded([text for first, second, _ in examples for text in (first, second)])
        made = {name: tensor.unflatten(0, (-1, 2)) for name, tensor in encoded.items()}
        return {**made, "labels": torch.tensor([score / 5 for _, _, score in examples])}

    def score(self, model: nn.Module) -> float:
        sentences = [first for first, _, _ in self.test] + [second for _, second, _ in self.test]
        grouped, order = demo.batches(sentences, self.folder, BATCH)
        rows = []
        with torch.no_grad():
            for batch in grouped:
                inputs = {name: torch.from_numpy(array) for name, array in batch.items()}
                weight = inputs["attention_mask"][..., None].float()
                states = model(**inputs).last_hidden_state
                rows.append(((states * weight).sum(1) / weight.sum(1)).numpy())
        vectors = np.empty((len(sentences), rows[0].shape[1]), np.float32)
        vectors[order] = np.concatenate(rows)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        half = len(self.test)
        return demo.spearman((vectors[:half] * vectors[half:]).sum(1), np.array([score for _, _, score in self.test]))


class RottenTomatoes(Task):
    """all-MiniLM-L6-v2 fine-tuned on film reviews: the share of the right answers, praise or not."""

    name, metric = "Rotten Tomatoes", "accuracy"
    learning_rate, low_bit_rate = 5e-5, 1e-4
    FIRST_RATE = 1e-4  # of the fine-tuning, which starts with a new head

    def read(self, tick: Callable[[str, int, int], None] | None) -> None:
        self.examples, self.test = reviews(fetch.fetch(fetch.REVIEWS, tick))

    @property
    def calibration(self) -> list[str]:
        return [text for text, _ in self.examples]

    def model(self, seed: int = 0) -> nn.Module:
        from transformers import AutoModelForSequenceClassification, set_seed

        kept = self.cache / f"rotten-tomatoes-{len(self.examples)}-{seed}"
        if not (kept / "config.json").is_file():
            set_seed(seed)
            fresh = AutoModelForSequenceClassification.from_pretrained(self.folder, num_labels=2, dtype=torch.float32)
            self.train(fresh, seed, rate=self.FIRST_RATE, passes=2)
            with tempfile.TemporaryDirectory(dir=self.cache) as scratch:
                made = Path(scratch) / "model"
                fresh.save_pretrained(made)
                try:
                    made.rename(kept)
                except OSError:
                    if not (kept / "config.json").is_file():  # else another run has just made the same
                        raise
        return AutoModelForSequenceClassification.from_pretrained(kept, dtype=torch.float32).eval()

    def trainable(self, model: nn.Module) -> nn.Module:
        return model

    def collate(self, examples: Sequence[tuple[str, int]]) -> dict[str, Tensor]:
        return {
            **self.encoded([text for text, _ in examples]),
            "labels": torch.tensor([label for _, label in examples]),
        }

    def score(self, model: nn.Module) -> float:
        right = 0
        ordered = sorted(self.test, key=lambda example: len(example[0]))
        with torch.no_grad():
            for start in range(0, len(ordered), BATCH):
                batch = self.collate(ordered[start : start + BATCH])
                labels = batch.pop("labels")
                right += int((model(**batch).logits.argmax(-1) == labels).sum())
        return right / len(ordered)


TASKS: dict[str, type[Task]] = {task.name: task for task in (StsB, RottenTomatoes)}
