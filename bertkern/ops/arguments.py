"""What arguments of a wrong type are answered, where torch would speak of its stable ABI or print a schema."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

P, R = ParamSpec("P"), TypeVar("R")

_NAMES = {Tensor: "tensor", NoneType: "None", torch.dtype: "torch.dtype"}
# What torch takes as a number, beside a tensor of one element.
_INTEGERS = (Integral, torch.SymInt, torch.SymBool)
_NUMBERS = (Real, torch.SymInt, torch.SymFloat, torch.SymBool)


def explained(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, whose failure with an argument of another type than annotated says which: a RuntimeError.

    Types are looked at only when a call has failed, so one that works pays nothing for it.

    Example:
        >>> explained(pack_linear)(None)
        Traceback (most recent call last):
        RuntimeError: pack_linear: expected weight to be a tensor. Got NoneType.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except (AttributeError, RuntimeError, TypeError):
            said = _misfit(function, args, kwargs)
            if said is None:
                raise
            raise RuntimeError(said) from None

    return call


def _misfit(function: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """What to say of the first argument of a wrong type; None where there is none."""
    try:
        given = inspect.signature(function).bind(*args, **kwargs).arguments
    except TypeError:  # Python's own text, of one too many or too few, says it well
        return None
    hints = get_type_hints(function)
    for name, value in given.items():
        if not _fits(value, hints[name]):
            return f"{function.__name__}: expected {name} to be {_expected(hints[name])}. Got {_got(value)}."
    return None


def _fits(value: Any, hint: Any) -> bool:
    inner = get_args(hint)
    if _is_union(hint):
        return any(_fits(value, each) for each in inner)
    if _is_list(hint):
        return _is_listed(value) and all(_fits(item, inner[0]) for item in value)
    if hint in (bool, int, float):
        kinds = _INTEGERS if hint is int else _NUMBERS
        return isinstance(value, kinds) or (isinstance(value, Tensor) and value.numel() == 1)
    return not isinstance(hint, type) or bool(inner) or isinstance(value, hint)


def _expected(hint: Any) -> str:
    if _is_union(hint):
        return " or ".join(map(_expected, get_args(hint)))
    if _is_list(hint):
        return f"a list of {_name(get_args(hint)[0])}s"
    return _name(hint) if hint is NoneType else f"{'an' if hint is int else 'a'} {_name(hint)}"


def _got(value: Any) -> str:
    kind = type(value).__name__
    kinds = dict.fromkeys(type(item).__name__ for item in value) if _is_listed(value) else ()
    return f"{kind} of {' and '.join(kinds)}" if kinds else kind


def _name(hint: Any) -> str:
    return _NAMES.get(hint, getattr(hint, "__name__", str(hint)))


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, UnionType)


def _is_list(hint: Any) -> bool:
    return get_origin(hint) in (list, Sequence)


def _is_listed(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))
