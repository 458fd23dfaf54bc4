"""What a model holds and what was made of it, as a table and as data."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from . import gpu
from .nn import PackedLinear, SparseLinear
from .record import record_of
from .schemes import scheme_of

_NUMBER = re.compile(r"\b\d+\b")


@dataclass(frozen=True)
class Row:
    """One module.

    Attributes:
        name: its path in the model.
        kind: its class.
        shape: of its weight; empty for modules that hold others.
        runs: what computes it, or would.
        why: why it does not run better.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    runs: str
    why: str = ""


@dataclass(frozen=True)
class Report:
    """A table of modules; `print` it, or take `to_dict`.

    Attributes:
        title: what the table is about.
        rows: a row per module.
        fallbacks: how often calls took the plain path, by "module: reason".
        notes: lines under the table.
    """

    title: str
    rows: tuple[Row, ...]
    fallbacks: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        rows = [{key: value for key, value in asdict(row).items() if value is not None} for row in self.rows]
        for row in rows:
            row["shape"] = list(row["shape"])
        return {"title": self.title, "rows": rows, "fallbacks": dict(self.fallbacks), "notes": list(self.notes)}

    def __str__(self) -> str:
        lines = [self.title, *table(["module", "count", "shape", "runs as", "why"], _grouped(self.rows))]
        lines += [f"plain path taken {count}x: {reason}" for reason, count in self.fallbacks.items()]
        return "\n".join([*lines, *self.notes])


def report(model: nn.Module) -> Report:
    """What computes each part of `model` now, and why something is left to torch.

    "int4 n/128" is a weight of 4 bits in 128 groups along N; activations are int8 unless more is said.

    Example:
        >>> report(nn.Sequential(nn.Linear(4, 2))).rows[0].runs
        'torch'
    """
    record = record_of(model)
    left, kept, forms = record.left, record.kept, record.forms
    rows, fallbacks = [], {}
    for name, module in model.named_modules():
        kind, why = type(module).__name__, left.get(name, "") or kept.get(name, "")
        if hasattr(module, "fell_back"):
            rows.append(Row(name, kind, (), module.runs_as()))
            fallbacks.update({f"{name}: {reason}": n for reason, n in getattr(module, "fallbacks", {}).items()})
        elif scheme := scheme_of(module):
            linear = isinstance(module, scheme.linear)
            shape = (
                (module.out_features, module.in_features) if linear else (module.num_embeddings, module.embedding_dim)
            )
            rows.append(Row(name, kind, shape, scheme.runs(module), str(forms.get(name, ""))))
        elif isinstance(module, SparseLinear):
            runs = f"{float_name(module)}, {module.form}"
            rows.append(Row(name, kind, (module.out_features, module.in_features), runs, str(forms.get(name, ""))))
        elif isinstance(module, nn.Linear):
            # On a GPU a dense float product is torch's own.
            packed = isinstance(module, PackedLinear) and not gpu.runs_on(module.weight.device)
            runs = float_name(module) if packed else "torch"
            reason = why or (str(forms.get(name, "")) if packed else "")
            rows.append(Row(name, kind, tuple(module.weight.shape), runs, reason))
        elif name in left:
            rows.append(Row(name, kind, (), "torch, its parts as below", why))
    notes = []
    if any(row.runs.startswith("torch") for row in rows):
        notes.append("What runs as torch is not batch-invariant: its last bits depend on the batch around a sequence.")
    return Report("What runs how", tuple(rows), fallbacks, tuple(notes))


def table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    """The lines of a table, its columns as wide as they need to be."""
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    lines.insert(1, ["-" * width for width in widths])
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]


def general(name: str) -> str:
    """`name` with a star for every number, so that the same module of all layers has one name."""
    return _NUMBER.sub("*", name) or "(the model)"


def gathered(items: Iterable[tuple[str, Any, Any]]) -> list[tuple[str, Any, list[Any]]]:
    """(name, key, value) -> (name, key, values): those whose keys are the same and whose names differ in numbers alone.

    A number that differs is a star where the group has all of those that there are, else it becomes the group's own.

    Example:
        >>> gathered((f"layer.{i}.key", i < 2 or i == 4, i) for i in range(5))
        [('layer.0-1,4.key', True, [0, 1, 4]), ('layer.2-3.key', False, [2, 3])]
    """
    groups: dict[tuple[str, Any], list[tuple[str, Any]]] = {}
    every: dict[str, list[str]] = {}
    for name, key, value in items:
        groups.setdefault((general(name), key), []).append((name, value))
        every.setdefault(general(name), []).append(name)
    return [
        (_common([name for name, _ in members], every[name]), key, [value for _, value in members])
        for (name, key), members in groups.items()
    ]


def _common(names: Sequence[str], every: Iterable[str]) -> str:
    """One name for `names`, some of `every`; stars where numbers in several places do not combine freely."""
    here, there = ({tuple(map(int, _NUMBER.findall(name))) for name in of} for of in (names, every))
    if here == there and len(there) > 1:
        return general(names[0])
    here_by, there_by = ([set(numbers) for numbers in zip(*of, strict=True)] for of in (here, there))
    whole = len(here) == math.prod(map(len, here_by))
    told = ["*" if (h == t and len(t) > 1) or not whole else _ranges(h) for h, t in zip(here_by, there_by, strict=True)]
    return _NUMBER.sub(lambda _: told.pop(0), names[0]) or "(the model)"


def _ranges(numbers: Iterable[int]) -> str:
    """Numbers in short: "0-2,9"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def float_name(linear: nn.Linear) -> str:
    """In which type bertkern's kernels compute a linear layer that stays float."""
    weight = linear.values if isinstance(linear, SparseLinear) else linear.weight
    names = {torch.float32: "fp32", torch.bfloat16: "bf16"}
    if gpu.runs_on(weight.device):
        names[torch.float16] = "fp16"
    return names.get(weight.dtype, "fp32")


def _grouped(rows: Iterable[Row]) -> list[list[str]]:
    """Lines of the table; modules that differ by nothing but the number of their layer, or their times, share one."""

    def key(row: Row) -> tuple[str, ...]:
        timed = bool(row.why) and row.runs != "torch" and "," in row.runs
        return " x ".join(map(str, row.shape)), row.runs, "" if timed else row.why

    lines = []
    for name, (*cells, _), reasons in gathered((row.name, key(row), row.why) for row in rows):
        others = f" (one of {len(set(reasons))})" if len(set(reasons)) > 1 else ""
        lines.append([name, str(len(reasons)), *cells, reasons[0] + others])
    return lines
