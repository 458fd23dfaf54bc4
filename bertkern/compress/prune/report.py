"""What was pruned, as a table and as data."""

from dataclasses import dataclass
from math import prod
from typing import Any

from bertkern.reports import gathered, table


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
        def cells(row: PruneRow) -> tuple[str, ...]:
            left = prod(row.shape) - row.pruned
            return " x ".join(map(str, row.shape)), str(row.pruned), f"{left / prod(row.shape):.1%}"

        # Matrices that differ by nothing but the number of their layer share a line.
        groups = gathered((row.name.removesuffix(".weight"), cells(row), row) for row in self.rows)
        rows = [[name, str(len(members)), *told] for name, told, members in groups]
        lines = table(["matrix", "count", "shape", "zeros", "density"], rows)
        share = self.pruned / self.weights if self.weights else 0.0
        return "\n".join(
            ["What is pruned", *lines, f"{self.pruned:,} of {self.weights:,} weights are zero: {share:.1%}"]
        )
