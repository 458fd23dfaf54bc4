"""How the benchmarks read their options; every reader raises ValueError with what was expected and what came."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def count(what: str) -> Callable[[str], int]:
    """A reader of one whole number of at least 1."""

    def read(text: str) -> int:
        if not text.strip().isdecimal() or not int(text):
            raise ValueError(f"{what}: expected a whole number of at least 1. Got {text!r}.")
        return int(text)

    return read


def counts(what: str) -> Callable[[str], list[int]]:
    """A reader of comma-separated whole numbers of at least 1."""
    read = count(what)
    return lambda text: [read(part) for part in text.split(",")]


def parse_specs(text: str) -> list[str]:
    """`bertkern-int8,torch-fp32@avx2` as a list."""
    return text.split(",")


def parse_names(what: str, known: Sequence[str]) -> Callable[[str], list[str]]:
    """A reader of comma-separated names among `known`; it raises ValueError for others."""

    def read(text: str) -> list[str]:
        chosen = text.split(",")
        for name in chosen:
            if name not in known:
                raise ValueError(f"{what}: expected one of {', '.join(known)}. Got {name!r}.")
        return chosen

    return read
