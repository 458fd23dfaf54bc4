"""Group-wise low-bit weights."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..names import fits
from ..versioned import Versioned

AXES = ("n", "k")
METHODS = ("minmax", "percentile", "mse")
ACTIVATIONS = ("dynamic", "static", "float")
LEAST, MOST = 2, 8
GROUPS = 128

Bits = int | tuple[int, ...]


def whole_by_default(method: str) -> bool:
    """Whether the zero points of a method's grids are whole where nothing else is said: see `GroupwiseConfig`."""
    return method != "mse"


@dataclass(frozen=True)
class GroupwiseConfig(Versioned):
    """Low-bit weights in groups, the method of Q-BERT: 2 to 8 bits, a scale and a zero point a group.

    Embedding tables are cut into rows, each with a range of its own. A language-model head that is tied to such a table
    shares its codes; while `head` is False its activations stay float.

    Attributes:
        bits: of the weights of linear layers that no pattern of layer_bits names, 2 to 8.
        groups: into how many groups each matrix is cut, of ceil(side / groups) neighbours, the last of fewer; where
            the side has fewer neighbours than groups, each is one. 128 if neither this nor group_size is given.
        group_size: neighbours in a group, instead of groups.
        axis: "n" (groups of output features, the paper) or "k" (of input features, its authors' code).
        symmetric: grids without zero points, symmetric about 0.
        whole_zero: zero points are whole, so that 0 is a point of each grid, as in the authors' code: weights that are
            zero stay so, and many small ones do not all move the same way. False: real zero points, the paper. None:
            whole, but for the method "mse", whose search sees to small weights itself: at 2 bits a grid with a 0 has
            one step more to one side than to the other, and the errors of a group add up.
        shared: with axis "k": all output features share the groups' ranges, as in the authors' code.
        layer_bits: other bits, by name of modules as in `skip`: a number, or one for each group of a matrix. Of several
            patterns that name a module the one with most characters that are no wildcards counts, whatever their order;
            of equally many, the last by the alphabet. Kept as pairs in that order.
        method: "minmax" (grids from the smallest to the largest weight of a group), "percentile" (from its 0.1th to its
            99.9th percentile) or "mse" (the grid of the least squared error that a search finds). all-MiniLM-L6-v2,
            Spearman on the test set of STS-B, fp32 0.8203: 3 bits in 128 groups 0.7575 (minmax), 0.8169 (mse); 2 bits
            and groups of 64 along K 0.7399, 0.7974.
        activation: "dynamic" and "static": int8, as of Int8Config; "float": only weights are rounded.
        activation_unsigned: static ranges as uint8 with a zero point instead of int8.
        embedding_bits: of word, position and token-type tables, unless layer_bits names them; None: they stay float.
        pooler: whether the pooler becomes low-bit; the paper leaves it.
        head: whether the task head becomes low-bit; the paper leaves it.
        skip: names of modules to leave as they are: exact, a suffix after a dot, or with the wildcards of fnmatch;
            everything below a named module is skipped, too.
        keep_original: whether the float modules are kept, so that `restore` can undo the change exactly.
        version: of this record; a file of an unknown version is refused.

    Example:
        >>> config = GroupwiseConfig(bits=2, layer_bits={"layer.3": 4, "layer.3.output": 8})
        >>> [config.bits_of([f"encoder.layer.{name}"]) for name in ("3.output.dense", "3.intermediate.dense", "4")]
        [8, 4, 2]
        >>> GroupwiseConfig.from_dict(config.to_dict()) == config
        True

    Source: arXiv 1909.05840.
    """

    bits: int = 4
    groups: int | None = None
    group_size: int | None = None
    axis: str = "n"
    symmetric: bool = False
    whole_zero: bool | None = None
    shared: bool = False
    layer_bits: Mapping[str, int | Sequence[int]] | tuple[tuple[str, Bits], ...] = ()
    method: str = "minmax"
    activation: str = "dynamic"
    activation_unsigned: bool = False
    embedding_bits: int | None = 8
    pooler: bool = False
    head: bool = False
    skip: tuple[str, ...] = ()
    keep_original: bool = False
    version: int = 1

    KIND: ClassVar[str] = "groupwise"
    # What transformers asks of an object handed to from_pretrained(quantization_config=...).
    quant_method: ClassVar[str] = "bertkern"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._expect_whole("bits", LEAST, MOST)
        if self.embedding_bits is not None:
            self._expect_whole("embedding_bits", LEAST, MOST)
        if self.groups is not None and self.group_size is not None:
            raise ValueError(
                f"GroupwiseConfig: expected groups or group_size. Got both: {self.groups!r} and {self.group_size!r}."
            )
        if self.groups is None and self.group_size is None:
            object.__setattr__(self, "groups", GROUPS)
        self._expect_whole("groups" if self.group_size is None else "group_size", 1)
        self._expect_one_of("axis", AXES)
        self._expect_one_of("method", METHODS)
        if self.whole_zero is None:
            object.__setattr__(self, "whole_zero", whole_by_default(self.method))
        self._expect_one_of("activation", ACTIVATIONS)
        for name in ("symmetric", "whole_zero", "shared", "activation_unsigned", "pooler", "head", "keep_original"):
            self._expect_one_of(name, (True, False))
        if self.shared and self.axis != "k":
            raise ValueError('GroupwiseConfig: expected axis "k" with shared. Got "n".')
        if self.activation_unsigned and self.activation != "static":
            raise ValueError(
                f'GroupwiseConfig: expected activation "static" with activation_unsigned. Got "{self.activation}".'
            )
        if isinstance(self.skip, str) or not all(isinstance(pattern, str) for pattern in self.skip):
            raise ValueError(f"GroupwiseConfig: expected skip to be a sequence of names. Got {self.skip!r}.")
        object.__setattr__(self, "skip", tuple(self.skip))
        object.__setattr__(self, "layer_bits", _layer_bits(self.layer_bits))

    def to_dict(self) -> dict[str, Any]:
        """A dict of JSON values that `from_dict` reads; layer_bits is an object there."""
        bits = {name: list(bits) if isinstance(bits, tuple) else bits for name, bits in self.layer_bits}
        return {**super().to_dict(), "layer_bits": bits}

    def bits_of(self, names: Iterable[str], table: bool = False) -> Bits:
        """The bits of a matrix whose module has `names`; of a table, embedding_bits unless a pattern names it."""
        names = list(names)
        found = [bits for pattern, bits in self.layer_bits if fits(pattern, names)]
        return found[-1] if found else self.embedding_bits if table else self.bits

    def size_of(self, side: int) -> int:
        """How many neighbours are a group where there are `side`."""
        return self.group_size or -(-side // self.groups)


def _layer_bits(given: Any) -> tuple[tuple[str, Bits], ...]:
    """Pairs (pattern, bits), what counts most last."""

    def wrong(expected: str, got: Any) -> ValueError:
        return ValueError(f"GroupwiseConfig: expected {expected}. Got {got!r}.")

    pairs = list(given.items()) if isinstance(given, Mapping) else given
    in_pairs = isinstance(pairs, (list, tuple)) and all(isinstance(pair, (list, tuple)) for pair in pairs)
    if not in_pairs or not all(len(pair) == 2 for pair in pairs):
        raise wrong("layer_bits to be a mapping of names", given)
    made: dict[str, Bits] = {}
    for name, bits in pairs:
        if not isinstance(name, str) or not name or name in made:
            raise wrong("layer_bits to name every module once", name)
        each = bits if isinstance(bits, (list, tuple)) else [bits]
        if not each or not all(type(width) is int and LEAST <= width <= MOST for width in each):
            raise wrong(f"layer_bits of {name} to be whole numbers from {LEAST} to {MOST}", bits)
        made[name] = bits if isinstance(bits, int) else tuple(bits)
    return tuple(sorted(made.items(), key=lambda pair: (_literal(pair[0]), pair[0])))


def _literal(pattern: str) -> int:
    return sum(character not in "*?[]" for character in pattern)
