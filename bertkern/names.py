"""Patterns that name modules, as configs hold them."""

from collections.abc import Iterable
from fnmatch import fnmatchcase


def fits(pattern: str, names: Iterable[str]) -> bool:
    """Whether `pattern` names a module that has one of `names`, or something above it.

    A pattern is a name, a suffix of one after a dot, or either with the wildcards of fnmatch.

    Example:
        >>> fits("layer.1", ["encoder.layer.1.output.dense"]), fits("layer.1", ["encoder.layer.10.output.dense"])
        (True, False)
    """
    forms = (pattern, f"*.{pattern}", f"{pattern}.*", f"*.{pattern}.*")
    return any(fnmatchcase(name, form) for name in names for form in forms)
