"""The encoder layers of a model, under the names that a config's patterns use, and their matrices."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from bertkern import plan
from bertkern.nn.encoder import Unfit
from bertkern.weights import effective, readable


@dataclass(frozen=True)
class Place:
    """One layer.

    Attributes:
        name: its path in the base model, such as "encoder.layer.3", whatever stands around that.
        linears: by path below the layer; the six matrices of BERT, in MobileBERT all that its layers have.
    """

    name: str
    linears: dict[str, nn.Module]

    def weights(self, caller: str) -> list[Tensor]:
        """Of the linears, the parameters that their weights are, or are masked from by torch.nn.utils.prune."""
        made = []
        for name, linear in self.linears.items():
            own = linear._parameters
            weight = own.get("weight", own.get("weight_orig"))
            if weight is None:
                raise ValueError(
                    f"{caller}: expected {self.name}.{name} to have its weight as a parameter. "
                    f"Got {type(linear).__name__} without: bertkern.restore or dequantize the model first."
                )
            made.append(weight)
        return made

    def matrices(self, caller: str) -> dict[str, Tensor]:
        """The weights [N, K] as the linears compute with them, detached."""
        made = {}
        for name, linear in self.linears.items():
            weight = effective(linear)
            if weight is None or not readable(weight.data) or not weight.numel():
                raise ValueError(f"{caller}: expected {self.name}.{name} to have a weight with values. Got none.")
            made[name] = weight
        return made


def places(model: nn.Module, caller: str) -> dict[str, Place]:
    """The distinct layers of the one transformers model in `model`, by name, in their order.

    Raises:
        TypeError, ValueError: not one transformers model of a known family.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: expected a torch.nn.Module. Got {type(model).__name__}.")
    roots = list(plan.pretrained_roots(model).values())
    if len(roots) != 1:
        raise ValueError(f"{caller}: expected a module with one transformers model. Got one with {len(roots)}.")
    from bertkern.families import layers_of

    base = roots[0].base_model
    found = {}
    for name, layer, family in layers_of(base):
        try:
            parts = family.parts(layer)
            slots = getattr(parts, "every_linear", parts.linears)()
        except Unfit as reason:
            raise ValueError(f"{caller}: expected layers of an encoder. Got {reason}.") from None
        paths = {module: path for path, module in layer.named_modules()}
        linears = [getattr(*slot) for slot in slots]
        found[name] = Place(name, {paths[linear]: linear for linear in linears})
    if not found:
        raise ValueError(f"{caller}: expected a model of a known family with layers. Got {type(roots[0]).__name__}.")
    return found


def outputs_of(model: nn.Module, caller: str) -> int:
    """What the matrices of all layers make of a token: how many values; layers that share weights count each."""
    found = places(model, caller)
    each = [sum(weight.shape[0] for weight in place.weights(caller)) for place in found.values()]
    (root,) = plan.pretrained_roots(model).values()
    return sum(each) * max(1, getattr(root.config, "num_hidden_layers", 1) // len(each))


def chosen(found: dict[str, Place], names: Iterable[str] | None, caller: str) -> dict[str, Place]:
    """Of `found`, those named, in their order; None: all.

    Raises:
        ValueError: a name of no layer, or none at all.
    """
    if names is None:
        return found
    names = [names] if isinstance(names, str) else list(names)
    if unknown := [name for name in names if name not in found]:
        raise ValueError(f"{caller}: expected layers among {list(found)}. Got {unknown[0]!r}.")
    if not names:
        raise ValueError(f"{caller}: expected at least one layer. Got none.")
    return {name: place for name, place in found.items() if name in names}
