"""A linear layer of which only the kept blocks exist, in training too."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..formats.bsr import BsrWeight
from ..ops.block_sparse import block_index, block_sparse_linear, index_size
from .linear import FLOATS
from .packing import PackedCache, lean, needs_grad
from .sparse import Form, pack_blocks

_linear = lean(torch.ops.bertkern.linear.default)


class BlockSparseLinear(PackedCache, nn.Module):
    """An nn.Linear whose weight has nothing but some blocks of br x bc: neither it nor its gradient is ever dense.

    A block that is not kept is zero, has no gradient and stays so. Forward, backward and further derivatives compute
    kept blocks alone, so that 0 x Inf is 0 there. On CUDA, blocks of 16, 32, 64 or 128 a side in fp32, bf16 or fp16 run
    as Triton kernels, or the forward pass as one of the CUDA library's, as `provider` says; other blocks, other devices
    and float64 in plain PyTorch. On a CPU in eval mode, where no gradient is recorded, the kernels of `SparseLinear`
    run.

    Shapes: x [..., K] of the values' dtype -> [..., N]. Under autocast any, and the result has autocast's dtype.

    Parameters:
        values: [nnzb, br, bc], block row by block row. Where a block reaches over the edge of the weight it is zero.
        bias: [N] or None.

    Buffers:
        crow: int32 [ceil(N / br) + 1], where each block row begins.
        col: int32 [nnzb], the block columns, ascending within a block row.
        index: int32, what the kernels read of the pattern; made of a checked crow and col, never saved.

    Args:
        in_features: K.
        out_features: N.
        block: (br, bc), any sizes from 1.
        bias: whether there is one.
        pattern: bool [ceil(N / br), ceil(K / bc)], the blocks to keep; None: all.
        device, dtype: of the parameters.

    Raises:
        ValueError: a block or a pattern that does not fit.

    Example:
        >>> layer = BlockSparseLinear(64, 32, block=(16, 16), pattern=torch.eye(2, 4) > 0)
        >>> layer(torch.zeros(3, 64)).shape
        torch.Size([3, 32])
    """

    crow: Tensor
    col: Tensor
    index: Tensor | None
    values: nn.Parameter
    bias: nn.Parameter | None

    # Of the forward pass on a GPU, see bertkern.ops.linear_providers.
    provider: str = "auto"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        block: tuple[int, int] = (32, 32),
        bias: bool = True,
        *,
        pattern: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        block = _block(block)
        grid = [-(-out_features // block[0]), -(-in_features // block[1])]
        if pattern is None:
            pattern = torch.ones(grid, dtype=torch.bool, device="cpu")
        if pattern.dtype != torch.bool or list(pattern.shape) != grid:
            raise ValueError(
                f"BlockSparseLinear: expected pattern bool of shape [ceil(N / br), ceil(K / bc)] = {grid}. "
                f"Got {pattern.dtype} of shape {list(pattern.shape)}."
            )
        crow = torch.zeros(grid[0] + 1, dtype=torch.int32, device=pattern.device)
        crow[1:] = pattern.sum(1).cumsum(0)
        col = pattern.nonzero()[:, 1].to(torch.int32)
        values = torch.empty(col.numel(), *block, device=device, dtype=dtype)
        self._hold(BsrWeight(crow.to(values.device), col.to(values.device), values, (out_features, in_features)))
        self.bias = nn.Parameter(values.new_empty(out_features)) if bias else None
        self.reset_parameters()

    def _hold(self, weight: BsrWeight) -> None:
        self.out_features, self.in_features = weight.shape
        self.block = weight.block
        self.register_buffer("crow", weight.crow)
        self.register_buffer("col", weight.col)
        self.register_buffer("index", None, persistent=False)
        self.values = nn.Parameter(weight.values.detach())

    def reset_parameters(self) -> None:
        """Fills values and bias as nn.Linear does, and looks at the pattern anew."""
        bound = 1 / math.sqrt(self.in_features) if self.in_features else 0.0
        with torch.no_grad():
            self.values.uniform_(-bound, bound)
            # Of blocks at the edges the part outside of the weight.
            (n, k), (br, bc) = (self.out_features, self.in_features), self.block
            if self.values.device.type != "meta":
                if n % br:
                    self.values[int(self.crow[-2]) :, n % br :] = 0
                if k % bc:
                    self.values[:, :, k % bc :].masked_fill_((self.col == k // bc)[:, None, None], 0)
            if self.bias is not None:
                self.bias.uniform_(-bound, bound)
        self._reindex()

    @classmethod
    def from_weight(cls, weight: BsrWeight, bias: Tensor | None = None) -> BlockSparseLinear:
        """A layer over the given blocks and bias [N], whose memory it shares.

        Raises:
            ValueError: the weight's own check fails, its values are codes, or a bias that does not fit.
        """
        _float_values(weight.check())
        if bias is not None and list(bias.shape) != [weight.shape[0]]:
            raise ValueError(
                f"BlockSparseLinear: expected bias of shape [N] = [{weight.shape[0]}]. Got {list(bias.shape)}."
            )
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made._hold(weight)
        made.bias = None if bias is None else nn.Parameter(bias.detach())
        made._reindex()
        return made

    @classmethod
    def awaiting(
        cls, blocks: int, block: tuple[int, int], shape: tuple[int, int], bias: bool, dtype: torch.dtype
    ) -> BlockSparseLinear:
        """A layer on the meta device for so many blocks of a weight of `shape`, which a file is about to bring."""
        (n, k), rows = shape, -(-shape[0] // block[0])
        crow, col = (torch.empty(size, dtype=torch.int32, device="meta") for size in (rows + 1, blocks))
        values = torch.empty(blocks, *block, dtype=dtype, device="meta")
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made._hold(BsrWeight(crow, col, values, (n, k)))
        made.bias = nn.Parameter(values.new_empty(n)) if bias else None
        made._reindex()
        return made

    @classmethod
    def from_linear(cls, linear: nn.Linear, block: tuple[int, int] = (32, 32)) -> BlockSparseLinear:
        """`linear` with those blocks of its weight that hold anything but zeros; exactly the same function.

        Raises:
            ValueError: a block that does not fit.
        """
        weight, bias = linear.weight.detach(), linear.bias
        made = cls.from_weight(
            BsrWeight.from_dense(weight, _block(block)), None if bias is None else bias.detach().clone()
        )
        made.values.requires_grad_(linear.weight.requires_grad)
        if bias is not None:
            made.bias.requires_grad_(bias.requires_grad)
        return made.train(linear.training)

    def to_weight(self) -> BsrWeight:
        """The weight in canonical form; it shares memory with the layer."""
        return BsrWeight(self.crow, self.col, self.values.detach(), (self.out_features, self.in_features))

    def to_linear(self) -> nn.Linear:
        """The same function as an nn.Linear, with zeros where no block is."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.to_weight().to_dense(), self.values.requires_grad)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), self.bias.requires_grad)
        return linear.train(self.training)

    @property
    def weight(self) -> Tensor:
        """The dense weight [N, K], made anew at every access, for code that reads a layer's weight. Not a parameter."""
        return self.to_weight().to_dense()

    @property
    def density(self) -> float:
        """Kept blocks of all blocks."""
        return self.to_weight().density

    def _reindex(self) -> None:
        # Right away, not at the next call: torch.compile must find the index when it traces.
        if self.crow.device.type == "meta":
            size = index_size((self.out_features, self.in_features), self.block, self.col.numel())
            self.index = torch.empty(size, dtype=torch.int32, device="meta")
            return
        try:
            self.index = block_index(self.to_weight())
        except ValueError:
            self.index = None  # `to_empty` leaves anything there; a forward pass says what is wrong

    def forward(self, x: Tensor) -> Tensor:
        # The operator takes K from x: one that is wrong may have as many blocks.
        if not x.dim() or x.shape[-1] != self.in_features:
            raise ValueError(
                f"BlockSparseLinear: expected x of shape [..., K] = [..., {self.in_features}]. Got {list(x.shape)}."
            )
        index = self.index
        if index is None:
            index = block_index(self.to_weight())
        if not self.training and x.is_cpu and not needs_grad(x, self.values, self.bias):
            y = self._packed_forward(x)
            if y is not None:
                return y
        return block_sparse_linear(x, self.values, index, self.out_features, self.bias, self.provider)

    def _packed_forward(self, x: Tensor) -> Tensor | None:
        """The result by the processor's kernels, in eval mode where no gradient is recorded; None: not by them."""
        # What is packed is found when code is traced, or not at all: its size is unknown there.
        if x.dtype not in FLOATS or not self.packable() or (torch.compiler.is_compiling() and self._packed is None):
            return None
        return _linear(x, self.packed(), self.out_features)

    def _sources(self) -> tuple[Tensor | None, ...]:
        return self.values, None, self.bias, self.crow, self.col

    def packable(self) -> bool:
        return self.values.dtype in FLOATS and self.values.is_cpu and self.index is not None

    def _pack(self) -> Tensor:
        form = Form("tokens" if self.block[0] % 16 else "panels", *self.block)
        bias = self.bias
        return pack_blocks(self.to_weight(), form, None, None if bias is None else bias.detach().float())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BlockSparseLinear:
        before = self.crow, self.col
        super()._apply(fn, recurse)
        # A move hands over other tensors, and `to_empty` such without content; casts leave integers alone.
        if self.crow is not before[0] or self.col is not before[1]:
            self._reindex()
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        metadata: dict,
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        names = ("crow", "col", "values")
        found = {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}
        if found:
            crow, col, values = (found.get(name, getattr(self, name)) for name in names)
            try:
                self._fits(crow, col, values)
            except ValueError as error:
                errors.append(f"{prefix[:-1] or type(self).__name__}: {error}")
                return
            # Another pattern is welcome; the parameter stays the object that an optimizer may hold.
            if values.shape != self.values.shape:
                self.values.data = self.values.new_empty(values.shape)
                self.values.grad = None
            if col.shape != self.col.shape:
                self.col = self.col.new_empty(col.shape)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        self._reindex()

    def _fits(self, crow: Tensor, col: Tensor, values: Tensor) -> None:
        if values.dim() != 3 or tuple(values.shape[1:]) != self.block:
            raise ValueError(
                f"BlockSparseLinear: expected values of shape [nnzb, {self.block[0]}, {self.block[1]}]. "
                f"Got {list(values.shape)}."
            )
        # One that the file lacks is the layer's own, perhaps on another device.
        crow, col, values = (tensor.detach().to(col.device) for tensor in (crow, col, values))
        weight = BsrWeight(crow, col, values, (self.out_features, self.in_features))
        _float_values(weight)
        if col.device.type != "meta":
            weight.check()

    def extra_repr(self) -> str:
        (br, bc), (n, k) = self.block, (self.out_features, self.in_features)
        blocks = -(-n // br) * -(-k // bc)
        return (
            f"in_features={k}, out_features={n}, bias={self.bias is not None}, block={self.block}, "
            f"kept={self.col.numel()}/{blocks}"
        )


def _block(block: Sequence[int]) -> tuple[int, int]:
    sizes = tuple(block) if isinstance(block, (tuple, list)) else ()
    if len(sizes) != 2 or not all(type(size) is int and size >= 1 for size in sizes):
        raise ValueError(f"BlockSparseLinear: expected block to be two sizes (br, bc) from 1. Got {block!r}.")
    return sizes[0], sizes[1]


def _float_values(weight: BsrWeight) -> None:
    if not weight.values.is_floating_point():
        raise ValueError(f"BlockSparseLinear: expected values of a float dtype. Got {weight.values.dtype}.")
