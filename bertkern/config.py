"""What a user asks for: frozen, versioned, JSON both ways."""

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

WEIGHTS = ("per_channel", "per_tensor")
ACTIVATIONS = ("dynamic", "static")


@dataclass(frozen=True)
class Int8Config:
    """W8A8, the arithmetic of Q8BERT: int8 weights and tables, int8 activations, int32 sums.

    Attributes:
        weight: "per_channel" (one scale per output feature or table row) or "per_tensor" (Q8BERT).
        activation: "dynamic" (a scale per token, made at run time) or "static" (calibrated or trained ranges).
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
        if type(self.version) is not int or self.version != 1:
            raise ValueError(f"Int8Config: expected version 1. Got {self.version!r}.")
        _one_of("weight", self.weight, WEIGHTS)
        _one_of("activation", self.activation, ACTIVATIONS)
        for name in ("activation_unsigned", "embeddings", "pooler", "head", "keep_original"):
            _one_of(name, getattr(self, name), (True, False))
        if isinstance(self.skip, str) or not all(isinstance(pattern, str) for pattern in self.skip):
            raise ValueError(f"Int8Config: expected skip to be a sequence of names. Got {self.skip!r}.")
        object.__setattr__(self, "skip", tuple(self.skip))
        if self.activation_unsigned and self.activation != "static":
            raise ValueError('Int8Config: expected activation "static" with activation_unsigned. Got "dynamic".')

    def to_dict(self) -> dict[str, Any]:
        """A dict of JSON values that `from_dict` reads."""
        return {"kind": self.KIND, **asdict(self), "skip": list(self.skip)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Int8Config":
        """The config of `to_dict`'s record.

        Raises:
            ValueError: an unknown kind, version or field, or a value that is not allowed.
        """
        values = dict(values)
        kind = values.pop("kind", cls.KIND)
        if kind != cls.KIND:
            raise ValueError(f'Int8Config: expected kind "{cls.KIND}". Got {kind!r}.')
        # The version comes first: a newer record may well have fields that this one does not know.
        if "version" in values and values["version"] != 1:
            raise ValueError(f"Int8Config: expected version 1. Got {values['version']!r}.")
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"Int8Config: expected fields among {sorted(known)}. Got {unknown}.")
        return cls(**values)


def _one_of(name: str, value: object, allowed: tuple) -> None:
    if not any(value is choice or (isinstance(choice, str) and value == choice) for choice in allowed):
        raise ValueError(f"Int8Config: expected {name} to be one of {allowed}. Got {value!r}.")
