"""The model families whose encoders run as one operator: a file each, named after transformers' `model_type`.

Such a file holds CLASSES: the class in transformers -> its subclass here, which says in `parts` where a layer keeps its
projections; and DROPS_HEAD_MASK, True where that is so. Adding a family is adding a file. Files with a leading
underscore are shared by all.
"""

from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from torch import nn


def classes_of(model_type: str) -> dict[type[nn.Module], type[nn.Module]]:
    """The fused subclasses by the class that they replace; empty for a family that bertkern does not know.

    Example:
        >>> sorted(cls.__name__ for cls in classes_of("bert"))
        ['BertEmbeddings', 'BertEncoder', 'BertLayer']
    """
    family = _family(model_type)
    return {} if family is None else family.CLASSES


def drops_head_mask(model_type: str) -> bool:
    """Whether the models of a family, as transformers has them, do not hand a `head_mask` on to their encoder."""
    return getattr(_family(model_type), "DROPS_HEAD_MASK", False)


def layers_of(root: nn.Module) -> Iterator[tuple[str, nn.Module, type[Any]]]:
    """The layers of a transformers model of a known family, fused or not: name, layer and the family's class of layers.

    The class need not be that of the layer: `parts` and `set_heads` of it take layers of transformers' own class, too.

    Example:
        >>> [name for name, layer, family in layers_of(bert) if family.parts(layer).scaling == 0.125][:1]
        ['encoder.layer.0']
    """
    classes = {cls: fused for cls, fused in classes_of(_model_type(root)).items() if hasattr(fused, "parts")}
    classes |= {fused: fused for fused in classes.values()}
    for name, module in root.named_modules():
        if type(module) in classes:
            yield name, module, classes[type(module)]


def _family(model_type: str) -> ModuleType | None:
    name = model_type.replace("-", "_")
    if not name.isidentifier() or name.startswith("_") or find_spec(f"{__name__}.{name}") is None:
        return None
    return import_module(f"{__name__}.{name}")


def _model_type(root: nn.Module) -> str:
    return getattr(getattr(root, "config", None), "model_type", "") or ""
