"""How a layer of a model becomes one that trains under quantization, and a plain one again, the object staying."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Adopted(nn.Module):
    """Base of layers that a plain layer is turned into in place; `settings` say how to quantize.

    Attributes:
        plain: the class of the plain layer.
        STATE: names of the buffers that training keeps, fp32 whatever the dtype of the model.
    """

    plain: type[nn.Module]
    settings: Any
    STATE: tuple[str, ...] = ("_step",)
    _step: Tensor

    @classmethod
    def adopt(cls, module: nn.Module, settings: Any) -> nn.Module:
        """Turns a plain layer into this class in place, and returns it.

        The object stays, and with it its parameters, their ties, an optimizer's hold on them, hooks and pruning masks.
        """
        if type(module) is not cls.plain:
            raise TypeError(f"{cls.__name__}: expected a plain {cls.plain.__name__}. Got {type(module).__name__}.")
        module.__class__ = cls
        module._begin(settings)
        return module

    def release(self) -> nn.Module:
        """The inverse of `adopt`: the plain layer again, in place."""
        for name in self._ranges():
            del self._buffers[name]
        del self.settings
        self.__class__ = self.plain
        return self

    def _begin(self, settings: Any) -> None:
        self.settings = settings
        self.register_buffer("_step", self._new_range())

    def _new_range(self, *shape: int) -> Tensor:
        return torch.zeros(shape or 1, dtype=torch.float32, device=self.weight.device)

    def _ranges(self) -> list[str]:
        return [name for name in self.STATE if name in self._buffers]

    def _warming_up(self) -> bool:
        # start_step 0, the common case, must not read the counter: on an accelerator that would synchronise.
        return self.settings.start_step > 0 and bool(self._step < self.settings.start_step)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # `.half()` and `.to(dtype)` would round the ranges, and a half counter stops at 2048.
        kept = {name: self._buffers[name] for name in self._ranges()}
        super()._apply(fn, recurse)
        for name, value in kept.items():
            self._buffers[name] = value.to(self._buffers[name].device) if not value.is_meta else self._buffers[name]
        return self
