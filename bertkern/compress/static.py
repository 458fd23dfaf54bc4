"""Static activation ranges for `quantize_`: found by running the float model over a user's data."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from torch import Tensor, nn

from bertkern import plan
from bertkern.config import GroupwiseConfig, Int8Config

from .batches import Batches
from .observation import observe
from .observers import Observer, named_observer

VERSION = 1


@dataclass(frozen=True)
class Calibration:
    """What the inputs of a model's linear layers range over.

    Both ends are kept, so one calibration serves signed and unsigned activations.

    Attributes:
        ranges: (low, high) of each layer's input by the layer's name, low <= 0 <= high and not both 0.
        version: of this record; a file of an unknown version is refused.

    Example:
        >>> found = Calibration({"encoder.layer.0.output.dense": (-0.17, 6.5)})
        >>> Calibration.from_dict(found.to_dict()) == found
        True
    """

    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    version: int = VERSION

    def __post_init__(self) -> None:
        if type(self.version) is not int or self.version != VERSION:
            raise ValueError(f"Calibration: expected version {VERSION}. Got {self.version!r}.")
        if not isinstance(self.ranges, Mapping):
            raise ValueError(f"Calibration: expected ranges by name. Got {type(self.ranges).__name__}.")
        object.__setattr__(self, "ranges", {name: _checked(name, ends) for name, ends in self.ranges.items()})

    def to_dict(self) -> dict[str, Any]:
        """A dict of JSON values that `from_dict` reads."""
        return {"version": self.version, "ranges": {name: list(ends) for name, ends in self.ranges.items()}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Calibration":
        """The calibration of `to_dict`'s record.

        Raises:
            ValueError: an unknown version or field, or a range that is none.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"Calibration: expected a mapping. Got {type(values).__name__}.")
        if values.get("version") != VERSION:
            raise ValueError(f"Calibration: expected version {VERSION}. Got {values.get('version')!r}.")
        if unknown := sorted(set(values) - {"version", "ranges"}):
            raise ValueError(f"Calibration: expected fields among ranges, version. Got {unknown}.")
        return cls(values.get("ranges", {}))


def calibrate(
    model: nn.Module,
    batches: Any,
    config: Int8Config | GroupwiseConfig | None = None,
    *,
    tokenizer: Callable[..., Any] | None = None,
    observer: str | Callable[[], Observer] = "absmax",
    batch_size: int = 32,
    progress: bool = True,
) -> Calibration:
    """Finds what the inputs of a float model's linear layers range over, for activation "static".

    The model runs in evaluation mode without gradients, and is left as it was. Positions that an attention mask marks
    as padding do not count.

    Args:
        model: any module with linear layers; transformers models inside are found.
        batches: an iterable of batches (a DataLoader, a list), or a single one. A batch is a mapping of tensors (its
            labels are left out), a tuple of tensors in the order of the model's arguments, a tensor, or a list of
            strings.
        config: which layers are to be quantized; the others are not watched.
        tokenizer: a transformers tokenizer, for strings. A SentenceTransformer brings its own.
        observer: "absmax" (nothing is clipped), "percentile" (99.99 % of the values lie below each end), "ema" (a
            moving average of the batches' extremes), or what makes an observer of one end: `lambda: Percentile(99.9)`.
            all-MiniLM-L6-v2, 512 sentences of the STS-B training set, Spearman on the test set, fp32 0.8203, dynamic
            0.8192: signed 0.8145 (absmax), 0.8167 (percentile), 0.8148 (ema); unsigned 0.8172, 0.8160, 0.8189.
        batch_size: how many of a list of strings run at once.
        progress: show a progress bar.

    Returns:
        The ranges by name, in the order of the model.

    Raises:
        ValueError, TypeError: no layer to quantize, no batch, a batch of an unknown kind, Inf or NaN among the
            activations, a layer that no batch reached or that only ever saw zeros; the text names it.

    Example::

        found = bk.calibrate(model, sentences, tokenizer=tokenizer, observer="percentile")
        bk.quantize_(model, bk.Int8Config(activation="static"), calibration=found)

    Source: arXiv 1910.06188 (static ranges); the ends are taken apart for unsigned activations.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"calibrate: expected a torch.nn.Module. Got {type(model).__name__}.")
    make = named_observer(observer)
    chosen = plan.choose(model, config or Int8Config(activation="static"))
    watched = {choice.name: choice.module for choice in chosen if choice.action == "quantized"}
    if not watched:
        raise ValueError("calibrate: expected a float model with a linear layer to quantize. Got none.")
    # An observer knows magnitudes; each end is one, of the values on its side of zero.
    ends = {name: (make(), make()) for name in watched}

    def see(name: str, x: Tensor, _: Tensor) -> None:
        low, high = ends[name]
        low.update(x.float().neg().clamp_(min=0))
        high.update(x.float().clamp(min=0))

    observe(model, watched, Batches(batches, model, tokenizer, batch_size), see, progress=progress)
    ranges = {name: (0.0 - low.range(), high.range()) for name, (low, high) in ends.items()}
    for name, (low, high) in ranges.items():
        if low == high:
            raise ValueError(f"calibrate: expected inputs of {name} other than zero. Got only zeros: skip that layer.")
    return Calibration(ranges)


def _checked(name: str, ends: Any) -> tuple[float, float]:
    try:
        low, high = (float(end) for end in ends)
    except (TypeError, ValueError):
        raise ValueError(f"Calibration: expected a range (low, high) of {name}. Got {ends!r}.") from None
    if not (isfinite(low) and isfinite(high) and low <= 0 <= high and low < high):
        raise ValueError(f"Calibration: expected low <= 0 <= high, finite and not both 0, of {name}. Got {ends!r}.")
    return low, high
