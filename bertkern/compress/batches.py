"""The forms in which a user may hand over calibration data, brought to calls of the model."""

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sized
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

# What a tokenizer without a length limit of its own is told: the positions of the supported families end there.
LONGEST_TEXT = 512

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Batches:
    """Iterates over (args, kwargs) for the model, with a length where the data has one.

    Takes an iterable (a DataLoader, a list, a generator) of batches, or one batch. A batch is a mapping of tensors
    (its labels are left out), a tuple or list of tensors in the order of the model's arguments, a tensor of ids, or
    a list of strings. A list of strings is cut into batches of `batch_size`.
    """

    def __init__(
        self,
        data: Any,
        model: nn.Module,
        tokenizer: Callable[..., Any] | None,
        batch_size: int,
        caller: str = "calibrate",
    ) -> None:
        if isinstance(data, str) or not isinstance(data, (Iterable, Mapping, Tensor)):
            raise TypeError(f"{caller}: expected batches to be an iterable of batches. Got {type(data).__name__}.")
        if batch_size < 1:
            raise ValueError(f"{caller}: expected batch_size to be at least 1. Got {batch_size}.")
        if isinstance(data, (Mapping, Tensor)):
            data = [data]
        elif isinstance(data, (list, tuple)) and data and all(isinstance(text, str) for text in data):
            data = [list(data[start : start + batch_size]) for start in range(0, len(data), batch_size)]
        self._data, self._caller = data, caller
        self._tokenizer = tokenizer
        # A SentenceTransformer tokenizes by itself (by `tokenize` until version 5), takes features as one argument.
        self._tokenize = getattr(model, "preprocess", None) or getattr(model, "tokenize", None)
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def __len__(self) -> int:
        if not isinstance(self._data, Sized):
            raise TypeError("batches of unknown number")
        return len(self._data)

    def __iter__(self) -> Iterator[Call]:
        return (self._call(batch) for batch in self._data)

    def _call(self, batch: Any) -> Call:
        if isinstance(batch, (list, tuple)) and batch and all(isinstance(text, str) for text in batch):
            batch = self._encode(list(batch))
        if isinstance(batch, Tensor):
            return (batch.to(self._device),), {}
        if isinstance(batch, Mapping):
            inputs = {k: self._moved(v) for k, v in batch.items() if k not in ("label", "labels", "label_ids")}
            return ((inputs,), {}) if self._tokenize else ((), inputs)
        if isinstance(batch, (list, tuple)) and batch:
            return tuple(self._moved(value) for value in batch), {}
        raise TypeError(
            f"{self._caller}: expected a batch to be a mapping of tensors, a tuple of tensors, a tensor, or a list of "
            f"strings. Got {type(batch).__name__}."
        )

    def _encode(self, texts: list[str]) -> Mapping[str, Any]:
        if self._tokenizer is not None:
            limit = getattr(self._tokenizer, "model_max_length", LONGEST_TEXT)
            return self._tokenizer(
                texts, padding=True, truncation=True, max_length=min(limit, LONGEST_TEXT), return_tensors="pt"
            )
        if self._tokenize is not None:
            return self._tokenize(texts)
        raise TypeError(f"{self._caller}: expected a tokenizer with batches of strings. Got None.")

    def _moved(self, value: Any) -> Any:
        return value.to(self._device) if isinstance(value, Tensor) else value


def moved(batch: Any, device: torch.device) -> Any:
    """`batch`, a tensor or tensors in mappings, tuples and lists, on `device`; what else it holds stays."""
    if isinstance(batch, Tensor):
        batch = batch.to(device)
        # Those made in inference mode cannot be saved for a backward pass.
        return batch.clone() if batch.is_inference() else batch
    if isinstance(batch, MutableMapping):
        made = copy(batch)  # of its own class: some take attributes for keys
        made.update({key: moved(value, device) for key, value in batch.items()})
        return made
    if type(batch) in (tuple, list):
        return type(batch)(moved(value, device) for value in batch)
    return batch
