"""int8 weights: a linear layer and an embedding table. Their tensors are the canonical form, equal on every machine."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import (
    _ops,  # noqa: F401  (loads the operators)
    gpu,
)
from ..config import GroupwiseConfig, Int8Config
from ..formats.bsr import BsrWeight
from ..formats.int8 import quantize_weight, static_step
from ..gpu.linears import BlockSparseInt8, Int8
from ..gpu.rows import Rows
from .linear import FLOATS
from .packing import PackedCache, lean, needs_grad
from .sparse import DENSE, GPU_SIDES, Form, pack_blocks

_linear = lean(torch.ops.bertkern.linear.default)
# Weights that are converted at a time: some megabytes of temporaries beside a model, whatever its widths.
BLOCK = 2**18


def finite(tensor: Tensor) -> bool:
    """Whether `tensor` holds neither Inf nor NaN; needs no memory beside it."""
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor.detach())
    return math.isfinite(float(low)) and math.isfinite(float(high))


class _Int8Weight(nn.Module):
    """Codes int8 [N, K] in [-127, 127] and scales fp32 [N] or [1], w = code * scale; both keep their dtype in casts."""

    weight_codes: Tensor
    weight_scale: Tensor

    def _hold(self, codes: Tensor, scale: Tensor) -> None:
        owner, rows = type(self).__name__, codes.shape[0] if codes.dim() == 2 else None
        if codes.dtype != torch.int8 or codes.dim() != 2:
            raise ValueError(
                f"{owner}: expected weight_codes int8 of shape [N, K]. Got {codes.dtype} of shape {list(codes.shape)}."
            )
        if scale.dtype != torch.float32 or tuple(scale.shape) not in {(1,), (rows,)}:
            raise ValueError(
                f"{owner}: expected weight_scale float32 of shape [N] = [{rows}] or [1]. "
                f"Got {scale.dtype} of shape {list(scale.shape)}."
            )
        self.register_buffer("weight_codes", codes)
        self.register_buffer("weight_scale", scale)

    def dequantized_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """weight_codes * weight_scale, [N, K]."""
        scale = self.weight_scale if self.weight_scale.numel() == 1 else self.weight_scale[:, None]
        return (self.weight_codes.to(torch.float32) * scale).to(dtype)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, made anew at every access, for code that reads a layer's weight. Not a parameter."""
        return self.dequantized_weight()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        # Moves go through, casts do not: half-precision scales would change every weight.
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors) -> None:
        shape = list(self.weight_codes.shape)
        codes, scale = state_dict.get(prefix + "weight_codes"), state_dict.get(prefix + "weight_scale")
        found = []
        if codes is not None and (codes.dtype != torch.int8 or list(codes.shape) != shape):
            found.append(
                f"{prefix}weight_codes: expected int8 of shape [N, K] = {shape}. "
                f"Got {codes.dtype} of shape {list(codes.shape)}."
            )
        elif codes is not None and codes.device.type != "meta" and codes.numel() and bool((codes == -128).any()):
            found.append(f"{prefix}weight_codes: expected codes in [-127, 127]. Got -128.")
        if scale is not None:
            if scale.dtype != torch.float32 or tuple(scale.shape) not in {(1,), (shape[0],)}:
                found.append(
                    f"{prefix}weight_scale: expected float32 of shape [N] = [{shape[0]}] or [1]. "
                    f"Got {scale.dtype} of shape {list(scale.shape)}."
                )
            elif scale.device.type != "meta" and not bool((torch.isfinite(scale) & (scale >= 0)).all()):
                found.append(f"{prefix}weight_scale: expected finite scales of at least 0. Got others.")
            elif scale.shape != self.weight_scale.shape:
                self.weight_scale = torch.empty_like(scale, device=self.weight_scale.device)
        if found:
            errors.extend(found)
            return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)


