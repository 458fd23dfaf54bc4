"""Float modules exchanged for quantized ones, whatever the scheme."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from . import mapped
from . import plan as layers
from .schemes import Scheme
from .surgery import family_tables, put


def tables_of(model: nn.Module, scheme: Scheme, config: Any, given: Collection[str] = ()) -> list[str]:
    """The names of the embedding tables that `config` wants quantized.

    Args:
        given: names of tables that become quantized whatever the config says of them.
    """
    roots = layers.pretrained_roots(model)
    wanted = family_tables(model) if scheme.tables(config) else []
    wanted = [name for name in wanted if not layers.skipped(name, config.skip, roots)]
    more = [name for name in given if name not in wanted and type(_module(model, name)) is nn.Embedding]
    return [*wanted, *more]


def ties_of(
    model: nn.Module,
    scheme: Scheme,
    config: Any,
    choices: list[layers.Choice],
    tables: list[str],
    given: Collection[str] = (),
) -> dict[str, str]:
    """Of linears whose weight is that of one of `tables`, and that become quantized with it: their name -> the table's.

    Args:
        given: names of linears that get weights of their own.
    """
    sources = {id(model.get_submodule(name).weight): name for name in tables}
    made = {}
    for choice in choices:
        follows = scheme.ties_heads(config) and choice.reason == layers.leaves("head")
        weight = choice.module._parameters.get("weight")
        if choice.name not in given and id(weight) in sources and (choice.action == "quantized" or follows):
            made[choice.name] = sources[id(weight)]
    return made


def exchange(
    model: nn.Module,
    scheme: Scheme,
    config: Any,
    linears: list[str],
    tables: list[str],
    ties: Mapping[str, str],
    ranges: Mapping[str, tuple[float, float]] | None = None,
    given: Mapping[str, Any] | None = None,
) -> None:
    """Puts quantized modules in the place of the named ones.

    Args:
        linears, tables: names of nn.Linear and nn.Embedding modules.
        ties: of linears whose weight is a table: the name of the linear -> that of the table.
        ranges: of static activations, by name of the linear.
        given: weights made elsewhere, by name.
    """
    ranges, given, roots = ranges or {}, given or {}, layers.pretrained_roots(model)
    for name in [*(name for name in linears if name not in ties), *tables]:
        module = model.get_submodule(name)
        weight = module.weight
        names = layers.aliases(name, roots)
        put(model, name, scheme.make(module, config, names, ranges.get(name), given.get(name)))
        mapped.release(weight)
        module = weight = None  # freed, and given back, before the next one takes memory
        mapped.trim()
    for name, source in ties.items():
        linear, table = model.get_submodule(name), model.get_submodule(source)
        head = name in linears
        put(model, name, scheme.tied(linear, table, config, head, ranges.get(name)))


def _module(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None
