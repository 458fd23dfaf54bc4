"""The structure that pruning left in a model: what is zero, in which pattern, what may go, and what that could gain."""

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from . import plan, shrink
from .config import Int8Config
from .nn import Int8Embedding, Int8Linear
from .nn.int8 import finite
from .reports import INT8, Report, Row, float_name, general, table
from .swap import family_tables
from .tuning import MARGIN, cost

# Blocks, as rows x columns, whose density stands in every row; the best block is sought among all powers of two.
BLOCKS = (
    (1, 4),
    (4, 1),
    (1, 8),
    (8, 1),
    (1, 16),
    (16, 1),
    (4, 4),
    (8, 8),
    (4, 16),
    (16, 4),
    (16, 16),
    (32, 32),
    (64, 64),
    (128, 128),
)
_LARGEST = 128
# n of every m, strictest first.
_PATTERNS = ((1, 4), (1, 2), (2, 4))
# Zeros that a block may leave in kept blocks, as a share of the zeros and of the nonzeros, and still explain a matrix.
_UNEXPLAINED = 0.1
# A matrix with fewer zeros, beside whole rows and columns of them, is called dense.
_DENSE = 0.01
# A pattern n:m that many fewer weights than n/m keep to holds by chance, and describes nothing.
_FULL = 0.8


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

    @property
    def structure(self) -> str:
        """The pattern of the zeros in words."""
        if self.zeros is None:
            return ""
        if self.zeros == 1:
            return "all zero"
        if self.block is not None:
            return f"{_by(self.block)} blocks"
        if self.patterns and 1 - self.zeros >= _FULL * min(_share(pattern) for pattern in self.patterns):
            return self.patterns[0]
        rows, columns = self.shape
        live = (rows - self.dead_rows) * (columns - self.dead_columns)
        if 1 - (1 - self.zeros) * rows * columns / live < _DENSE:
            return "whole rows, columns" if self.dead_rows or self.dead_columns else "dense"
        return "unstructured"


@dataclass(frozen=True)
class Layer:
    """What an encoder layer could lose exactly; see bertkern.shrink.

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
        head, rows = [*head, "fp32 gain", "int8 gain", "runs as", "why"], _grouped(self.rows)
        if not any(row[-1] for row in rows):
            head, rows = head[:-1], [row[:-1] for row in rows]
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


def inspect(model: nn.Module) -> Inspection:
    """The structure of `model`: zeros of every linear layer and embedding table, dead heads and units, and the gain.

    Also says what `quantize_` would make of each linear layer. Changes nothing. A dead row is an output that is always
    its bias, a dead column an input that is never read. Under torch.nn.utils.prune, the masked weights are looked at.

    Args:
        model: any module; dead heads and units are found in transformers models of known families.

    Example:
        >>> found = inspect(nn.Sequential(nn.Linear(4, 2)))
        >>> found.rows[0].runs, found.rows[0].structure
        ('int8', 'dense')
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"inspect: expected a torch.nn.Module. Got {type(model).__name__}.")
    choices = {choice.name: choice for choice in plan.choose(model, Int8Config())}
    tables = set(family_tables(model))
    found, left = shrink.find(model)
    slices = shrink.slices(model, found)
    rows: list[Matrix] = []
    counted: dict[Any, str] = {}
    odd, zeros, weights = [], 0, 0
    for name, module in model.named_modules():
        if name in choices:
            choice = choices[name]
            runs, why = {"int8": INT8, "packed": float_name(module), "left": "torch"}[choice.action], choice.reason
        elif isinstance(module, (Int8Linear, Int8Embedding)):
            runs, why = f"{INT8} already", ""
        elif isinstance(module, nn.Embedding):
            runs, why = INT8 if name in tables else "torch", ""
        else:
            continue
        int8 = isinstance(module, (Int8Linear, Int8Embedding))
        weight = module.weight_codes if int8 else shrink.effective(module)
        about = (name, type(module).__name__, () if weight is None else tuple(weight.shape), runs, why)
        if weight is None or not shrink.readable(weight) or weight.numel() == 0 or weight.dim() != 2:
            rows.append(Matrix(*about))
            continue
        linear = not isinstance(module, (nn.Embedding, Int8Embedding))
        same_as = counted.setdefault(_identity(module), name)
        if same_as == name:
            structure = _structure(weight)
            weights, zeros = weights + weight.numel(), zeros + round(structure["zeros"] * weight.numel())
            if not int8 and not finite(weight):
                odd.append(name)
        else:
            first = next(row for row in rows if row.name == same_as)
            structure = {key: getattr(first, key) for key in _FOUND}
        times = _times(weight, structure["densities"], slices.get(name)) if linear else None
        pruned = plan.pruned_by_hook(module)
        same_as = "" if same_as == name else same_as
        rows.append(Matrix(*about, **structure, pruned=pruned, same_as=same_as, times=times))
    layers = [
        Layer(n, f.heads, f.dead_heads, f.units, len(f.dead_units), len(f.foldable_units)) for n, f in found.items()
    ]
    layers += [Layer(name, why=why) for name, why in left.items()]
    return Inspection(
        "What could run how",
        tuple(rows),
        notes=_notes(rows, layers, odd),
        layers=tuple(layers),
        totals=_totals(rows, layers, weights, zeros, slices),
    )


