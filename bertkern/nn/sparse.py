"""A linear layer whose weight is kept as its nonzero blocks, and the forms in which kernels take blocks."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import (
    _ops,  # noqa: F401  (loads the operators)
    gpu,
)
from ..formats.bsr import BsrWeight
from ..gpu.linears import BlockSparse, Dense
from ..gpu.rows import Rows
from ..ops.block_sparse import block_index
from .linear import FLOATS
from .packing import PackedCache, lean, needs_grad

_linear = lean(torch.ops.bertkern.linear.default)
LAYOUTS = ("auto", "panels", "tokens")
# Sides of blocks that the GPU's kernels take.
GPU_SIDES = (16, 32, 64, 128)


@dataclass(frozen=True)
class Form:
    """How kernels take a weight: its blocks, and what a vector's lanes are.

    Attributes:
        layout: "dense", "panels" (lanes are output features, 16 or 32 of them share a pattern) or "tokens" (lanes are
            rows of X; 1, 2 or 4 output features share a pattern).
        rows, columns: of the blocks in which the weight is kept; 0 for "dense".

    Example:
        >>> str(Form("panels", 16, 4)), Form.parse("tokens 1x4")
        ('panels 16x4', Form(layout='tokens', rows=1, columns=4))
    """

    layout: str = "dense"
    rows: int = 0
    columns: int = 0

    def __post_init__(self) -> None:
        sizes = type(self.rows) is int and type(self.columns) is int
        fits = sizes and (min(self.rows, self.columns) >= 1) != (self.layout == "dense")
        if self.layout not in ("dense", "panels", "tokens") or not fits or min(self.rows, self.columns) < 0:
            raise ValueError(
                f"Form: expected dense, or panels or tokens with blocks of at least 1x1. "
                f"Got {self.layout!r} with {self.rows}x{self.columns}."
            )

    def __str__(self) -> str:
        return self.layout if self.layout == "dense" else f"{self.layout} {self.rows}x{self.columns}"

    @classmethod
    def parse(cls, text: str) -> "Form":
        """The form of `str(form)`; raises ValueError."""
        layout, _, block = text.partition(" ")
        rows, _, columns = block.partition("x")
        if not block:
            return cls(layout)
        if not (rows.isdecimal() and columns.isdecimal()):
            raise ValueError(f"Form: expected a block such as 16x4. Got {block!r}.")
        return cls(layout, int(rows), int(columns))


DENSE = Form()


def pack_blocks(blocks: BsrWeight, form: Form, scale: Tensor | None, bias: Tensor | None, *static: Any) -> Tensor:
    """The packed weights of `blocks` in `form`: fp32, bf16 or int8 codes with their scale.

    Args:
        static: of int8: input_scale, input_zero_point, output_scale.
    """
    values = blocks.values.detach()
    # fp16 has no kernel of its own; fp32 holds every one of its values.
    values = values.float() if values.dtype == torch.float16 else values
    n, k = blocks.shape
    return torch.ops.bertkern.pack_sparse_linear.default(
        blocks.crow, blocks.col, values, n, k, scale, bias, *static, form=LAYOUTS.index(form.layout)
    )


class SparseLinear(PackedCache, nn.Linear):
    """An nn.Linear that keeps the nonzero blocks of its weight instead of the weight, and skips the zeros.

    `sparsify` makes one of an nn.Linear in place, `densify` undoes it. The state dict is that of the nn.Linear. In
    training mode the weight is an ordinary parameter again, and its blocks are taken anew afterwards; an optimizer has
    to be made when it is. `weight` is the dense weight, made at every access. In eval mode gradients reach the input,
    not the weight. Skipping a zero also skips 0 x Inf and 0 x NaN.

    Shapes: x [..., K] fp32, bf16 or fp16 -> [..., N], dtype of x.

    Buffers, none of them in the state dict: crow, col, values of `BsrWeight`.

    Example:
        >>> linear = nn.Linear(64, 32).eval()
        >>> _ = linear.weight.data[:16].zero_()
        >>> sparsify(linear, Form("panels", 16, 4)).density
        0.5
    """

    form: Form
    crow: Tensor
    col: Tensor
    values: Tensor

    @property
    def weight(self) -> Tensor:
        parameter = self._parameters.get("weight")
        return self.blocks().to_dense() if parameter is None else parameter

    @property
    def density(self) -> float:
        """Kept blocks of all blocks; of a layer in training mode that of the time before."""
        return self.blocks().density if "values" in self._buffers else self._density

    def blocks(self) -> BsrWeight:
        """The weight as it is kept."""
        get = self._buffers.__getitem__
        return BsrWeight(get("crow"), get("col"), get("values"), (self.out_features, self.in_features))

    def _hold(self, weight: nn.Parameter) -> None:
        blocks = BsrWeight.from_dense(weight.detach(), (self.form.rows, self.form.columns))
        self.__dict__["_density"] = blocks.density
        self.__dict__["_wants_grad"] = weight.requires_grad
        self._parameters.pop("weight", None)
        for name, tensor in blocks.tensors().items():
            self.register_buffer(name, tensor, persistent=False)

    def _release(self) -> None:
        """The dense weight becomes a parameter again."""
        if "weight" not in self._parameters:
            weight = nn.Parameter(self.blocks().to_dense(), self._wants_grad)
            for name in BsrWeight.TENSORS:
                self._buffers.pop(name)
                self._non_persistent_buffers_set.discard(name)
            self._parameters["weight"] = weight
            # As in a layer that was never sparse, the weight comes before the bias.
            self._parameters["bias"] = self._parameters.pop("bias")

    def _sources(self) -> tuple[Tensor | None, ...]:
        return self._buffers.get("values"), None, self._parameters.get("bias")

    def _pack(self) -> Tensor:
        bias = self._parameters.get("bias")
        return pack_blocks(self.blocks(), self.form, None, None if bias is None else bias.detach().float())

    def _make_operand(self) -> BlockSparse | Dense:
        bias = self._parameters.get("bias")
        bias = None if bias is None else bias.detach()
        blocks = self.blocks()
        if self.form.rows in GPU_SIDES and self.form.columns in GPU_SIDES:
            return BlockSparse(blocks.values.detach(), block_index(blocks), bias, self.out_features)
        # Smaller blocks leave tensor cores idle.
        return Dense(blocks.to_dense().detach(), bias)

    def forward(self, x: Tensor) -> Tensor:
        bias = self._parameters.get("bias")
        if self._runs_on_gpu(x):
            return self.operand()(Rows(x.reshape(-1, x.shape[-1])), x.dtype).view(*x.shape[:-1], -1)
        if self.training or not self.packable() or not x.is_cpu or x.dtype not in FLOATS:
            weight = self.weight
            return F.linear(x, weight if self.training else weight.detach(), bias)
        return _linear(x, self.packed(), self.out_features)

    def _runs_on_gpu(self, x: Tensor) -> bool:
        fits = gpu.runs_on(x.device) and x.dtype in FLOATS and not self.training and self.packable()
        return fits and not needs_grad(x, self._parameters.get("bias"))

    def train(self, mode: bool = True) -> "SparseLinear":
        super().train(mode)
        if mode and "weight" not in self._parameters:
            self._release()
            self.stale()
            if self._wants_grad:
                warnings.warn(
                    "bertkern: the weights of sparse layers are parameters in training mode only. Make the optimizer "
                    "after model.train(); one that was made before does not know them.",
                    stacklevel=2,
                )
        elif not mode and "weight" in self._parameters:
            self._hold(self._parameters["weight"])
            self._repack()
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        if "weight" not in self._parameters:
            destination[prefix + "weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any, **kwargs: Any) -> None:
        held = "weight" not in self._parameters
        if held and prefix + "weight" in state_dict:
            self._release()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if held and "weight" in self._parameters:
            self._hold(self._parameters["weight"])
            self._repack()

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._repack()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, form={self.form}, density={self.density:.2f}"


def sparsify(linear: nn.Linear, form: Form) -> SparseLinear:
    """Makes `linear` a SparseLinear, in place; its dense weight is freed unless it is in training mode.

    Args:
        linear: weight [N, K] fp32, bf16 or fp16, not shared with another module.
        form: "panels" or "tokens" with the blocks to keep.

    Raises:
        ValueError: another dtype, or the form "dense".
    """
    weight = linear._parameters.get("weight")
    if weight is None or weight.dtype not in FLOATS:
        got = "none" if weight is None else str(weight.dtype).removeprefix("torch.")
        raise ValueError(f"sparsify: expected a weight of fp32, bf16 or fp16. Got {got}.")
    if form.layout == "dense":
        raise ValueError("sparsify: expected the form panels or tokens. Got dense.")
    linear.__dict__.pop("_packed", None)
    linear.__class__ = SparseLinear
    linear.form = form
    linear.__dict__["_density"] = 1.0
    linear.__dict__["_wants_grad"] = weight.requires_grad
    if not linear.training:
        linear._hold(weight)
        linear._repack()
    return linear


def densify(linear: SparseLinear) -> nn.Linear:
    """Undoes `sparsify`, in place: the weight is a parameter again, equal to what it was."""
    linear._release()
    for name in ("_packed", "form", "_density", "_wants_grad"):
        linear.__dict__.pop(name, None)
    linear.__class__ = nn.Linear
    return linear
