"""The model families whose encoders run as one operator: a file each, named after transformers' `model_type`.

Such a file holds CLASSES: the class in transformers -> its subclass here, which says in `parts` where a layer keeps its
projections. Adding a family is adding a file. Files with a leading underscore are shared by all.
"""

from importlib import import_module
from importlib.util import find_spec

from torch import nn


def classes_of(model_type: str) -> dict[type[nn.Module], type[nn.Module]]:
    """The fused subclasses by the class that they replace; empty for a family that bertkern does not know.

    Example:
        >>> sorted(cls.__name__ for cls in classes_of("bert"))
        ['BertEmbeddings', 'BertEncoder', 'BertLayer']
    """
    name = model_type.replace("-", "_")
    if not name.isidentifier() or name.startswith("_") or find_spec(f"{__name__}.{name}") is None:
        return {}
    return import_module(f"{__name__}.{name}").CLASSES
