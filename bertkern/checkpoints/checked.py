"""Tensors of a checkpoint, taken out one by one under checks; what is wrong is collected and told at once."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
SHOWN = 10


class CheckedTensors:
    """Named tensors of which each is asked for with what it must be.

    `take` returns a tensor of the right shape in any case (NaN, or zeros of an integer type, in place of a bad one), so
    a loader can go on and learn of all that is wrong; `finish` then raises, and a loader changes nothing before it.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._left = dict(tensors)
        self._problems: list[str] = []

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def take(
        self,
        name: str,
        shape: Iterable[int] | None,
        dtypes: torch.dtype | tuple[torch.dtype, ...] = FLOATS,
        *,
        positive: bool = False,
        finite: bool = True,
    ) -> Tensor:
        """The tensor `name` of `shape` (None: a single element, given back as a scalar), finite if it is floating.

        positive: whether it must be positive too. finite: whether NaN and Inf are refused.
        """
        dtypes = dtypes if isinstance(dtypes, tuple) else (dtypes,)
        wanted = () if shape is None else tuple(shape)
        kinds = " or ".join(_short(dtype) for dtype in dtypes)
        tensor = self._left.pop(name, None)
        stand_in = torch.full(wanted, float("nan") if dtypes[0].is_floating_point else 0, dtype=dtypes[0])
        if tensor is None:
            self.wrong(f"expected {name}, {kinds} of shape {list(wanted)}. Got no such tensor.")
            return stand_in
        if shape is None and tensor.numel() == 1:
            tensor = tensor.reshape(())
        if tuple(tensor.shape) != wanted:
            self.wrong(f"expected {name} of shape {list(wanted)}. Got {list(tensor.shape)}.")
            return stand_in
        if tensor.dtype not in dtypes:
            self.wrong(f"expected {name} of dtype {kinds}. Got {_short(tensor.dtype)}.")
            return stand_in
        if finite and tensor.is_floating_point() and not torch.isfinite(tensor).all():
            self.wrong(f"expected {name} to be finite. Got Inf or NaN.")
            return stand_in
        if positive and not (tensor > 0).all():
            self.wrong(f"expected {name} to be positive. Got {float(tensor.min())}.")
            return stand_in
        return tensor

    def look(self, name: str, *args: Any, **kwargs: Any) -> Tensor:
        """As `take`, of a tensor that others will ask for, too; it must then be taken or passed over at last."""
        held = self._left.get(name)
        found = self.take(name, *args, **kwargs)
        if held is not None:
            self._left[name] = held
        return found

    def take_codes(self, name: str, shape: Iterable[int], bits: int = 8) -> Tensor:
        """Symmetric codes of `bits` bits, held as int8: -128 is none."""
        codes = self.take(name, shape, torch.int8)
        limit = 2 ** (bits - 1) - 1
        if codes.numel():
            low, high = map(int, torch.aminmax(codes))
            if low < -limit or high > limit:
                outside = low if low < -limit else high
                self.wrong(f"expected {name} to hold codes in [-{limit}, {limit}]. Got {outside}.")
        return codes

    def pass_over(self, *names: str) -> None:
        """Tensors that may be there and are of no use."""
        for name in names:
            self._left.pop(name, None)

    def names(self) -> list[str]:
        """What has not been taken yet."""
        return list(self._left)

    def wrong(self, problem: str) -> None:
        """Notes a problem, a sentence as `expected ... Got ...`."""
        self._problems.append(problem)

    def finish(self) -> None:
        """Raises ValueError with all that was wrong, tensors that nobody took among it."""
        problems = self._problems + [f"expected no tensor {name}. Got one." for name in self._left]
        if problems:
            hidden = len(problems) - SHOWN
            more = [f"... and {hidden} more"] if hidden > 0 else []
            raise ValueError("load_checkpoint: " + "\n  ".join(problems[:SHOWN] + more))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
