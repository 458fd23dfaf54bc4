"""What was done to a model, kept at the model."""

from dataclasses import dataclass, field

from torch import nn

from .tuning import Choice

# The attribute of a swapped model that holds its record.
RECORD = "_bertkern"


@dataclass
class Record:
    """What was done to a model, for the report and for `restore`.

    Attributes:
        kept: why linear layers kept their float weights, by name.
        left: why modules were left to torch, by name.
        attention: the attention implementation that a config had before, by name of the first module that has it: a
            transformers model, mostly.
        forms: in which form linear layers run, and why, by name.
        masked: linear layers under torch.nn.utils.prune, or in blocks, that others stand in for, by name.
    """

    kept: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    attention: dict[str, str | None] = field(default_factory=dict)
    forms: dict[str, Choice] = field(default_factory=dict)
    masked: dict[str, nn.Module] = field(default_factory=dict)


def record_of(model: nn.Module) -> Record:
    """The record of a swapped model; a new one of any other."""
    return getattr(model, RECORD, None) or Record()
