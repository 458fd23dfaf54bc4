"""What a checkpoint format is to `load_checkpoint`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn


@dataclass(frozen=True)
class CheckpointFormat:
    """A row of the registry.

    Attributes:
        name: what a user calls it.
        detect: whether an existing path holds this format; looks at names and headers, loads no weights, never raises.
        load: the model; takes the path and the format's own options.
    """

    name: str
    detect: Callable[[Path], bool]
    load: Callable[..., nn.Module]