class Int8Linear(PackedCache, _Int8Weight):
    """A linear layer with int8 weights and activations: y = ((codes_x - zero_x) . codes_w) * scale_x * scale_w + bias.

    Shapes: x [..., K] fp32, bf16 or fp16 -> [..., N], dtype of x.

    Buffers:
        weight_codes: int8 [N, K] in [-127, 127].
        weight_scale: fp32 [N], or [1] for the whole weight.
        bias: fp32 [N] or None.
        input_scale: fp32 scalar; 0: each token's own range, else the step of static activations.
        input_zero_point: int32 scalar. Of static activations, not 0: they are uint8, x = (u - zero point) * step. Of
            tokens' own ranges 0: each has a zero point of its own; 128: ranges are symmetric about 0.
        output_scale: fp32 scalar; not 0: the output is rounded to int8 of this step (Q8BERT).

    Training mode and gradients, and devices that are neither a CPU nor CUDA, use the dequantized weight and leave
    activations as they are. With a sparse `form` the codes are held as their nonzero blocks; `weight_codes` and the
    state dict are dense all the same.
    A state dict may hold `crow`, `col` and `values` of a `BsrWeight` instead of `weight_codes`, as files do.

    Example:
        >>> layer = Int8Linear.from_linear(nn.Linear(64, 32), Int8Config())
        >>> layer.eval()(torch.zeros(3, 64)).shape
        torch.Size([3, 32])

    Source: arXiv 1910.06188 (symmetric codes without -128).
    """

    bias: Tensor | None
    input_scale: Tensor
    input_zero_point: Tensor
    output_scale: Tensor

    # The float module that this one replaces, in a tuple to stand outside the module tree.
    original: tuple[nn.Linear] | None = None
    form: Form = DENSE

    def __init__(
        self,
        weight_codes: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None = None,
        *,
        input_scale: float | Tensor = 0.0,
        input_zero_point: int | Tensor = 0,
        output_scale: float | Tensor = 0.0,
    ) -> None:
        super().__init__()
        self._hold(weight_codes, weight_scale)
        self.out_features, self.in_features = weight_codes.shape
        device = weight_codes.device
        if bias is not None and list(bias.shape) != [self.out_features]:
            raise ValueError(f"Int8Linear: expected bias of shape [N] = [{self.out_features}]. Got {list(bias.shape)}.")
        self.register_buffer("bias", None if bias is None else bias.detach().to(torch.float32))
        for name, value, dtype in (
            ("input_scale", input_scale, torch.float32),
            ("input_zero_point", input_zero_point, torch.int32),
            ("output_scale", output_scale, torch.float32),
        ):
            made = torch.as_tensor(value, dtype=dtype, device=device).detach().reshape(()).clone()
            if made.device.type != "meta" and not 0 <= float(made) < float("inf"):
                raise ValueError(f"Int8Linear: expected a finite {name} of at least 0. Got {float(made)}.")
            self.register_buffer(name, made)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, config: Int8Config | None = None, *, input_range: tuple[float, float] | None = None
    ) -> "Int8Linear":
        """The int8 form of `linear`; its weight is rounded to the nearest code.

        Args:
            linear: weight [N, K] of any float dtype, finite.
            config: its `weight`, `activation`, `activation_unsigned` and `keep_original` count.
            input_range: (low, high) of the inputs, low <= 0 <= high, for static activations.

        Raises:
            ValueError: a weight that is not finite, or activation "static" without input_range.
        """
        config = config or Int8Config()
        weight = linear.weight.detach()
        step, zero_point = input_step(config, input_range, weight.device.type == "meta")
        codes, scale = _quantized("Int8Linear", weight, config.weight == "per_channel")
        bias = linear.bias
        made = cls(
            codes,
            scale,
            None if bias is None else bias.detach().to(torch.float32, copy=True),
            input_scale=step,
            input_zero_point=zero_point,
        )
        made.original = (linear,) if config.keep_original else None
        return made.train(linear.training)

    @classmethod
    def from_codes(
        cls,
        weight_codes: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None = None,
        *,
        input_scale: float | Tensor = 0.0,
        input_zero_point: int | Tensor = 0,
        output_scale: float | Tensor = 0.0,
    ) -> "Int8Linear":
        """A layer over the given codes and scales (see the buffers of the class), which it shares.

        Raises:
            ValueError: a shape, dtype or scale that does not fit.
        """
        return cls(
            weight_codes,
            weight_scale,
            bias,
            input_scale=input_scale,
            input_zero_point=input_zero_point,
            output_scale=output_scale,
        )

    def take_form(self, form: Form) -> None:
        """Holds the codes, and has the kernels take them, in another form; the results keep their bits."""
        if form == self.form:
            return
        codes = self.weight_codes
        self.form = form
        if form == DENSE:
            self._hold_codes(codes)
            return
        self._buffers.pop("weight_codes", None)
        self._drop_blocks()
        for name, tensor in BsrWeight.from_dense(codes, (form.rows, form.columns)).tensors().items():
            self.register_buffer(name, tensor, persistent=False)
        self.stale()

    def await_blocks(self, blocks: int, block: tuple[int, int]) -> None:
        """Makes a layer without values wait for so many blocks instead of dense codes; `take_blocks` takes them."""
        (br, bc), device = block, self.weight_codes.device
        del self.weight_codes
        for name, shape, dtype in (
            ("crow", (-(-self.out_features // br) + 1,), torch.int32),
            ("col", (blocks,), torch.int32),
            ("values", (blocks, br, bc), torch.int8),
        ):
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device=device))

    def take_blocks(self) -> None:
        """Makes dense codes of the blocks that have come; nothing to do where none were awaited.

        Raises:
            ValueError: `BsrWeight.check` finds something wrong.
        """
        if "values" in self._buffers and self.form == DENSE:
            self._hold_codes(self.blocks().check().to_dense())

    def _hold_codes(self, codes: Tensor) -> None:
        self._drop_blocks()
        # First again, as in the state dict.
        others = list(self._buffers.items())
        self._buffers.clear()
        self._buffers.update({"weight_codes": codes, **dict(others)})
        self.stale()

    def _drop_blocks(self) -> None:
        for name in BsrWeight.TENSORS:
            self._buffers.pop(name, None)
            self._non_persistent_buffers_set.discard(name)

    def blocks(self) -> BsrWeight:
        """The codes as a sparse form holds them."""
        get = self._buffers.__getitem__
        return BsrWeight(get("crow"), get("col"), get("values"), (self.out_features, self.in_features))

    def __getattr__(self, name: str) -> Any:
        if name == "weight_codes" and "values" in self._buffers:
            return self.blocks().to_dense()
        return super().__getattr__(name)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        if self.form != DENSE:
            destination[prefix + "weight_codes"] = self.weight_codes
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict,
        prefix: str,
        metadata: dict,
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        form = self.form
        # As files hold weights with many zeros.
        if prefix + "values" in state_dict and prefix + "weight_codes" not in state_dict:
            shape = (self.out_features, self.in_features)
            try:
                weight = BsrWeight.from_tensors(state_dict, shape, prefix)
            except ValueError as error:
                errors.append(f"{prefix[:-1] or type(self).__name__}: {error}")
                return
            for name in BsrWeight.TENSORS:
                del state_dict[prefix + name]
            state_dict[prefix + "weight_codes"] = weight.to_dense()
        if prefix + "weight_codes" in state_dict:
            self.take_form(DENSE)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        if form != self.form:
            self.take_form(form)
            self._repack()

    def share(self, table: "Int8Embedding") -> None:
        """Makes the codes and scales those of `table`, whose rows are this weight; the state dict then holds them once.

        Raises:
            ValueError: a table of another shape.
        """
        if table.weight_codes.shape != self.weight_codes.shape:
            raise ValueError(
                f"Int8Linear: expected a table of shape [N, K] = {list(self.weight_codes.shape)}. "
                f"Got {list(table.weight_codes.shape)}."
            )
        for name in ("weight_codes", "weight_scale"):
            self.register_buffer(name, getattr(table, name), persistent=False)
        self.stale()

    def dequantize(self) -> nn.Linear:
        """The nearest fp32 nn.Linear."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.dequantized_weight())
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.clone())
        return linear.train(self.training)

    def _sources(self) -> tuple[Tensor | None, ...]:
        get = self._buffers.__getitem__
        return (
            get("weight_codes" if self.form == DENSE else "values"),
            get("weight_scale"),
            get("bias"),
            get("input_scale"),
            get("input_zero_point"),
            get("output_scale"),
        )

    def _pack(self) -> Tensor:
        codes, scale, bias, step, zero, out = self._sources()
        static = float(step), int(zero), float(out)
        if self.form != DENSE:
            return pack_blocks(self.blocks(), self.form, scale, bias, *static)
        return torch.ops.bertkern.pack_qlinear.default(codes.contiguous(), scale, bias, *static)

    def _make_operand(self) -> Int8 | BlockSparseInt8:
        _, scale, bias, step, zero, out = self._sources()
        # Steps are read here, once: at every call that would wait for the GPU.
        grid, output_scale = (float(step), int(zero)), float(out)
        # Smaller blocks leave tensor cores idle, and those of blocks round no output.
        if self.form.rows in GPU_SIDES and self.form.columns in GPU_SIDES and not output_scale:
            return BlockSparseInt8.of(self.blocks(), scale, bias, grid)
        return Int8.of(self.weight_codes, scale, bias, grid, output_scale)

    def _plain(self, x: Tensor) -> Tensor:
        bias = self.bias
        return F.linear(x, self.dequantized_weight(x.dtype), None if bias is None else bias.to(x.dtype))

    def forward(self, x: Tensor) -> Tensor:
        if gpu.runs_on(x.device) and not self.training and x.dtype in FLOATS and not needs_grad(x):
            return self.operand()(Rows(x.reshape(-1, self.in_features)), x.dtype).view(*x.shape[:-1], -1)
        if self.training or not x.is_cpu or x.dtype not in FLOATS:
            return self._plain(x)
        return _linear(x, self.packed(), self.out_features)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._repack()

    def extra_repr(self) -> str:
        weight = "per_tensor" if self.weight_scale.numel() == 1 else "per_channel"
        known = self.input_scale.device.type != "meta"
        activation = "static" if known and float(self.input_scale) else "dynamic"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"weight={weight}, activation={activation}" + ("" if self.form == DENSE else f", form={self.form}")
        )


class Int8Embedding(_Int8Weight):
    """An embedding table of int8 codes: row i is weight_codes[i] * weight_scale[i].

    Shapes: ids int64 [...] -> [..., H], fp32 or the dtype that the module was cast to.

    Buffers:
        weight_codes: int8 [R, H] in [-127, 127].
        weight_scale: fp32 [R], or [1] for the whole table.

    Example:
        >>> table = Int8Embedding.from_embedding(nn.Embedding(10, 4))
        >>> table(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 4])
    """

    original: tuple[nn.Embedding] | None = None

    def __init__(
        self,
        weight_codes: Tensor,
        weight_scale: Tensor,
        padding_idx: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self._hold(weight_codes, weight_scale)
        self.num_embeddings, self.embedding_dim = weight_codes.shape
        self.padding_idx = padding_idx
        self.dtype = dtype

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, config: Int8Config | None = None) -> "Int8Embedding":
        """The int8 form of `embedding`, made in blocks of rows so that little memory is needed beside it."""
        config = config or Int8Config()
        weight = embedding.weight.detach()
        codes, scale = _quantized("Int8Embedding", weight, config.weight == "per_channel")
        made = cls(codes, scale, embedding.padding_idx, weight.dtype)
        made.original = (embedding,) if config.keep_original else None
        return made.train(embedding.training)

    @classmethod
    def from_codes(cls, weight_codes: Tensor, weight_scale: Tensor, padding_idx: int | None = None) -> "Int8Embedding":
        """A table over the given codes int8 [R, H] and scales fp32 [R] or [1], which it shares."""
        return cls(weight_codes, weight_scale, padding_idx)

    def dequantize(self) -> nn.Embedding:
        """The nearest nn.Embedding."""
        made = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta")
        made.weight = nn.Parameter(self.dequantized_weight(self.dtype))
        return made.train(self.training)

    def forward(self, ids: Tensor) -> Tensor:
        scale = self.weight_scale
        rows = F.embedding(ids, self.weight_codes).to(torch.float32)
        return (rows * (scale if scale.numel() == 1 else scale[ids].unsqueeze(-1))).to(self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        # The rows come out in the dtype that the rest of the model was cast to.
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, padding_idx={self.padding_idx}"


def input_step(
    config: Int8Config | GroupwiseConfig, ends: tuple[float, float] | None, later: bool
) -> tuple[float | None, int | None]:
    """Step and zero point of a layer's input, 0 and 0 for dynamic ones and for those that a file is to bring later;
    None for inputs that stay float."""
    if config.activation == "float":
        return None, None
    if config.activation == "dynamic" or (ends is None and later):
        return 0.0, 0
    if ends is None:
        raise ValueError('from_linear: expected input_range with activation "static". Got None.')
    return static_step(*ends, unsigned=config.activation_unsigned)


def _quantized(owner: str, weight: Tensor, per_row: bool) -> tuple[Tensor, Tensor]:
    """Codes and scales of `weight`, in blocks of rows; on the meta device their shapes only."""
    rows, columns = weight.shape
    codes = torch.empty(rows, columns, dtype=torch.int8, device=weight.device)
    scale = torch.empty(rows if per_row else 1, dtype=torch.float32, device=weight.device)
    if weight.device.type == "meta":
        return codes, scale
    if not finite(weight):
        raise ValueError(f"{owner}: expected a finite weight. Got Inf or NaN.")
    largest = 0.0 if per_row or not weight.numel() else max(map(abs, map(float, torch.aminmax(weight))))
    height = max(1, BLOCK // max(1, columns))
    for start in range(0, rows, height):
        block = slice(start, start + height)
        part = weight[block].to(torch.float32)
        if per_row:
            quantized = quantize_weight(part)
            codes[block], scale[block] = quantized.codes, quantized.scale
        else:
            # A row of the largest magnitude of all gives every block the scale of the whole.
            quantized = quantize_weight(torch.cat([part, part.new_full((1, columns), largest)]), per_channel=False)
            codes[block], scale[:] = quantized.codes[:-1], quantized.scale
    return codes, scale
