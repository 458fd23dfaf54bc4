"""What all swapped modules share: a packed copy that follows its tensors."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _gradients
from ..gpu.linears import Linear


class _State(threading.local):
    plain = False


_state = _State()


@contextmanager
def plain_path() -> Iterator[None]:
    """Within it, in this thread, fused modules run module by module, so that hooks inside them do."""
    before, _state.plain = _state.plain, True
    try:
        yield
    finally:
        _state.plain = before


def plain() -> bool:
    """Whether this thread is inside `plain_path`."""
    # A thread-local cannot be traced.
    return not torch.compiler.is_compiling() and _state.plain


def version(tensor: Tensor) -> int:
    """How often `tensor` was changed in place; inference tensors do not count."""
    return 0 if tensor.is_inference() else tensor._version


class Epoch:
    """Counts the exchanges of tensors in swapped leaves, so that an encoder sees in one comparison that none was."""

    now = 0


class Copy(NamedTuple):
    """What was packed, and the state of the tensors that it was made from."""

    sources: tuple[Tensor | None, ...]
    versions: list[int]
    pointers: list[int]
    packed: Any

    @classmethod
    def of(cls, sources: tuple[Tensor | None, ...], packed: Any) -> "Copy":
        """`packed`, made of `sources` as they are."""
        return cls(sources, *_state_of(sources), packed)

    def follows(self, sources: tuple[Tensor | None, ...]) -> bool:
        """Whether it was made of these very tensors, and none was changed since."""
        if _state_of(sources) != (self.versions, self.pointers):
            return False
        return list(map(id, sources)) == list(map(id, self.sources))


def _state_of(sources: tuple[Tensor | None, ...]) -> tuple[list[int], list[int]]:
    present = [tensor for tensor in sources if tensor is not None]
    return [version(tensor) for tensor in present], [tensor.data_ptr() for tensor in present]


class PackedCache:
    """A mixin: `packed()` returns a copy of the weights laid out for the kernels, remade whenever they change.

    In-place changes are seen by the version counters of the tensors, exchanges by attribute access. Fused optimizers
    do not count what they change, so layers with parameters also drop the copy in training mode and after a backward
    pass. Writing through `tensor.data` is invisible, as it is to autograd. The copy belongs to this machine: it is
    never saved or pickled. `operand()` is the same for the operators of a GPU.
    """

    _packed: Copy | None = None
    _operand: Copy | None = None

    def _sources(self) -> tuple[Tensor | None, ...]:
        # The weight, what scales it and the bias come first, in the first three places.
        raise NotImplementedError

    def _pack(self) -> Tensor:
        raise NotImplementedError

    def packable(self) -> bool:
        """Whether the weight is a tensor of the layer's own, not one that something computes."""
        return self._sources()[0] is not None

    def weights(self) -> list[Tensor]:
        """The tensors of the packed copy that code may well change in place: weight, scale and bias."""
        return [tensor for tensor in self._sources()[:3] if tensor is not None]

    def packed(self) -> Tensor:
        """The packed weights: a uint8 tensor for bertkern.ops.linear and bertkern.ops.encoder."""
        copy = self._packed
        if torch.compiler.is_compiling():
            return self._pack() if copy is None else copy.packed
        sources = self._sources()
        if copy is not None and copy.follows(sources):
            return copy.packed
        with torch.no_grad():
            packed = self._pack()
        self.__dict__["_packed"] = Copy.of(sources, packed)
        _gradients.own(packed, self)
        Epoch.now += 1
        return packed

    def _make_operand(self) -> Linear:
        raise NotImplementedError

    def operand(self) -> Linear:
        """The layer as the GPU's operators take it, on its own device."""
        copy = self._operand
        if copy is None or not (torch.compiler.is_compiling() or copy.follows(self._operand_sources())):
            copy = self._lay_operand_out()
        return copy.packed

    def _operand_sources(self) -> tuple[Tensor | None, ...]:
        return self._sources()

    @torch.compiler.disable
    @torch.no_grad()
    def _lay_operand_out(self) -> Copy:
        copy = self.__dict__["_operand"] = Copy.of(self._operand_sources(), self._make_operand())
        Epoch.now += 1
        return copy

    def stale(self) -> None:
        """Forgets the packed copies; the next call makes them anew."""
        self.__dict__.pop("_packed", None)
        self.__dict__.pop("_operand", None)
        Epoch.now += 1

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            Epoch.now += 1
        super().__setattr__(name, value)

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key not in ("_packed", "_operand")}

    def _repack(self) -> None:
        # Right away, not at the next call: torch.compile must find the copy when it traces.
        self.stale()
        if self.packable() and all(tensor.device.type == "cpu" for tensor in self.weights()):
            self.packed()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self._packed is not None:
            self._repack()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        had = self._packed is not None
        self.__dict__.pop("_packed", None)
        self.__dict__.pop("_operand", None)
        super()._apply(fn, recurse)
        if had:
            self._repack()
        return self


def lean(op: Callable) -> Callable:
    """`op` that passes by torch's Python code for gradients where none are recorded."""

    def call(*arguments: Any) -> Any:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return op(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments)

    return call


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd has to follow an operation on `tensors`."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
