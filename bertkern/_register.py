"""Registers bertkern with transformers when transformers' registry of quantizers is imported, and not before:
importing it costs seconds that a user of the operators need not spend."""

import importlib.abc
import importlib.util
import sys
import warnings

_REGISTRY = "transformers.quantizers.auto"


class _WhenImported(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module):
            execute(module)
            try:
                from . import hf  # noqa: F401
            except ImportError as error:
                # Whoever imports an old transformers need not know bertkern.
                warnings.warn(f"bertkern: int8 models cannot be loaded by this transformers: {error}", stacklevel=2)

        spec.loader.exec_module = execute_and_register
        return spec


def register() -> None:
    """Does it now if the registry is there already."""
    if _REGISTRY in sys.modules:
        from . import hf  # noqa: F401
    else:
        sys.meta_path.insert(0, _WhenImported())
