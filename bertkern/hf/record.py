"""What config.json holds of a model that bertkern quantized or narrowed."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from .. import exchange, plan
from ..ragged import RaggedConfig, checked_widths
from ..schemes import SCHEMES, Scheme, scheme_of, scheme_under
from ..surgery import family_tables

METHOD = "bertkern"


@register_quantization_config(METHOD)
class BertkernConfig(QuantizationConfigMixin):
    """The `quantization_config` of a config.json: the fields of a scheme's config or a RaggedConfig beside
    `quant_method`.

    Attributes:
        config: that config.
        widths: of layers with fewer heads or units than the model's config says, as `shrink.narrow` takes them; the
            record of a scheme has them beside the config's fields.
        layers: of quantized modules that are not as `config` has it, by name without the base model's prefix: what
            `Scheme.form` tells of them, such as {"axis": "k", "group_size": 64}.

    Raises:
        ValueError: a version, kind, field, width or layer that this release does not know.
    """

    def __init__(self, **fields: Any) -> None:
        fields.pop("quant_method", None)
        self.quant_method = METHOD
        self.layers: dict[str, dict[str, Any]] = {}
        kind = fields.get("kind", SCHEMES[0].config.KIND)
        if kind == RaggedConfig.KIND:
            self.config = RaggedConfig.from_dict(fields)
            self.widths = self.config.widths
        else:
            cls = next((scheme.config for scheme in SCHEMES if kind == scheme.config.KIND), SCHEMES[0].config)
            self.widths = checked_widths(cls.__name__, fields.pop("widths", None) or {})
            told = fields.pop("layers", None) or {}
            self.config = cls.from_dict(fields)
            self.layers = _checked_layers(scheme_under(self.config), told)
        self.__class__ = _RECORDS[type(self.config)]

    def to_dict(self) -> dict[str, Any]:
        more = {name: value for name in ("widths", "layers") if (value := getattr(self, name))}
        return {"quant_method": METHOD, **self.config.to_dict(), **more}

    def __reduce__(self) -> tuple[Any, ...]:
        return _read, (self.to_dict(),)


def _read(values: dict[str, Any]) -> BertkernConfig:
    return BertkernConfig(**values)


# transformers takes a config beside the checkpoint's own only if their classes have the same name.
_RECORDS = {
    config: type(config.__name__, (BertkernConfig,), {"__module__": __name__})
    for config in (RaggedConfig, *(scheme.config for scheme in SCHEMES))
}


def describe(model: nn.Module, config: Any = None) -> tuple[Any, dict[str, dict[str, Any]]]:
    """The config and the layers under which `build_skeleton` makes the quantized modules that `model` has."""
    quantized, scheme = plan.quantized_modules(model), plan.scheme_in(model)
    config = scheme.describe(quantized) if config is None else config
    bare = replace(config, skip=(), keep_original=False)
    float_linears = [choice.name for choice in plan.choose(model, bare) if choice.action == "quantized"]
    float_tables = exchange.tables_of(model, scheme, bare)
    bare = replace(bare, skip=tuple(sorted({*float_linears, *float_tables})))
    roots = plan.pretrained_roots(model)
    tables = family_tables(model, (scheme.table,)) if scheme.tables(config) else []
    told = {}
    for name, module in quantized.items():
        table = isinstance(module, scheme.table)
        planned = name in tables if table else not plan.excluded(name, bare, roots)
        form = scheme.form(module, bare, planned, tied=bool(getattr(module, "table", None)))
        if form is not None:
            told[name.removeprefix(f"{model.base_model_prefix}.")] = form
    return bare, told


def write_blocks(
    model: nn.Module, state: dict[str, Tensor], layers: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Puts weights with many zeros into `state`, the state dict of `model`, as their blocks, in place.

    Args:
        layers: of the model's record.

    Returns:
        `layers` with the blocks of these weights.
    """
    told = {name: {key: value for key, value in form.items() if key != "block"} for name, form in layers.items()}
    names = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    for name, module in plan.quantized_modules(model).items():
        # A module in two places is in the file under the name of one.
        blocks = scheme_of(module).blocks(module) if names[id(module)] == 1 else None
        if blocks is not None and f"{name}.weight_codes" in state:
            del state[f"{name}.weight_codes"]
            state |= blocks.tensors(f"{name}.")
            inner = name.removeprefix(f"{model.base_model_prefix}.")
            told[inner] = {**told.get(inner, {}), "block": list(blocks.block)}
    return {name: form for name, form in told.items() if form}


def _checked_layers(scheme: Scheme, told: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(told, Mapping) or not all(isinstance(name, str) for name in told):
        raise ValueError(f"{scheme.config.__name__}: expected layers by name. Got {told!r}.")
    return {name: scheme.check_form(name, form) for name, form in told.items()}
