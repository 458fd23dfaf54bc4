"""What the canonical forms of pruned weights share: plain tensors, checked before anything reads by them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

# What a weight's values may be: floating point, or the codes of an int8 weight.
VALUES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8)
LARGEST = 2**31 - 1

Self = TypeVar("Self", bound="CanonicalWeight")


class CanonicalWeight:
    """A mixin for frozen dataclasses of `values`, index tensors and `shape` = (N, K), the matrix that they stand for.

    A zero is what compares equal to zero: -0.0 is one, NaN and Inf are not. `from_dense` and `to_dense` are exact, but
    for the sign of zeros that are not stored.
    """

    # The fields that are tensors, as files name them.
    TENSORS: ClassVar[tuple[str, ...]] = ()

    values: Tensor
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        # A torch.Size, or a list out of JSON.
        if isinstance(self.shape, (tuple, list)):
            object.__setattr__(self, "shape", tuple(self.shape))

    def check(self: Self) -> Self:
        """This weight, if its tensors are what they must be.

        Raises:
            ValueError: the text names the first thing that is wrong, and what was expected.
        """
        raise NotImplementedError

    def to_dense(self) -> Tensor:
        """[N, K], dtype of the values."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self.values.dtype

    @property
    def density(self) -> float:
        """The part of the matrix that is stored; 0 where there is none."""
        size = self.shape[0] * self.shape[1]
        return self.values.numel() / size if size else 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """The tensors by name, for a file; `shape` goes beside them."""
        return {prefix + name: getattr(self, name) for name in self.TENSORS}

    @classmethod
    def from_tensors(
        cls: type[Self], tensors: Mapping[str, Tensor], shape: Sequence[int], prefix: str = "", **more: Any
    ) -> Self:
        """The weight of the tensors `<prefix><name>` in a file, checked; other tensors are passed over.

        Args:
            tensors: by name.
            shape: (N, K).
            prefix: of the names, its dot included.
            more: the other fields, where the form has some.

        Raises:
            ValueError: a tensor is missing, or `check` finds something wrong.
        """
        for name in cls.TENSORS:
            if prefix + name not in tensors:
                raise ValueError(f"{cls.__name__}: expected a tensor {prefix}{name}. Got {_names(tensors)}.")
        return cls(**{name: tensors[prefix + name] for name in cls.TENSORS}, shape=shape, **more).check()

    def to(self: Self, *args: Any, **kwargs: Any) -> Self:
        """The weight with values of another dtype or all tensors on another device, as `Tensor.to` takes them.

        Raises:
            ValueError: the dtype is none that a weight may have, or would cut floating-point values down to integers.
        """
        values = self.values.to(*args, **kwargs)
        if values.dtype not in VALUES or (values.dtype == torch.int8) != (self.dtype == torch.int8):
            raise ValueError(
                f"{type(self).__name__}.to: expected a floating dtype for values of {short(self.dtype)}. "
                f"Got {short(values.dtype)}."
                if self.dtype != torch.int8
                else f"{type(self).__name__}.to: expected int8 codes to stay codes. Got {short(values.dtype)}."
            )
        others = {name: getattr(self, name).to(values.device) for name in self.TENSORS if name != "values"}
        return replace(self, values=values, **others)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name}={list(tensor.shape)}" for name, tensor in self.tensors().items())
        others = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if f.name not in (*self.TENSORS, "shape")]
        more = "".join(f", {other}" for other in others)
        return f"{type(self).__name__}({tuple(self.shape)}, {short(self.dtype)}, {sizes}{more})"

    def _check_shape(self) -> tuple[int, int]:
        shape = self.shape
        fits = isinstance(shape, tuple) and len(shape) == 2 and all(type(side) is int for side in shape)
        if not fits or not all(0 <= side <= LARGEST for side in shape):
            raise ValueError(f"{type(self).__name__}: expected shape to be two sizes (N, K). Got {shape!r}.")
        return shape[0], shape[1]

    def _check_tensor(
        self, name: str, shape: Sequence[int | str], dtypes: torch.dtype | tuple[torch.dtype, ...] = torch.int32
    ) -> Tensor:
        """The tensor `name` of one of `dtypes` and of `shape`, where a letter stands for any size."""
        tensor = getattr(self, name)
        dtypes = dtypes if isinstance(dtypes, tuple) else (dtypes,)
        kinds = " or ".join(map(short, dtypes))
        wanted = f"[{', '.join(map(str, shape))}]"
        this = f"{type(self).__name__}: expected {name}"
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{this}, {kinds} of shape {wanted}. Got {type(tensor).__name__}.")
        if tensor.layout != torch.strided or tensor.device.type == "meta":
            raise ValueError(f"{this} to be a dense tensor with data. Got {tensor.layout} on {tensor.device}.")
        if tensor.dtype not in dtypes:
            raise ValueError(f"{this} of dtype {kinds}. Got {short(tensor.dtype)}.")
        same = tensor.dim() == len(shape) and all(
            isinstance(size, str) or size == got for size, got in zip(shape, tensor.shape, strict=True)
        )
        if not same:
            raise ValueError(f"{this} of shape {wanted}. Got {list(tensor.shape)}.")
        if tensor.device != self.values.device:
            raise ValueError(f"{this} on {self.values.device} as values are. Got {tensor.device}.")
        return tensor

    def _check_range(self, name: str, size: int) -> Tensor:
        """The index tensor `name`, if all of it is in [0, size)."""
        index = getattr(self, name)
        if index.numel():
            low, high = map(int, torch.aminmax(index))
            if low < 0 or high >= size:
                raise ValueError(
                    f"{type(self).__name__}: expected {name} in [0, {size}). Got {low if low < 0 else high}."
                )
        return index


