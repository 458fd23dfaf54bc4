"""What all configs share: a kind and a version, JSON both ways, and the checks of their fields."""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from typing import Any, ClassVar, TypeVar

Self = TypeVar("Self", bound="Versioned")


class Versioned:
    """A base of frozen dataclasses with a field `version: int = 1`.

    Each class has a KIND, which its records name. One without a KIND stands for all those that its `_kinds` lists.
    """

    KIND: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if type(self.version) is not int or self.version != 1:
            raise ValueError(f"{self._name}: expected version 1. Got {self.version!r}.")

    def to_dict(self) -> dict[str, Any]:
        """A dict of JSON values that `from_dict` reads."""
        return {"kind": self.KIND, **{name: _lists(value) for name, value in asdict(self).items()}}

    @classmethod
    def from_dict(cls: type[Self], values: Mapping[str, Any]) -> Self:
        """What `to_dict` made the record of.

        Raises:
            ValueError: an unknown kind, version or field, or a value that is not allowed.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"{cls.__name__}: expected a mapping. Got {type(values).__name__}.")
        values = dict(values)
        kinds = {kind.KIND: kind for kind in cls._kinds()}
        kind = values.pop("kind", cls.KIND)
        if not isinstance(kind, str) or kind not in kinds:
            raise ValueError(f'{cls.__name__}: expected kind "{" or ".join(sorted(kinds))}". Got {kind!r}.')
        cls = kinds[kind]
        # The version comes first: a newer record may well have fields that this one does not know.
        if "version" in values and values["version"] != 1:
            raise ValueError(f"{cls.__name__}: expected version 1. Got {values['version']!r}.")
        known = {field.name: field for field in fields(cls)}
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(f"{cls.__name__}: expected fields among {sorted(known)}. Got {unknown}.")
        for name, field in known.items():
            if field.default is MISSING and field.default_factory is MISSING and name not in values:
                raise ValueError(f"{cls.__name__}: expected a {name}. Got none.")
        return cls(**values)

    @classmethod
    def _kinds(cls: type[Self]) -> tuple[type[Self], ...]:
        """The classes whose records `from_dict` reads."""
        return (cls,)

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _expect_one_of(self, name: str, allowed: tuple) -> None:
        value = getattr(self, name)
        if not any(value is choice or (isinstance(choice, str) and value == choice) for choice in allowed):
            raise ValueError(f"{self._name}: expected {name} to be one of {allowed}. Got {value!r}.")

    def _expect_whole(self, name: str, low: int, high: float = float("inf")) -> None:
        value = getattr(self, name)
        if type(value) is not int or not low <= value <= high:
            bounds = f"of at least {low}" if high == float("inf") else f"from {low} to {high}"
            raise ValueError(f"{self._name}: expected {name} to be a whole number {bounds}. Got {value!r}.")

    def _expect_share(self, name: str, value: Any) -> None:
        if not is_number(value) or not 0 <= value <= 1:
            raise ValueError(f"{self._name}: expected {name} to be a number from 0 to 1. Got {value!r}.")


def is_number(value: Any) -> bool:
    """Whether `value` is an int or a float; True and False are neither."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _lists(value: Any) -> Any:
    """`value` with lists in the place of tuples, as JSON has them."""
    return [_lists(part) for part in value] if isinstance(value, tuple) else value
