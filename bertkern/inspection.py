"""What `inspect` found, as data and as tables."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .reports import Report, Row, gathered, table
from .structure import DENSE, name_of

# A pattern n:m that many fewer weights than n/m keep to holds by chance, and describes nothing.
_FULL = 0.8


@dataclass(frozen=True)
class Grid:
    """The grids that a matrix's values lie on, so that they pack without loss; see `bertkern.grids`.

    Attributes:
        bits: widths of the groups, each once, ascending.
        axis: "n" or "k", along which groups are runs.
        groups: how many there are along it.
        group_size: neighbours in a group.
        shared: along "k": whether all rows share the groups' scales.
        exact: whether the packed form gives the matrix bit for bit; else to rounding.
    """

    bits: tuple[int, ...]
    axis: str
    groups: int
    group_size: int
    shared: bool
    exact: bool

    def __str__(self) -> str:
        count = f"{self.groups} group{'s' * (self.groups != 1)} along {self.axis}"
        ending = (", shared by rows" if self.shared else "") + ("" if self.exact else ", to rounding")
        return f"{'/'.join(map(str, self.bits))} bits, {count}{ending}"


@dataclass(frozen=True)
class Matrix(Row):
    """One matrix [N, K]: rows are outputs, columns inputs. What is None was not counted: no values, or no entries.

    Attributes:
        zeros: share of its weights that are zero; NaN is not, -0 is.
        dead_rows, dead_columns: how many rows and columns hold nothing but zeros.
        block: the largest block (rows, columns) that explains the zeros, if one does: whole blocks of zeros leave
            uncovered at most a tenth of the zeros, and a tenth as many as there are nonzeros. Sides are powers of two
            up to 128, blocks start at multiples of their sides, zero rows and columns do not count either way.
        densities: the share of blocks that hold anything, over all blocks, by "rowsxcolumns" of BLOCKS, of 1x1, and of
            `block`.
        patterns: n:m patterns that hold everywhere, strictest first: at most n of m neighbours are not zero, "along K"
            (neighbours in a row) or "along N" (in a column).
        pruned: whether torch.nn.utils.prune computes it; what is counted is the masked weight.
        same_as: the row that counts the same weights; they count once.
        times: time of a linear layer by the best of bertkern's kernels as a share of its dense one, of what is left
            without dead heads and units; see `estimate`.
        grid: of a floating-point matrix that lies on one.
    """

    zeros: float | None = None
    dead_rows: int | None = None
    dead_columns: int | None = None
    block: tuple[int, int] | None = None
    densities: Mapping[str, float] | None = None
    patterns: tuple[str, ...] = ()
    pruned: bool = False
    same_as: str = ""
    times: Mapping[str, float] | None = None
    grid: Grid | None = None

    @property
    def structure(self) -> str:
        """The pattern of the zeros in words."""
        if self.zeros is None:
            return ""
        if self.zeros == 1:
            return "all zero"
        if self.block is not None:
            return f"{name_of(self.block)} blocks"
        if self.patterns and 1 - self.zeros >= _FULL * min(_share(pattern) for pattern in self.patterns):
            return self.patterns[0]
        rows, columns = self.shape
        live = (rows - self.dead_rows) * (columns - self.dead_columns)
        if 1 - (1 - self.zeros) * rows * columns / live < DENSE:
            return "whole rows, columns" if self.dead_rows or self.dead_columns else "dense"
        return "unstructured"


@dataclass(frozen=True)
class Layer:
    """What an encoder layer could lose exactly; see bertkern.dead.

    Attributes:
        name: its path in the model.
        heads, units: how many attention heads and feed-forward units it has.
        dead_heads: the numbers of heads that add nothing.
        dead_units: how many units nothing reads.
        foldable_units: how many units are constant, so that they fold into a bias.
        why: why it could not be looked into; then all else is empty.
    """

    name: str
    heads: int = 0
    dead_heads: tuple[int, ...] = ()
    units: int = 0
    dead_units: int = 0
    foldable_units: int = 0
    why: str = ""


@dataclass(frozen=True)
class Totals:
    """Sums over the model; weights that several modules share count once.

    Attributes:
        weights, zeros: of all matrices.
        heads, dead_heads, units, dead_units, foldable_units: of all layers of known families.
        kept: multiply-adds of the linear layers when what may go exactly is gone, as a share of all.
        speedup: how much faster the linear layers could be than by bertkern's dense kernels, by dtype: an estimate.
            Every linear layer counts as if it ran once per token; attention does not count.
    """

    weights: int
    zeros: int
    heads: int
    dead_heads: int
    units: int
    dead_units: int
    foldable_units: int
    kept: float
    speedup: Mapping[str, float]


@dataclass(frozen=True)
class Inspection(Report):
    """A Report with the structure found; `print` it, `rich.print` it, or take `to_dict`.

    Attributes:
        layers: the encoder layers of known families.
        totals: over the whole model.
    """

    layers: tuple[Layer, ...] = ()
    totals: Totals | None = None

    def to_dict(self) -> dict[str, Any]:
        """The inspection as JSON values."""
        made = super().to_dict()
        for values, row in zip(made["rows"], self.rows, strict=True):
            values["structure"] = row.structure
            values["patterns"] = list(row.patterns)
            if row.block is not None:
                values["block"] = list(row.block)
            if row.grid is not None:
                values["grid"]["bits"] = list(row.grid.bits)
        layers = [{**asdict(layer), "dead_heads": list(layer.dead_heads)} for layer in self.layers]
        return {**made, "layers": layers, "totals": None if self.totals is None else asdict(self.totals)}

    def __str__(self) -> str:
        lines = [self.title]
        for head, rows in self._tables():
            lines += [*table(head, rows), ""]
        return "\n".join([*lines, *self._summary()])

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        parts: list[Any] = [Text(self.title, style="bold")]
        for head, rows in self._tables():
            drawn = Table(box=None, padding=(0, 1, 0, 0))
            for column, name in enumerate(head):
                # Names stay whole as long as they can; what is in words breaks first.
                drawn.add_column(name, no_wrap=column == 0, overflow="ellipsis" if column == 0 else "fold")
            for row in rows:
                drawn.add_row(*map(Text, row))
            parts += [drawn, ""]
        return Group(*parts, *map(Text, self._summary()))

    def _tables(self) -> list[tuple[list[str], list[list[str]]]]:
        head = ["module", "count", "shape", "zeros", "dead rows", "dead columns", "structure", "density"]
        head, rows = [*head, "on a grid", "fp32 gain", "int8 gain", "runs as", "why"], _grouped(self.rows)
        # Columns that would say nothing.
        for column in ("on a grid", "why"):
            at = head.index(column)
            if not any(row[at] for row in rows):
                head, rows = head[:at] + head[at + 1 :], [row[:at] + row[at + 1 :] for row in rows]
        made = [(head, rows)]
        lossy = [layer for layer in self.layers if layer.dead_heads or layer.dead_units or layer.foldable_units]
        if lossy:
            head = ["layer", "heads", "dead heads", "units", "dead units", "constant units"]
            made.append((head, [_layer_line(layer) for layer in lossy]))
        return made

    def _summary(self) -> list[str]:
        lines, totals = [], self.totals
        if totals is not None and totals.weights:
            lines.append(f"weights: {totals.weights:,} in matrices, {totals.zeros / totals.weights:.1%} of them zero")
        if totals is not None and totals.heads:
            lines.append(
                f"exactly removable: {totals.dead_heads} of {totals.heads} heads, {totals.dead_units:,} dead and "
                f"{totals.foldable_units:,} constant of {totals.units:,} feed-forward units; "
                f"{totals.kept:.0%} of the multiply-adds of linear layers are left"
            )
        if totals is not None and totals.speedup:
            gains = ", ".join(f"{dtype} {gain:.1f}x" for dtype, gain in totals.speedup.items())
            lines.append(f"linear layers against bertkern's own dense kernels, estimated, not measured: {gains}")
        return [*lines, *self.notes]


def _grouped(rows: Iterable[Matrix]) -> list[list[str]]:
    """Lines of the table; modules that differ by the number of their layer and what was counted share one.

    Their pattern is the same: over several of them, shares and gains would say nothing.
    """

    def key(row: Matrix) -> tuple[str, ...]:
        why = f"same weights as {row.same_as}" if row.same_as else row.why
        return row.structure, " x ".join(map(str, row.shape)), row.runs, why

    lines = []
    for name, (structure, shape, runs, why), members in gathered((row.name, key(row), row) for row in rows):
        counted = [row for row in members if row.zeros is not None]
        blocks = [row.densities[name_of(row.block or (1, 1))] for row in counted]
        timed = [row.times for row in counted if row.times is not None]
        cells = [
            _span([row.zeros for row in counted], _percent),
            _span([row.dead_rows for row in counted], str),
            _span([row.dead_columns for row in counted], str),
            structure,
            _span(blocks, _percent),
            _words([str(row.grid) if row.grid else "none" for row in counted] if any(r.grid for r in counted) else []),
            *(_span([1 / times[dtype] for times in timed], _gain) for dtype in ("fp32", "int8")),
        ]
        lines.append([name, str(len(members)), shape, *cells, runs, why])
    return lines


def _span(values: list[Any], form: Callable[[Any], str]) -> str:
    """The least and the greatest value, or the one that all are."""
    if not values:
        return ""
    low, high = form(min(values)), form(max(values))
    return low if low == high else f"{low}-{high}"


def _words(words: list[str]) -> str:
    """The words by how often they occur, no more than two of them."""
    counts = Counter(words)
    if len(counts) <= 1:
        return "".join(counts)
    first = ", ".join(f"{word} ({n})" for word, n in counts.most_common(2))
    return first if len(counts) == 2 else f"{first}, {len(counts) - 2} others"


def _percent(share: float) -> str:
    """Whole per cents, but never 0 % for something nor 100 % for less than all."""
    text = f"{share:.0%}"
    if (text == "0%" and share > 0) or (text == "100%" and share < 1):
        return "<1%" if share < 0.5 else ">99%"
    return text


def _gain(times: float) -> str:
    """How many times faster; what is left of a matrix without anything in it has no meaningful speed."""
    return f"{times:.1f}x" if times < 100 else ">99x"


def _layer_line(layer: Layer) -> list[str]:
    # A number alone would read as a count.
    heads = f"{len(layer.dead_heads)}: {' '.join(map(str, layer.dead_heads))}" if layer.dead_heads else "none"
    return [layer.name, str(layer.heads), heads, *map(str, (layer.units, layer.dead_units, layer.foldable_units))]


def _share(pattern: str) -> float:
    n, m = pattern.split(" ")[0].split(":")
    return int(n) / int(m)
