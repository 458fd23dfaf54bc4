"""What a model holds and what was made of it, as a table and as data."""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from . import gpu
from .nn import PackedLinear, SparseLinear
from .record import record_of
from .schemes import scheme_of


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
    return re.sub(r"\b\d+\b", "*", name) or "(the model)"


def float_name(linear: nn.Linear) -> str:
    """In which type bertkern's kernels compute a linear layer that stays float."""
    weight = linear.values if isinstance(linear, SparseLinear) else linear.weight
    names = {torch.float32: "fp32", torch.bfloat16: "bf16"}
    if gpu.runs_on(weight.device):
        names[torch.float16] = "fp16"
    return names.get(weight.dtype, "fp32")


def _grouped(rows: Iterable[Row]) -> list[list[str]]:
    """Lines of the table; modules that differ by nothing but the number of their layer, or their times, share one."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        timed = bool(row.why) and row.runs != "torch" and "," in row.runs
        key = (general(row.name), " x ".join(map(str, row.shape)), row.runs, "" if timed else row.why)
        groups.setdefault(key, []).append(row.why)
    lines = []
    for (name, *cells, _), reasons in groups.items():
        others = f" (one of {len(set(reasons))})" if len(set(reasons)) > 1 else ""
        lines.append([name, str(len(reasons)), *cells, reasons[0] + others])
    return lines
