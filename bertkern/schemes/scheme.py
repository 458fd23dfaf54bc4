"""What the rest of bertkern asks of a way to keep weights in few bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from ..formats.bsr import BsrWeight

# Of a tensor in a file: its dtype as torch names it, and its shape.
Header = tuple[str, list[int]]
# Modules by name, with the names that patterns may know them by.
Known = Mapping[str, tuple[nn.Module, Sequence[str]]]


class Scheme:
    """A config, the modules that `quantize_` makes under it, and how files hold them. One instance each, in SCHEMES.

    Attributes:
        name: in texts, "a model that is <name>".
        config: the class of the config.
        linear, table: the classes of the modules.
        tensors: of a linear in a file, its bias aside, `<module>.<tensor>`; tables have those that begin with "weight".
    """

    name: ClassVar[str]
    config: ClassVar[type[Any]]
    linear: ClassVar[type[nn.Module]]
    table: ClassVar[type[nn.Module]]
    tensors: ClassVar[tuple[str, ...]]

    def takes(self, module: nn.Module) -> bool:
        """Whether `module` is of this scheme."""
        return isinstance(module, (self.linear, self.table))

    # ------------------------------------------------------------------------------------------------ quantization
    def tables(self, config: Any) -> bool:
        """Whether tables are quantized, too."""
        raise NotImplementedError

    def ties_heads(self, config: Any) -> bool:
        """Whether a decoder that is a table's own weight follows the table though `config` leaves the head."""
        return False

    def fixes_shapes(self, config: Any) -> bool:
        """Whether `config` counts groups of the matrices as they are, so that dead heads and units must stay."""
        return False

    def check(self, config: Any, modules: Known, given: Mapping[str, Any]) -> None:
        """Raises ValueError or TypeError where `config` does not fit the model; before anything is changed.

        Args:
            modules: all that are to be quantized.
            given: weights made elsewhere, by name.
        """
        if given:
            raise ValueError(f"quantize_: expected no weights with {type(config).__name__}. Got some.")

    def make(
        self,
        module: nn.Module,
        config: Any,
        names: Sequence[str],
        input_range: tuple[float, float] | None = None,
        weight: Any = None,
    ) -> nn.Module:
        """The module that takes the place of an nn.Linear or nn.Embedding.

        Args:
            names: that patterns of `config` may know it by.
            input_range: (low, high) of a linear's inputs, for static activations.
            weight: made elsewhere.
        """
        raise NotImplementedError

    def tied(
        self, linear: nn.Module, table: nn.Module, config: Any, head: bool, input_range: tuple[float, float] | None
    ) -> nn.Module:
        """The module that takes the place of `linear`, whose weight is that of `table`, a module of this scheme.

        Args:
            head: whether `config` wants heads quantized.
        """
        raise NotImplementedError

    def describe(self, modules: Mapping[str, nn.Module]) -> Any:
        """The config that comes nearest to how modules were made."""
        raise NotImplementedError

    # ----------------------------------------------------------------------------------------------------- reports
    def stored(self, module: nn.Module) -> str:
        """How the weight is kept, in a word or two."""
        raise NotImplementedError

    def runs(self, module: nn.Module) -> str:
        """The same, and what becomes of its inputs."""
        raise NotImplementedError

    def values(self, module: nn.Module) -> Tensor:
        """A matrix that is zero where the weight is."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------------- files
    def form(self, module: nn.Module, config: Any, planned: bool, tied: bool) -> dict[str, Any] | None:
        """What a record must tell of a module because `config` does not; None: nothing.

        Args:
            planned: whether `config` asks for the module to be quantized.
            tied: whether it is a decoder that shares a table.
        """
        return None

    def check_form(self, name: str, form: Any) -> dict[str, Any]:
        """What `form` returned, as a file has it; raises ValueError where it is something else."""
        raise ValueError(f"{self.config.__name__}: expected no layers in its record. Got {name}.")

    def blocks(self, module: nn.Module) -> BsrWeight | None:
        """The weight of a linear as a file is to hold it in the place of `weight_codes`; None: dense."""
        return None

    def misfits(
        self, name: str, module: nn.Module, config: Any, held: Mapping[str, Header], form: Mapping[str, Any], tied: bool
    ) -> list[str]:
        """What is wrong with the tensors that a file holds of a module, line by line.

        Args:
            module: nn.Linear or nn.Embedding, without values.
            held: by the names in `tensors`, and "bias".
            form: see `form`; empty: as `config` says.
            tied: whether codes and scales are those of a table.
        """
        raise NotImplementedError

    def skeleton(
        self, module: nn.Module, config: Any, held: Mapping[str, Header], form: Mapping[str, Any], names: Sequence[str]
    ) -> nn.Module:
        """The module without values that takes those tensors; on the meta device."""
        raise NotImplementedError

    def local(self, config: Any, form: Mapping[str, Any]) -> Any:
        """`config` for a module that has `form`, its values yet to come."""
        return config

    def tie_loaded(self, linear: nn.Module, table: nn.Module) -> None:
        """Ties what `tied` made anew, when values have come."""

    def take_blocks(self, name: str, module: nn.Module) -> None:
        """Makes the weight of the blocks that a file brought, if it did; raises ValueError where they are wrong."""

    def check_loaded(self, name: str, module: nn.Module) -> None:
        """Raises ValueError where the values that a file brought cannot be."""
        raise NotImplementedError


def check_input(name: str, module: nn.Module) -> None:
    """Raises ValueError where the step and the zero point of a loaded linear's inputs cannot be."""
    step = getattr(module, "input_scale", None)
    if step is None:
        return
    step, zero = float(step), int(module.input_zero_point)
    if not 0 <= step < float("inf"):
        raise ValueError(f"from_pretrained: expected {name}.input_scale finite and at least 0. Got {step}.")
    if not (0 <= zero <= 255 if step else zero in (0, 128)):
        allowed = "from 0 to 255" if step else "0, or 128, beside an input_scale of 0"
        raise ValueError(f"from_pretrained: expected {name}.input_zero_point {allowed}. Got {zero}.")


def expect(
    problems: list[str],
    name: str,
    held: Mapping[str, Header],
    tensor: str,
    dtype: str,
    shapes: list[list[int]],
    of: str,
) -> None:
    """Adds to `problems` where a file lacks `name.tensor` or has it of another dtype or shape."""
    got = held.get(tensor)
    if got is None:
        problems.append(f"expected {name}.{tensor}. Got none.")
    elif got[0] != dtype or got[1] not in shapes:
        problems.append(
            f"expected {name}.{tensor} {dtype} of shape {of} = {shapes[0]}. Got {got[0]} of shape {got[1]}."
        )
