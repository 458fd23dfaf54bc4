"""What was pruned, as a table and as data."""

import re
from collections import Counter
from dataclasses import dataclass
from math import prod
from typing import Any


@dataclass(frozen=True)
class PruneRow:
    """One matrix.

    Attributes:
        name: of the weight.
        shape: [N, K].
        pruned: how many of its weights are held at zero.
    """

    name: str
    shape: tuple[int, ...]
    pruned: int

    @property
    def sparsity(self) -> float:
        """The share of weights that are held at zero."""
        return self.pruned / prod(self.shape)


@dataclass(frozen=True)
class PruneReport:
    """A table of matrices; `print` it, or take `to_dict`."""

    rows: tuple[PruneRow, ...]

    @property
    def weights(self) -> int:
        """How many weights the matrices have."""
        return sum(prod(row.shape) for row in self.rows)

    @property
    def pruned(self) -> int:
        """How many of them are held at zero."""
        return sum(row.pruned for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        rows = [
            {"name": row.name, "shape": list(row.shape), "pruned": row.pruned, "sparsity": row.sparsity}
            for row in self.rows
        ]
        return {"weights": self.weights, "pruned": self.pruned, "rows": rows}

    def __str__(self) -> str:
        # Matrices that differ by nothing but the number of their layer share a line.
        groups: Counter[tuple[str, ...]] = Counter()
        for row in self.rows:
            name = re.sub(r"\b\d+\b", "*", row.name.removesuffix(".weight"))
            left = prod(row.shape) - row.pruned
            groups[name, " x ".join(map(str, row.shape)), str(row.pruned), f"{left / prod(row.shape):.1%}"] += 1
        table = [["matrix", "count", "shape", "zeros", "density"]]
        table += [[line[0], str(count), *line[1:]] for line, count in groups.items()]
        widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
        table.insert(1, ["-" * width for width in widths])
        lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in table]
        share = self.pruned / self.weights if self.weights else 0.0
        return "\n".join(
            ["What is pruned", *lines, f"{self.pruned:,} of {self.weights:,} weights are zero: {share:.1%}"]
        )
