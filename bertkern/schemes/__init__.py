"""The ways to keep weights in few bits. Adding one is adding a config, its modules, a file here and a row below."""

from typing import Any

from torch import nn

from .groupwise import GroupwiseScheme
from .int8 import Int8Scheme
from .scheme import Header, Scheme

SCHEMES: tuple[Scheme, ...] = (Int8Scheme(), GroupwiseScheme())

__all__ = ["SCHEMES", "Header", "Scheme", "scheme_of", "scheme_under"]


def scheme_of(module: nn.Module) -> Scheme | None:
    """The scheme that `module` is a linear or a table of."""
    return next((scheme for scheme in SCHEMES if scheme.takes(module)), None)


def scheme_under(config: Any) -> Scheme | None:
    """The scheme that `config` is of."""
    return next((scheme for scheme in SCHEMES if type(config) is scheme.config), None)