def estimate(densities: Mapping[str, float], dtype: str) -> float:
    """The time of a linear layer by the best of bertkern's kernels, as a share of its dense one: 1 where dense is best.

    The cost model of `tuning`, which `accelerate` replaces by measurement.

    Args:
        densities: of blocks "16x4", "1x4" and "1x1", as in `Matrix.densities`.
        dtype: "fp32" or "int8".

    Example:
        >>> estimate({"16x4": 0.2, "1x4": 0.2, "1x1": 0.2}, "int8")
        0.24
    """
    if dtype not in ("fp32", "int8"):
        raise ValueError(f"estimate: expected dtype fp32 or int8. Got {dtype!r}.")
    single = densities["1x4" if dtype == "int8" else "1x1"]
    best = min(cost("panels", 16, densities["16x4"]), cost("tokens", 1, single))
    return best if best < MARGIN else 1.0


class _Blocks:
    """Which blocks of a matrix hold anything, for blocks whose sides are powers of two.

    Args:
        mask: uint8 [N, K], 1 where the matrix is not zero.
    """

    def __init__(self, mask: Tensor) -> None:
        self.shape = mask.shape
        self._grids = {(1, 1): mask}

    def grid(self, rows: int, columns: int) -> Tensor:
        """uint8 [N / rows, K / columns], rounded up: 1 where the block holds anything."""
        if (rows, columns) not in self._grids:
            if rows > 1:
                fine = _padded(self.grid(rows // 2, columns), 0, 2)
                made = fine[0::2] | fine[1::2]
            else:
                # Two neighbours are one int16, so that whole vectors are compared.
                pairs = _padded(self.grid(rows, columns // 2), 1, 2).view(torch.int16)
                made = (pairs != 0).view(torch.uint8)
            self._grids[rows, columns] = made
        return self._grids[rows, columns]

    def density(self, rows: int, columns: int) -> float:
        """The share of blocks that hold anything."""
        grid = self.grid(rows, columns)
        return int(grid.count_nonzero()) / grid.numel()

    def best(self, live_rows: Tensor, live_columns: Tensor, nonzeros: int) -> tuple[int, int] | None:
        """The largest block that explains the zeros of live rows and columns; see Matrix.block."""
        zeros = int(live_rows.sum()) * int(live_columns.sum()) - nonzeros
        allowed = _UNEXPLAINED * min(zeros, nonzeros)
        best, left, seen = (1, 1), 0.0, {(1, 1)}
        queue = [(1, 1)]
        # A block that fails is part of none that does not, so few are ever looked at.
        while queue:
            rows, columns = queue.pop()
            for block in ((2 * rows, columns), (rows, 2 * columns)):
                larger = any(side >= 2 * whole for side, whole in zip(block, self.shape, strict=True))
                if block in seen or larger or max(block) > _LARGEST:
                    continue
                seen.add(block)
                uncovered = self._live(block, live_rows, live_columns) - nonzeros
                if uncovered <= allowed:
                    queue.append(block)
                    if (-block[0] * block[1], uncovered) < (-best[0] * best[1], left):
                        best, left = block, uncovered
        return best if best != (1, 1) and zeros else None

    def _live(self, block: tuple[int, int], rows: Tensor, columns: Tensor) -> float:
        """How many weights in live rows and columns lie in blocks that hold anything."""
        rows = _padded(rows[:, None], 0, block[0]).view(-1, block[0]).sum(1).double()
        columns = _padded(columns[:, None], 0, block[1]).view(-1, block[1]).sum(1).float()
        # Sums of a row are whole numbers below 2^24, exact in fp32.
        return float(rows @ (self.grid(*block).float() @ columns).double())

    def patterns(self) -> tuple[str, ...]:
        """The n:m patterns that hold everywhere; the last m are fewer where the side is no multiple of m."""
        made = []
        mask = self._grids[1, 1]
        most: dict[tuple[str, int], int] = {}
        for m in (2, 4):
            # The bytes of an int16 or int32 are m neighbours; the product's highest byte is their sum.
            words = _padded(mask, 1, m).view(torch.int16 if m == 2 else torch.int32)
            sums = words * (0x0101 if m == 2 else 0x01010101) >> (8 if m == 2 else 24)
            most["K", m] = int(sums.max())
            columns = _padded(mask, 0, m)
            most["N", m] = int(sum(columns[i::m] for i in range(m)).max())
        for side, size in (("K", self.shape[1]), ("N", self.shape[0])):
            made += [(n / m, f"{n}:{m} along {side}") for n, m in _PATTERNS if size >= m and most[side, m] <= n]
        return tuple(name for _, name in sorted(made, key=lambda item: item[0]))


# The fields of Matrix that `_structure` finds.
_FOUND = ("zeros", "dead_rows", "dead_columns", "block", "densities", "patterns")


def _structure(weight: Tensor) -> dict[str, Any]:
    mask = (weight != 0).view(torch.uint8)
    nonzeros = int(mask.count_nonzero())
    zeros = 1 - nonzeros / mask.numel()
    if nonzeros == mask.numel():
        full = {_by(block): 1.0 for block in ((1, 1), *BLOCKS)}
        return dict(zip(_FOUND, (zeros, 0, 0, None, full, ()), strict=True))
    live_rows, live_columns = mask.amax(1), mask.amax(0)
    blocks = _Blocks(mask.contiguous())
    block = blocks.best(live_rows, live_columns, nonzeros) if nonzeros else None
    listed = dict.fromkeys([(1, 1), *BLOCKS, *([block] if block else [])])
    densities = {_by(listed_block): blocks.density(*listed_block) for listed_block in listed}
    # With fewer zeros none can hold, even where the last groups are short.
    patterns = blocks.patterns() if nonzeros and zeros >= 0.25 else ()
    dead = int((live_rows == 0).sum()), int((live_columns == 0).sum())
    return dict(zip(_FOUND, (zeros, *dead, block, densities, patterns), strict=True))


def _times(weight: Tensor, densities: Mapping[str, float], cut: tuple[int, Tensor] | None) -> dict[str, float]:
    """The estimate by dtype; `cut`: the dimension and the indices that dead heads and units leave."""
    share = 1.0
    if cut is not None:
        dim, kept = cut
        share = len(kept) / weight.shape[dim]
        blocks = _Blocks((weight.index_select(dim, kept.to(weight.device)) != 0).view(torch.uint8))
        densities = {_by(block): blocks.density(*block) for block in ((1, 1), (1, 4), (16, 4))}
    return {dtype: share * estimate(densities, dtype) for dtype in ("fp32", "int8")}


def _identity(module: nn.Module) -> Any:
    """What is the same for modules whose weights are the same tensor."""
    if isinstance(module, (Int8Linear, Int8Embedding)):
        return id(module.weight_codes)
    own = module._parameters.get("weight")
    return id(module) if own is None else id(own)


def _totals(
    rows: Iterable[Matrix],
    layers: Iterable[Layer],
    weights: int,
    zeros: int,
    slices: Mapping[str, tuple[int, Tensor]],
) -> Totals:
    linears = [row for row in rows if row.times is not None]
    products = {row.name: row.shape[0] * row.shape[1] for row in linears}
    every, kept = sum(products.values()), 0.0
    for row in linears:
        dim, left = slices.get(row.name, (0, range(row.shape[0])))
        kept += products[row.name] * len(left) / row.shape[dim]
    speedup = {}
    for dtype in ("fp32", "int8") if every else ():
        time = sum(products[row.name] * row.times[dtype] for row in linears)
        speedup[dtype] = every / time
    return Totals(
        weights,
        zeros,
        sum(layer.heads for layer in layers),
        sum(len(layer.dead_heads) for layer in layers),
        sum(layer.units for layer in layers),
        sum(layer.dead_units for layer in layers),
        sum(layer.foldable_units for layer in layers),
        kept / every if every else 1.0,
        speedup,
    )


def _notes(rows: Iterable[Matrix], layers: Iterable[Layer], odd: list[str]) -> tuple[str, ...]:
    notes = []
    if odd:
        notes.append(f"NaN or Inf, neither of which is zero, in: {', '.join(odd)}")
    if any(row.pruned for row in rows):
        notes.append("Masked by torch.nn.utils.prune: counted are the weights with their masks.")
    reasons = Counter(layer.why for layer in layers if layer.why)
    notes += [f"{count} layers not looked into for heads and units: {why}" for why, count in reasons.items()]
    return tuple(notes)


def _grouped(rows: Iterable[Matrix]) -> list[list[str]]:
    """Lines of the table; modules that differ by the number of their layer and what was counted share one."""
    groups: dict[tuple[str, ...], list[Matrix]] = {}
    for row in rows:
        why = f"same weights as {row.same_as}" if row.same_as else row.why
        groups.setdefault((general(row.name), " x ".join(map(str, row.shape)), row.runs, why), []).append(row)
    lines = []
    for (name, shape, runs, why), members in groups.items():
        counted = [row for row in members if row.zeros is not None]
        blocks = [row.densities[_by(row.block or (1, 1))] for row in counted]
        timed = [row.times for row in counted if row.times is not None]
        cells = [
            _span([row.zeros for row in counted], _percent),
            _span([row.dead_rows for row in counted], str),
            _span([row.dead_columns for row in counted], str),
            _words([row.structure for row in counted]),
            _span(blocks, _percent),
            *(_span([1 / times[dtype] for times in timed], "{:.1f}x".format) for dtype in ("fp32", "int8")),
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


def _layer_line(layer: Layer) -> list[str]:
    heads = " ".join(map(str, layer.dead_heads)) or "none"
    return [layer.name, str(layer.heads), heads, *map(str, (layer.units, layer.dead_units, layer.foldable_units))]


def _padded(x: Tensor, dim: int, multiple: int) -> Tensor:
    """`x` [R, C] with zeros behind, so that its size along `dim` is a multiple; contiguous."""
    more = -x.shape[dim] % multiple
    if more:
        x = nn.functional.pad(x, (0, more) if dim == 1 else (0, 0, 0, more))
    return x.contiguous()


def _share(pattern: str) -> float:
    n, m = pattern.split(" ")[0].split(":")
    return int(n) / int(m)


def _by(block: tuple[int, int]) -> str:
    return f"{block[0]}x{block[1]}"


class _Callable(ModuleType):
    """`import bertkern.inspect` puts this module where the package has the function: both do the same."""

    def __call__(self, model: nn.Module) -> Inspection:
        return inspect(model)


sys.modules[__name__].__class__ = _Callable