def check_index(weight: CanonicalWeight, rows: int, columns: int, what: str) -> None:
    """Raises ValueError unless `crow` and `col` of compressed rows are right: what CSR and BSR share.

    Args:
        weight: with the fields crow, col and values [nnz, ...].
        rows, columns: how many there are, of elements or of blocks.
        what: the unit that the error texts speak of.
    """
    name = type(weight).__name__
    stored = weight.values.shape[0]
    crow = weight._check_tensor("crow", [rows + 1])
    col = weight._check_tensor("col", [stored])
    if int(crow[0]) != 0:
        raise ValueError(f"{name}: expected crow to start at 0. Got {int(crow[0])}.")
    # Compared, not subtracted: a difference of such numbers from a file may overflow.
    if bool((falling := crow[1:] < crow[:-1]).any()):
        at = int(falling.nonzero()[0])
        raise ValueError(
            f"{name}: expected crow never to fall. Got {int(crow[at])} and then {int(crow[at + 1])} at row {at}."
        )
    if int(crow[-1]) != stored:
        raise ValueError(f"{name}: expected crow to end at the number of {what}s, {stored}. Got {int(crow[-1])}.")
    weight._check_range("col", columns)
    after = col[1:] <= col[:-1]
    # Where a row begins, columns start over.
    starts = crow[1:-1]
    after[starts[(starts > 0) & (starts < stored)].long() - 1] = False
    if bool(after.any()):
        at = int(after.nonzero()[0])
        row = int((crow <= at).sum()) - 1
        raise ValueError(
            f"{name}: expected col to be strictly ascending within a row. Got {int(col[at])} and then "
            f"{int(col[at + 1])} in row {row}."
        )


def row_of(crow: Tensor, stored: int) -> Tensor:
    """int64 [stored]: the row of each element, from a checked `crow`."""
    counts = crow[1:] - crow[:-1]
    return torch.repeat_interleave(torch.arange(len(counts), device=crow.device), counts, output_size=stored)


def pointers(counts: Tensor) -> Tensor:
    """int32 [len + 1]: where each row begins, from the counts of the rows."""
    made = torch.zeros(len(counts) + 1, dtype=torch.int32, device=counts.device)
    made[1:] = counts.cumsum(0)
    return made


def dense_weight(caller: str, weight: Tensor) -> Tensor:
    """`weight` without its history, if it is a matrix that a canonical form can hold.

    Raises:
        ValueError: another number of dimensions, dtype or layout, or one too large for 32-bit indices.
    """
    if not isinstance(weight, Tensor):
        raise ValueError(f"{caller}: expected weight to be a tensor. Got {type(weight).__name__}.")
    if weight.layout != torch.strided or weight.device.type == "meta":
        raise ValueError(
            f"{caller}: expected weight to be a dense tensor with data. Got {weight.layout} on {weight.device}."
        )
    if weight.dim() != 2:
        raise ValueError(f"{caller}: expected weight of shape [N, K]. Got {list(weight.shape)}.")
    if weight.dtype not in VALUES:
        raise ValueError(
            f"{caller}: expected weight of dtype {' or '.join(map(short, VALUES))}. Got {short(weight.dtype)}."
        )
    if weight.numel() > LARGEST:
        raise ValueError(f"{caller}: expected weight of fewer than 2^31 elements. Got {list(weight.shape)}.")
    return weight.detach()


def short(dtype: torch.dtype) -> str:
    """The name of a dtype without that of its module."""
    return str(dtype).removeprefix("torch.")


def _names(tensors: Mapping[str, Tensor]) -> str:
    names = [str(name) for name in tensors]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "none"
