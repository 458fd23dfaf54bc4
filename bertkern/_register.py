"""Registers bertkern with transformers when the modules are imported that it registers with, and not before: importing
transformers costs seconds that a user of the operators need not spend."""

import importlib.abc
import importlib.util
import sys
import warnings
from importlib import import_module

# What is imported here as soon as transformers' own module is there, and what cannot be done where that fails.
_HOOKS = {
    "transformers.quantizers.auto": ("hf", "int8 models cannot be loaded"),
    "transformers.modeling_utils": ("families._attention", 'attn_implementation="bertkern" is not known'),
}


class _WhenImported(importlib.abc.MetaPathFinder):
    def __init__(self, names: list[str]) -> None:
        self.names = set(names)

    def find_spec(self, name, path, target=None):
        if name not in self.names:
            return None
        # The other finders are asked for it, too.
        self.names.discard(name)
        if not self.names:
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module):
            execute(module)
            own, lost = _HOOKS[name]
            try:
                import_module(f"{__package__}.{own}")
            except ImportError as error:
                # Whoever imports an old transformers need not know bertkern.
                warnings.warn(f"bertkern: {lost} by this transformers: {error}", stacklevel=2)

        spec.loader.exec_module = execute_and_register
        return spec


def register() -> None:
    """Does it now for what is there already."""
    later = []
    for name, (own, _) in _HOOKS.items():
        if name in sys.modules:
            import_module(f"{__package__}.{own}")
        else:
            later.append(name)
    if later:
        sys.meta_path.insert(0, _WhenImported(later))
