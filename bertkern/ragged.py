"""The record of what the files of a float model leave out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .versioned import Versioned


@dataclass(frozen=True)
class RaggedConfig(Versioned):
    """What layers of a float model have lost: the `quantization_config` to load it with, and the record in its config.

    Also which weights are in its files as their nonzero blocks alone; see `bertkern.save_blocks`.

    Handed to `from_pretrained`, it loads checkpoints of transformers 4 that have `pruned_heads`, and those of
    nn_pruning; what `save_pretrained` writes here loads without it.

    Attributes:
        widths: by name of a layer in the base model, the "heads" that it has, numbered as in the whole model, and the
            number of "units" of its feed-forward; left out, all of them. Empty: what the checkpoint's config says.
        blocks: by name of a linear layer in the base model, the sides [br, bc] of the blocks in which its weight is in
            the files: as `crow`, `col` and `values` of `bertkern.formats.BsrWeight` in the place of `weight`.
        version: of this record; a file of an unknown version is refused.

    Example:
        >>> RaggedConfig({"encoder.layer.0": {"heads": [0, 5]}}).to_dict()["widths"]
        {'encoder.layer.0': {'heads': [0, 5]}}
    """

    widths: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    blocks: Mapping[str, Sequence[int]] = field(default_factory=dict)
    version: int = 1

    KIND: ClassVar[str] = "ragged"
    # What transformers asks of an object handed to from_pretrained(quantization_config=...).
    quant_method: ClassVar[str] = "bertkern"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "widths", checked_widths("RaggedConfig", self.widths))
        object.__setattr__(self, "blocks", _checked_blocks(self.blocks))

    def to_dict(self) -> dict[str, Any]:
        """A dict of JSON values that `from_dict` reads."""
        made = {"kind": self.KIND, "widths": checked_widths("RaggedConfig", self.widths), "version": self.version}
        # Left out where there are none, so that releases that do not know of them read the record.
        return {**made, "blocks": _checked_blocks(self.blocks)} if self.blocks else made


def is_record(value: Any) -> bool:
    """Whether a config's `quantization_config` is the record of a ragged float model."""
    values = value if isinstance(value, Mapping) else value.to_dict() if hasattr(value, "to_dict") else {}
    return (values.get("quant_method"), values.get("kind")) == (RaggedConfig.quant_method, RaggedConfig.KIND)


def checked_widths(caller: str, widths: Any) -> dict[str, dict[str, Any]]:
    """A copy of widths as JSON values; raises ValueError where they are none, whatever the model."""

    def wrong(expected: str, got: Any) -> ValueError:
        return ValueError(f"{caller}: expected {expected}. Got {got!r}.")

    if not isinstance(widths, Mapping) or not all(isinstance(name, str) for name in widths):
        raise wrong("widths by name of the layer", widths)
    made = {}
    for name, width in widths.items():
        if not isinstance(width, Mapping) or not set(width) <= {"heads", "units", "bias"}:
            raise wrong(f"heads, units and bias of {name}", width)
        width = dict(width)
        if "heads" in width:
            heads = width["heads"]
            right = isinstance(heads, (list, tuple)) and all(type(head) is int and head >= 0 for head in heads)
            if not right or list(heads) != sorted(set(heads)):
                raise wrong(f"heads of {name} to be ascending, from 0", heads)
            width["heads"] = list(heads)
        if "units" in width and (type(width["units"]) is not int or width["units"] < 1):
            raise wrong(f"units of {name} to be at least 1", width["units"])
        if type(width.get("bias", True)) is not bool:
            raise wrong(f"bias of {name} to be True or False", width["bias"])
        made[name] = width
    return made


def _checked_blocks(blocks: Any) -> dict[str, list[int]]:
    """A copy of blocks as JSON values; raises ValueError where they are none."""
    if not isinstance(blocks, Mapping) or not all(isinstance(name, str) for name in blocks):
        raise ValueError(f"RaggedConfig: expected blocks by name of the layer. Got {blocks!r}.")
    for name, block in blocks.items():
        right = isinstance(block, (list, tuple)) and len(block) == 2 and all(type(side) is int for side in block)
        if not right or min(block) < 1:
            raise ValueError(f"RaggedConfig: expected the block of {name}, such as [16, 4]. Got {block!r}.")
    return {name: list(block) for name, block in blocks.items()}
