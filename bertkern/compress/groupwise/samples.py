"""Random samples of the examples in a user's batches."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bertkern import plan

from ..batches import LONGEST_TEXT, moved

# What stands in for padding, by name; 0 of all other tensors. Labels of -100 count for no loss in torch.
_LABELS, _IDS, _MASK = "labels", "input_ids", "attention_mask"
_IGNORED = -100
# Where no batch size is given, tokens x outputs of a model's matrices that run at a time: 1024 tokens of BERT-base,
# some 4 GB with a graph of second order; of smaller models more tokens, up to a limit for what attention takes beside.
OUTPUTS, MOST_TOKENS = 1024 * 12 * (5 * 768 + 3072), 8192


class Chunk(NamedTuple):
    """What a loss takes at a time, and how many examples it holds."""

    batch: Any
    examples: int


class _Example(NamedTuple):
    batch: Any
    row: int | None  # of its tensors; None: the batch as it is


class Examples:
    """The examples of batches: rows of mappings, tuples and lists of tensors [B, ...], and texts; other batches whole.

    Rows of any batches run side by side. Where there is an attention mask, shorter ones get trailing padding.
    """

    def __init__(self, data: Any, model: nn.Module, tokenizer: Callable[..., Any] | None, caller: str) -> None:
        if data is None or isinstance(data, (str, Tensor)) or not isinstance(data, Iterable):
            raise TypeError(f"{caller}: expected batches to be an iterable of batches. Got {type(data).__name__}.")
        self._caller, self._tokenizer = caller, tokenizer
        self._device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        roots = list(plan.pretrained_roots(model).values())
        self._pad = getattr(roots[0].config, "pad_token_id", None) if roots else None
        batches = [data] if isinstance(data, Mapping) or _texts(data) else data
        self._all = [example for batch in batches for example in self._split(batch)]
        if not self._all:
            raise ValueError(f"{caller}: expected at least one batch. Got none.")

    def __len__(self) -> int:
        return len(self._all)

    def draw(self, fraction: float, generator: torch.Generator) -> list[int]:
        """The numbers of a random share of the examples, at least one, each once."""
        count = max(1, round(fraction * len(self)))
        return torch.randperm(len(self), generator=generator)[:count].sort().values.tolist()

    def chunks(self, numbers: Sequence[int], size: int | None, outputs: int) -> list[Chunk]:
        """The examples of these numbers, side by side.

        Args:
            size: how many in a chunk at most; None: as many as `OUTPUTS` allows.
            outputs: of all matrices, per token.
        """
        groups: dict[Any, list[_Example]] = {}
        made = []
        tokens = min(OUTPUTS // max(1, outputs), MOST_TOKENS)
        for number in numbers:
            example = self._all[number]
            if example.row is None:
                made.append(Chunk(moved(example.batch, self._device), 1))
            else:
                groups.setdefault(_kind(example), []).append(example)
        for group in groups.values():
            # Neighbours in length, so that little is padding.
            group.sort(key=_width)
            while group:
                count = size or max(1, sum(_width(x) * (i + 1) <= tokens for i, x in enumerate(group)))
                part, group = group[:count], group[count:]
                made.append(Chunk(moved(self._joined(part), self._device), len(part)))
        return made

    def _split(self, batch: Any) -> Iterator[_Example]:
        if _texts(batch):
            yield from (self._encoded(text) for text in batch)
            return
        tensors = [value for value in _values(batch) if isinstance(value, Tensor) and value.dim()]
        if tensors and len({tensor.shape[0] for tensor in tensors}) == 1:
            yield from (_Example(batch, row) for row in range(tensors[0].shape[0]))
        else:
            yield _Example(batch, None)

    def _encoded(self, text: str) -> _Example:
        if self._tokenizer is None:
            raise TypeError(f"{self._caller}: expected a tokenizer with batches of strings. Got None.")
        limit = min(getattr(self._tokenizer, "model_max_length", LONGEST_TEXT), LONGEST_TEXT)
        return _Example(self._tokenizer([text], truncation=True, max_length=limit, return_tensors="pt"), 0)

    def _joined(self, part: list[_Example]) -> Any:
        batch = part[0].batch
        rows = [{key: _row(value, example.row) for key, value in _items(example.batch)} for example in part]
        made = {key: self._stacked(key, [row[key] for row in rows], rows) for key in rows[0]}
        return made if isinstance(batch, Mapping) else type(batch)(made.values())

    def _stacked(self, key: Any, values: list[Any], rows: list[dict[Any, Any]]) -> Any:
        if not isinstance(values[0], Tensor) or not values[0].dim():
            return values[0]
        if len({value.shape for value in values}) == 1:
            return torch.cat(values)
        longest = max(value.shape[-1] for value in values)
        fill = {_LABELS: _IGNORED, _IDS: self._pad or 0}.get(key, 0)
        return torch.cat([nn.functional.pad(value, (0, longest - value.shape[-1]), value=fill) for value in values])


def _texts(batch: Any) -> bool:
    return isinstance(batch, (list, tuple)) and bool(batch) and all(isinstance(text, str) for text in batch)


def _items(batch: Any) -> Iterable[tuple[Any, Any]]:
    return batch.items() if isinstance(batch, Mapping) else enumerate(batch)


def _values(batch: Any) -> Iterable[Any]:
    if isinstance(batch, Mapping):
        return batch.values()
    # A named tuple takes no iterable.
    return batch if type(batch) in (tuple, list) else ()


def _row(value: Any, row: int) -> Any:
    return value[row : row + 1] if isinstance(value, Tensor) and value.dim() else value


def _width(example: _Example) -> int:
    """How many tokens an example has, its padding among them."""
    values = [value for value in _values(example.batch) if isinstance(value, Tensor) and value.dim() > 1]
    mask = example.batch.get(_MASK) if isinstance(example.batch, Mapping) else None
    first = mask if isinstance(mask, Tensor) else values[0] if values else None
    return 1 if first is None else max(1, first[0].numel())


def _kind(example: _Example) -> Any:
    """Equal of examples that can stand side by side."""
    mask = example.batch.get(_MASK) if isinstance(example.batch, Mapping) else None
    length = mask.shape[-1] if isinstance(mask, Tensor) else None
    made = [type(example.batch)]
    for key, value in _items(example.batch):
        if isinstance(value, Tensor):
            shape = tuple(value.shape[1:])
            # A side that is as long as the mask is one of tokens, and can be padded.
            padded = shape and shape[-1] == length and not value.is_floating_point()
            made.append((key, value.dtype, (*shape[:-1], None) if padded else shape))
        else:
            made.append((key, id(value)))
    return tuple(made)
