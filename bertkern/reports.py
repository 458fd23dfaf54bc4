"""What a model holds and what was made of it, as a table and as data."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from . import plan
from .config import Int8Config
from .nn import Int8Embedding, Int8Linear, PackedLinear

# The attribute of a swapped model that holds its record; see swap.Record.
RECORD = "_bertkern"
_INT8 = "int8"


@dataclass(frozen=True)
class Row:
    """One module.

    Attributes:
        name: its path in the model.
        kind: its class.
        shape: of its weight; empty for modules that hold others.
        runs: what computes it, or would.
        why: why it does not run better.
        zeros: share of weights that are zero, where counted.
        dead_rows, dead_columns: how many rows and columns hold nothing but zeros, where counted.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    runs: str
    why: str = ""
    zeros: float | None = None
    dead_rows: int | None = None
    dead_columns: int | None = None


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
        counted = any(row.zeros is not None for row in self.rows)
        head = [
            "module",
            "count",
            "shape",
            *(["zeros", "dead rows", "dead columns"] if counted else []),
            "runs as",
            "why",
        ]
        table = [head, *_grouped(self.rows, counted)]
        widths = [max(len(line[column]) for line in table) for column in range(len(head))]
        table.insert(1, ["-" * width for width in widths])
        lines = [self.title, *("  ".join(map(str.ljust, line, widths)).rstrip() for line in table)]
        lines += [f"plain path taken {count}x: {reason}" for reason, count in self.fallbacks.items()]
        return "\n".join([*lines, *self.notes])


def report(model: nn.Module) -> Report:
    """What computes each part of `model` now, and why something is left to torch.

    Example:
        >>> report(nn.Sequential(nn.Linear(4, 2))).rows[0].runs
        'torch'
    """
    record = getattr(model, RECORD, None)
    left, kept = (record.left, record.kept) if record is not None else ({}, {})
    rows, fallbacks = [], {}
    for name, module in model.named_modules():
        kind, why = type(module).__name__, left.get(name, "") or kept.get(name, "")
        if hasattr(module, "fell_back"):
            rows.append(Row(name, kind, (), "one operator"))
            fallbacks.update({f"{name}: {reason}": n for reason, n in getattr(module, "fallbacks", {}).items()})
        elif isinstance(module, (Int8Linear, Int8Embedding)):
            static = isinstance(module, Int8Linear) and bool(float(module.input_scale))
            runs = f"{_INT8} static" if static else _INT8
            rows.append(Row(name, kind, tuple(module.weight_codes.shape), runs))
        elif isinstance(module, nn.Linear):
            runs = _dtype(module) if isinstance(module, PackedLinear) else "torch"
            rows.append(Row(name, kind, tuple(module.weight.shape), runs, why))
        elif name in left:
            rows.append(Row(name, kind, (), "torch, its parts as below", why))
    notes = []
    if any(row.runs.startswith("torch") for row in rows):
        notes.append("What runs as torch is not batch-invariant: its last bits depend on the batch around a sequence.")
    return Report("What runs how", tuple(rows), fallbacks, tuple(notes))


def inspect(model: nn.Module) -> Report:
    """The structure of `model`: zeros in every linear layer, and what `quantize_` would make of it.

    Changes nothing. A dead row is an output that is always its bias, a dead column an input that is never read.

    Example:
        >>> inspect(nn.Sequential(nn.Linear(4, 2))).rows[0].runs
        'int8'
    """
    choices = {choice.name: choice for choice in plan.choose(model, Int8Config())}
    rows = []
    for name, module in model.named_modules():
        if name in choices:
            choice = choices[name]
            runs = {"int8": _INT8, "packed": _dtype(module), "left": "torch"}[choice.action]
            rows.append(_structure(name, module, module.weight.detach(), runs, choice.reason))
        elif isinstance(module, Int8Linear):
            rows.append(_structure(name, module, module.weight_codes, f"{_INT8} already"))
    return Report("What could run how", tuple(rows))


def _structure(name: str, module: nn.Module, weight: torch.Tensor, runs: str, why: str = "") -> Row:
    shape = tuple(weight.shape)
    if weight.device.type == "meta" or weight.numel() == 0:
        return Row(name, type(module).__name__, shape, runs, why)
    nonzero = weight != 0
    dead_rows, dead_columns = int((~nonzero.any(1)).sum()), int((~nonzero.any(0)).sum())
    zeros = 1 - int(nonzero.sum()) / weight.numel()
    return Row(name, type(module).__name__, shape, runs, why, zeros, dead_rows, dead_columns)


def _dtype(linear: nn.Linear) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}.get(linear.weight.dtype, "fp32")


def _grouped(rows: Iterable[Row], counted: bool) -> list[list[str]]:
    """Lines of the table; modules that differ by nothing but the number of their layer share one."""
    groups: Counter[tuple[str, ...]] = Counter()
    for row in rows:
        name = re.sub(r"\b\d+\b", "*", row.name) or "(the model)"
        line = [name, " x ".join(map(str, row.shape))]
        if counted:
            known = row.zeros is not None
            line += [f"{row.zeros:.0%}", str(row.dead_rows), str(row.dead_columns)] if known else ["", "", ""]
        groups[(*line, row.runs, row.why)] += 1
    return [[line[0], str(count), *line[1:]] for line, count in groups.items()]
