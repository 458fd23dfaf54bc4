"""W8A8."""

from dataclasses import dataclass
from typing import ClassVar

from ..versioned import Versioned

WEIGHTS = ("per_channel", "per_tensor")
ACTIVATIONS = ("dynamic", "static")


@dataclass(frozen=True)
class Int8Config(Versioned):
    """W8A8, the arithmetic of Q8BERT: int8 weights and tables, int8 activations, int32 sums.

    Attributes:
        weight: "per_channel" (one scale per output feature or table row) or "per_tensor" (Q8BERT).
        activation: "dynamic" (each token's own range from its lowest to its highest value, at run time) or "static"
            (calibrated or trained ranges).
        activation_unsigned: static ranges as uint8 with a zero point instead of int8.
        embeddings: whether word, position and token-type tables become int8.
        pooler: whether the pooler becomes int8.
        head: whether the task head becomes int8.
        skip: names of modules to leave as they are: exact, a suffix after a dot, or with the wildcards of fnmatch;
            everything below a named module is skipped, too.
        keep_original: whether the float modules are kept, so that `restore` can undo the change exactly.
        version: of this record; a file of an unknown version is refused.

    Example:
        >>> Int8Config.from_dict(Int8Config(skip=("classifier",)).to_dict()).skip
        ('classifier',)

    Source: arXiv 1910.06188.
    """

    weight: str = "per_channel"
    activation: str = "dynamic"
    activation_unsigned: bool = False
    embeddings: bool = True
    pooler: bool = True
    head: bool = True
    skip: tuple[str, ...] = ()
    keep_original: bool = False
    version: int = 1

    KIND: ClassVar[str] = "int8"
    # What transformers asks of an object handed to from_pretrained(quantization_config=...).
    quant_method: ClassVar[str] = "bertkern"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._expect_one_of("weight", WEIGHTS)
        self._expect_one_of("activation", ACTIVATIONS)
        for name in ("activation_unsigned", "embeddings", "pooler", "head", "keep_original"):
            self._expect_one_of(name, (True, False))
        if isinstance(self.skip, str) or not all(isinstance(pattern, str) for pattern in self.skip):
            raise ValueError(f"Int8Config: expected skip to be a sequence of names. Got {self.skip!r}.")
        object.__setattr__(self, "skip", tuple(self.skip))
        if self.activation_unsigned and self.activation != "static":
            raise ValueError('Int8Config: expected activation "static" with activation_unsigned. Got "dynamic".')
