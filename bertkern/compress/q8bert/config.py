"""What of a BERT is quantized, and how: the settings of Q8BERT, one entry per kind of operation."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

VERSION = 1
MODES = ("none", "dynamic", "ema")

# What NLP Architect takes for a field that an operation's entry in its JSON leaves out.
_JSON_DEFAULTS = {"mode": "none"}


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class OpSettings:
    """How one kind of operation (say, every query projection) is quantized.

    Attributes:
        mode: "ema" learns a static activation range as an exponential moving average; "dynamic" takes the range of
            the live tensor; "none" leaves the operation in floating point.
        weight_bits: width of the weight codes, 2 to 8.
        activation_bits: width of the activation codes, 2 to 8 (the int8 kernels run 8).
        start_step: number of training steps that a module runs in floating point before it begins to quantize.
        ema_decay: d in range <- range - (1 - d) (range - max|x|).
        requantize_output: quantize the output too, with a range of its own (linears only).
    """

    mode: str = "ema"
    weight_bits: int = 8
    activation_bits: int = 8
    start_step: int = 0
    ema_decay: float = 0.9999
    requantize_output: bool = True

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"OpSettings: expected mode to be one of {', '.join(MODES)}. Got {self.mode!r}.")
        for name in ("weight_bits", "activation_bits"):
            bits = getattr(self, name)
            if not _is_int(bits) or not 2 <= bits <= 8:
                raise ValueError(f"OpSettings: expected {name} to be an integer from 2 to 8. Got {bits!r}.")
        if not _is_int(self.start_step) or self.start_step < 0:
            raise ValueError(f"OpSettings: expected start_step to be an integer >= 0. Got {self.start_step!r}.")
        if not isinstance(self.ema_decay, (int, float)) or not 0 <= self.ema_decay <= 1:
            raise ValueError(f"OpSettings: expected ema_decay to be a number from 0 to 1. Got {self.ema_decay!r}.")
        if not isinstance(self.requantize_output, bool):
            raise ValueError(
                f"OpSettings: expected requantize_output to be true or false. Got {self.requantize_output!r}."
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, op: str = "") -> "OpSettings":
        """The settings written in `values`; an unknown or impossible field raises ValueError and names `op`."""
        where = f"Q8BertConfig.{op}" if op else "OpSettings"
        if not isinstance(values, Mapping):
            raise ValueError(f"{where}: expected a mapping of settings. Got {values!r}.")
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"{where}: expected only the fields {', '.join(known)}. Got {', '.join(unknown)}.")
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None


PAPER_SETTINGS = OpSettings()


@dataclass(frozen=True)
class Q8BertConfig:
    """Settings of Q8BERT for a model, keyed as in NLP Architect's JSON; None leaves an operation as it is.

    The default is the paper's: every linear and every embedding table, 8 bits, ranges by moving average.

    >>> Q8BertConfig.uniform(mode="dynamic", skip=("head",)).head is None
    True

    Source: Zafrir et al. 2019, Q8BERT, arXiv 1910.06188.
    """

    attention_query: OpSettings | None = PAPER_SETTINGS
    attention_key: OpSettings | None = PAPER_SETTINGS
    attention_value: OpSettings | None = PAPER_SETTINGS
    attention_output: OpSettings | None = PAPER_SETTINGS
    ffn_intermediate: OpSettings | None = PAPER_SETTINGS
    ffn_output: OpSettings | None = PAPER_SETTINGS
    pooler: OpSettings | None = PAPER_SETTINGS
    head: OpSettings | None = PAPER_SETTINGS
    word_embeddings: OpSettings | None = PAPER_SETTINGS
    position_embeddings: OpSettings | None = PAPER_SETTINGS
    token_type_embeddings: OpSettings | None = PAPER_SETTINGS
    version: int = VERSION

    def __post_init__(self) -> None:
        if self.version != VERSION:
            raise ValueError(f"Q8BertConfig: expected version {VERSION}. Got {self.version!r}.")
        for op, settings in self.items():
            if settings is not None and not isinstance(settings, OpSettings):
                raise ValueError(f"Q8BertConfig.{op}: expected OpSettings or None. Got {settings!r}.")

    @classmethod
    def uniform(cls, *, skip: tuple[str, ...] = (), **settings: Any) -> "Q8BertConfig":
        """The same `settings` (fields of OpSettings) for every operation, except those in `skip`, left as they are."""
        unknown = sorted(set(skip) - set(OPS))
        if unknown:
            raise ValueError(f"Q8BertConfig: expected skip to name some of {', '.join(OPS)}. Got {', '.join(unknown)}.")
        shared = OpSettings.from_dict(settings)
        return cls(**{op: None if op in skip else shared for op in OPS})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Q8BertConfig":
        """The inverse of `to_dict`. An operation that is absent is left as it is, as in the authors' JSON."""
        if not isinstance(values, Mapping):
            raise ValueError(f"Q8BertConfig: expected a mapping. Got {values!r}.")
        if values.get("version") != VERSION:
            raise ValueError(f"Q8BertConfig: expected version {VERSION}. Got {values.get('version')!r}.")
        unknown = sorted(set(values) - {"version", *OPS})
        if unknown:
            raise ValueError(f"Q8BertConfig: expected only version and {', '.join(OPS)}. Got {', '.join(unknown)}.")
        return cls(**{op: _settings(values.get(op), op) for op in OPS})

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, operations left in floating point absent."""
        return {"version": self.version, **{op: asdict(s) for op, s in self.items() if s is not None}}

    @classmethod
    def from_json(cls, source: str | Path | Mapping[str, Any]) -> "Q8BertConfig":
        """Reads a model's config.json (a path, its text, or its values).

        Either NLP Architect's, which holds the operations' keys among those of the BERT itself (a missing key is an
        ordinary fp32 layer, a missing field NLP Architect's default), or one of a model prepared here, which holds
        all of it under the one key "q8bert".

        Raises ValueError where neither is found.
        """
        values = source if isinstance(source, Mapping) else _read_json(source)
        if not isinstance(values, Mapping):
            raise ValueError(f"Q8BertConfig: expected a JSON object. Got {type(values).__name__}.")
        if "q8bert" in values:
            return cls.from_dict(values["q8bert"])
        if not any(op in values for op in OPS):
            raise ValueError(f'Q8BertConfig: expected the key "q8bert" or some of {", ".join(OPS)}. Got none of them.')
        return cls(**{op: _settings(values.get(op), op, _JSON_DEFAULTS) for op in OPS})

    def items(self) -> Iterator[tuple[str, OpSettings | None]]:
        """(operation, settings) pairs in the order of `OPS`."""
        return ((op, getattr(self, op)) for op in OPS)

    def replace(self, **ops: OpSettings | None) -> "Q8BertConfig":
        """A copy with some operations' settings exchanged."""
        return replace(self, **ops)


OPS = tuple(field.name for field in fields(Q8BertConfig) if field.name != "version")
EMBEDDINGS = tuple(op for op in OPS if op.endswith("_embeddings"))
# The paper's model: all of it, with requantized outputs.
PAPER = Q8BertConfig()


def _settings(values: Any, op: str, defaults: Mapping[str, Any] | None = None) -> OpSettings | None:
    if values is None:
        return None
    if isinstance(values, Mapping) and defaults:
        values = {**defaults, **values}
    return OpSettings.from_dict(values, op=op)


def _read_json(source: str | Path) -> Any:
    text = source if isinstance(source, str) and source.lstrip().startswith("{") else None
    if text is None:
        path = Path(source)
        if not path.is_file():
            raise ValueError(f"Q8BertConfig: expected a JSON file. Got {str(path)!r}, which does not exist.")
        text = path.read_text(encoding="utf-8")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"Q8BertConfig: expected JSON. Got text that does not parse: {error}.") from None
