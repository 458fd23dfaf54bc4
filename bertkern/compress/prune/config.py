"""What is pruned, and in which shape: frozen, versioned, JSON both ways."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from bertkern.versioned import Versioned

CRITERIA = ("magnitude", "random")
SCOPES = ("matrix", "global")
NORMS = ("l1", "l2", "max")
AXES = ("rows", "columns")


@dataclass(frozen=True, kw_only=True)
class PruneConfig(Versioned):
    """What all kinds of pruning have in common; the kinds are its subclasses, and its `from_dict` reads every kind.

    The weights of linear layers in the body of a transformers model are pruned (in a model without any, of all linear
    layers); biases and LayerNorms never are. Layers beside a transformers model, such as the Dense of a
    SentenceTransformer, stay.

    Attributes:
        skip: names of modules to leave as they are: exact, a suffix after a dot, or with the wildcards of fnmatch;
            everything below a named module is skipped, too. Each must name a linear layer or a table of the model.
        embeddings: whether the word-embedding table of a transformers model is pruned. A language-model head that is
            tied to the table is one tensor with it: pruned where the table is, once.
        pooler: whether the pooler is pruned.
        head: whether the task head is pruned.
        criterion: "magnitude" (the smallest go) or "random" (the baseline that magnitude must beat).
        seed: of "random".
        version: of this record; a file of an unknown version is refused.

    Source: arXiv 2002.08307: masks on the word table, Q, K, V, output, both feed-forward matrices and the pooler.
    """

    skip: tuple[str, ...] = ()
    embeddings: bool = False
    pooler: bool = True
    head: bool = False
    criterion: str = "magnitude"
    seed: int = 0
    version: int = 1

    def __post_init__(self) -> None:
        if not self.KIND:
            raise TypeError(f"PruneConfig: expected one of its kinds, such as {BlockPruneConfig.__name__}.")
        super().__post_init__()
        for name in ("embeddings", "pooler", "head"):
            self._expect_one_of(name, (True, False))
        self._expect_one_of("criterion", CRITERIA)
        self._expect_whole("seed", 0, 2**31 - 1)
        if not _are_names(self.skip):
            raise ValueError(f"{self._name}: expected skip to be a sequence of names. Got {self.skip!r}.")
        object.__setattr__(self, "skip", tuple(self.skip))

    def block_of(self, shape: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of what is pruned or kept as one in a matrix of `shape`."""
        return 1, 1

    def sparsity_of(self, names_it: Callable[[str], bool]) -> tuple[float, bool]:
        """(sparsity asked of a matrix, whether it is an override).

        Args:
            names_it: whether a pattern names the matrix.
        """
        raise NotImplementedError

    @classmethod
    def _kinds(cls) -> tuple[type["PruneConfig"], ...]:
        return (cls,) if cls.KIND else KINDS


@dataclass(frozen=True, kw_only=True)
class _ToSparsity(PruneConfig):
    """Pruning up to a share of the weights, blocks or rows.

    Attributes:
        sparsity: the share of units (weights, blocks, rows or columns) that become zero, 0 to 1; rounded to a whole
            number of them, halves to the even one.
        scope: "matrix" (each matrix gets that share) or "global" (all matrices together do, wherever the smallest
            units stand).
        overrides: other sparsities for some matrices, by patterns as in `skip`, of which the first that names a
            matrix counts. Such a matrix gets its own share, also where the scope is "global".
    """

    sparsity: float
    scope: str = "matrix"
    overrides: Mapping[str, float] | Sequence[tuple[str, float]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self._expect_share("sparsity", self.sparsity)
        self._expect_one_of("scope", SCOPES)
        pairs = self.overrides.items() if isinstance(self.overrides, Mapping) else self.overrides
        try:
            pairs = tuple((pattern, sparsity) for pattern, sparsity in pairs)
        except (TypeError, ValueError):
            pairs = ((None, None),)
        if not _are_names([pattern for pattern, _ in pairs]):
            raise ValueError(f"{self._name}: expected overrides to be sparsities by name. Got {self.overrides!r}.")
        for pattern, sparsity in pairs:
            self._expect_share(f'overrides["{pattern}"]', sparsity)
        # Pairs, not a mapping: a frozen config can be hashed.
        object.__setattr__(self, "overrides", pairs)

    def sparsity_of(self, names_it: Callable[[str], bool]) -> tuple[float, bool]:
        for pattern, sparsity in self.overrides:
            if names_it(pattern):
                return sparsity, True
        return self.sparsity, False


@dataclass(frozen=True, kw_only=True)
class UnstructuredPruneConfig(_ToSparsity):
    """Single weights, wherever they stand: the method of Gordon et al., with its matrices by default.

    Attributes:
        sparsity, scope, overrides: how many; see `BlockPruneConfig`.
        embeddings: as in the paper, the word table is pruned, too.
        skip, pooler, head, criterion, seed, version: see `PruneConfig`.

    Example:
        >>> UnstructuredPruneConfig.from_dict(UnstructuredPruneConfig(sparsity=0.9).to_dict()).sparsity
        0.9

    Source: arXiv 2002.08307.
    """

    embeddings: bool = True

    KIND: ClassVar[str] = "unstructured"


@dataclass(frozen=True, kw_only=True)
class BlockPruneConfig(_ToSparsity):
    """Blocks of a weight [N, K], which block-sparse kernels skip.

    Blocks are counted from the first row and column; those at the far edges are smaller where the matrix is no
    multiple, and count as one block each.

    Attributes:
        sparsity: the share of blocks that become zero, 0 to 1; rounded to a whole number of them, halves to the even
            one.
        scope: "matrix" (each matrix gets that share) or "global" (all matrices together do, wherever the smallest
            blocks stand).
        overrides: other sparsities for some matrices, by patterns as in `skip`, of which the first that names a
            matrix counts. Such a matrix gets its own share, also where the scope is "global".
        block: (rows, columns), such as (16, 4), (1, 4) or (32, 32).
        norm: what makes a block small: the mean of its magnitudes ("l1"), their root mean square ("l2", which moves
            the matrix least) or the largest ("max"). Means, so that a smaller block at an edge is no smaller for that.
        skip, embeddings, pooler, head, criterion, seed, version: see `PruneConfig`.

    Example:
        >>> BlockPruneConfig(sparsity=0.8, block=(16, 4)).block_of((64, 64))
        (16, 4)

    Source: arXiv 2109.04838 (blocks of BERT's matrices); arXiv 1710.01878 (by magnitude).
    """

    block: tuple[int, int] = (16, 4)
    norm: str = "l2"

    KIND: ClassVar[str] = "block"

    def __post_init__(self) -> None:
        super().__post_init__()
        block = tuple(self.block) if isinstance(self.block, (tuple, list)) else ()
        if len(block) != 2 or not all(type(size) is int and size >= 1 for size in block):
            raise ValueError(
                f"{self._name}: expected block to be (rows, columns), whole numbers of at least 1. Got {self.block!r}."
            )
        object.__setattr__(self, "block", block)
        self._expect_one_of("norm", NORMS)

    def block_of(self, shape: tuple[int, int]) -> tuple[int, int]:
        return self.block


@dataclass(frozen=True, kw_only=True)
class RowColumnPruneConfig(_ToSparsity):
    """Whole rows (outputs) or whole columns (inputs) of a weight [N, K].

    A row's bias stays, so a unit whose row is zero still puts out act(bias).

    Attributes:
        axis: "rows" or "columns".
        norm: what makes a row small; see `BlockPruneConfig`.
        sparsity, scope, overrides: how many; see `BlockPruneConfig`. In scope "global" a row counts as one, however
            long it is.
        skip, embeddings, pooler, head, criterion, seed, version: see `PruneConfig`.

    Example:
        >>> RowColumnPruneConfig(sparsity=0.5, axis="columns").block_of((3072, 768))
        (3072, 1)
    """

    axis: str = "rows"
    norm: str = "l2"

    KIND: ClassVar[str] = "row_column"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._expect_one_of("axis", AXES)
        self._expect_one_of("norm", NORMS)

    def block_of(self, shape: tuple[int, int]) -> tuple[int, int]:
        return (1, shape[1]) if self.axis == "rows" else (shape[0], 1)


@dataclass(frozen=True, kw_only=True)
class NmPruneConfig(PruneConfig):
    """At most `n` of any `m` neighbours along K are kept, such as 2:4.

    Groups are counted from the first column; the last one is shorter where K is no multiple of m, and keeps up to n.

    Attributes:
        n: how many of a group are kept.
        m: how many weights a group has.
        skip, embeddings, pooler, head, criterion, seed, version: see `PruneConfig`.

    Example:
        >>> NmPruneConfig(n=2, m=4).sparsity
        0.5

    Source: arXiv 2104.08378 (2:4).
    """

    n: int = 2
    m: int = 4

    KIND: ClassVar[str] = "n_m"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._expect_whole("m", 1)
        self._expect_whole("n", 0, self.m)

    @property
    def sparsity(self) -> float:
        """The share of a full group that becomes zero."""
        return (self.m - self.n) / self.m

    def sparsity_of(self, names_it: Callable[[str], bool]) -> tuple[float, bool]:
        return self.sparsity, True


KINDS = (UnstructuredPruneConfig, BlockPruneConfig, RowColumnPruneConfig, NmPruneConfig)


def _are_names(names: Any) -> bool:
    return isinstance(names, (tuple, list)) and all(isinstance(name, str) for name in names)
