"""Group-wise low-bit weights: a linear layer and an embedding table, their tensors the canonical form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..config import GroupwiseConfig
from ..formats.groupwise import GroupwiseWeight, expect_bits, group_count, read_rows, table_rows
from ..formats.rounding import round_weight
from ..gpu.linears import Groupwise
from ..ops.groupwise_planes import GroupwisePlanes, pack_for_triton
from ..ops.groupwise_triton import groupwise_linear_cuda
from .int8 import finite, input_step
from .linear import FLOATS
from .packing import Copy, PackedCache, lean, version

_linear = lean(torch.ops.bertkern.linear.default)
CODES = "weight_codes"


class _GroupwiseWeight(PackedCache, nn.Module):
    """The tensors of a `GroupwiseWeight` as buffers; all keep their dtype in casts.

    Once packed, the codes are held by the packed copy alone: `weight_codes` and the state dict make them anew.
    """

    weight_codes: Tensor
    weight_scale: Tensor
    weight_zero: Tensor | None
    weight_bits: Tensor
    # The table whose codes this module has for its own, in a tuple to stand outside the module tree.
    table: tuple[GroupwiseEmbedding] | None = None

    def _hold(self, weight: GroupwiseWeight) -> None:
        self.shape, self.axis, self.group_size = weight.shape, weight.axis, weight.group_size
        for name in GroupwiseWeight.TENSORS:
            self.register_buffer(f"weight_{name}", getattr(weight, name))

    def held(self, name: str) -> Tensor | None:
        """The tensor `weight_<name>`, None where there is none; of codes, None once they are packed."""
        owner = self.table[0] if self.table else self
        return owner._buffers.get(f"weight_{name}")

    def groupwise_weight(self) -> GroupwiseWeight:
        """The weight as it is kept."""
        tensors = (getattr(self, f"weight_{name}") for name in GroupwiseWeight.TENSORS)
        return GroupwiseWeight(*tensors, **self._layout())

    def _layout(self) -> dict[str, Any]:
        return {"shape": self.shape, "axis": self.axis, "group_size": self.group_size}

    def dequantized_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(codes - zero) * scale, [N, K]."""
        return self.groupwise_weight().dequantize(dtype)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, made anew at every access, for code that reads a layer's weight. Not a parameter."""
        return self.dequantized_weight()

    # --- the packed copy ---------------------------------------------------------------------------------------------

    def _codes_of(self, packed: Tensor) -> Tensor:
        """The canonical codes that `packed` holds."""
        raise NotImplementedError

    def packed(self) -> Tensor:
        made = super().packed()
        if not torch.compiler.is_compiling():
            self._buffers.pop(CODES, None)
        return made

    def stale(self) -> None:
        self._take_codes()
        super().stale()

    def _take_codes(self) -> None:
        """Has the codes among the buffers again, first as in the state dict."""
        if CODES not in self._buffers and not self.table:
            others = dict(self._buffers)
            codes = self.weight_codes
            self._buffers.clear()
            self._buffers.update({CODES: codes, **others})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("weight_") and self.table:
            return getattr(self.table[0], name)
        if name == CODES and self.__dict__.get("_packed") is not None:
            return self._codes_of(self._packed.packed)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("weight_") and self.table:
            setattr(self.table[0], name, value)
            return
        if name == CODES and self.__dict__.get("_packed") is not None:
            self.stale()
        super().__setattr__(name, value)

    def __getstate__(self) -> dict:
        state = super().__getstate__()
        if CODES not in state["_buffers"] and not self.table:
            state["_buffers"] = {CODES: self.weight_codes, **state["_buffers"]}
        return state

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._repack()

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        if not self.table:
            destination[prefix + CODES] = self.weight_codes
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors) -> None:
        self._take_codes()
        names = [name for name in GroupwiseWeight.TENSORS if self.held(name) is not None]
        found = {name: state_dict.get(f"{prefix}weight_{name}") for name in names}
        if not self.table and all(tensor is not None for tensor in found.values()):
            try:
                GroupwiseWeight(**{"zero": None, **found}, **self._layout()).check()
            except ValueError as error:
                errors.append(f"{prefix.removesuffix('.')}: {error}")
                return
            # Other bits make codes of another length.
            for name, tensor in found.items():
                if tensor.shape != self.held(name).shape:
                    setattr(self, f"weight_{name}", torch.empty_like(tensor, device=self.held(name).device))
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        self._take_codes()
        # What comes out, and float activations, have the dtype that the rest of the model was cast to.
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype

        # Moves go through, casts do not: half-precision scales would change every weight.
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    def _bits_repr(self) -> str:
        known = self.weight_bits.device.type != "meta"
        return "/".join(map(str, sorted(set(self.weight_bits.tolist())))) if known else "?"


class GroupwiseLinear(_GroupwiseWeight):
    """A linear layer with low-bit weights, and int8 or float activations: y = x . ((q - zero) * scale)' + bias.

    Shapes: x [..., K] fp32, bf16 or fp16 -> [..., N], dtype of x.

    Training mode, other devices and gradients use the dequantized weight and leave activations as they are. Once it has
    run on the CPU the layer holds its codes in the kernels' order alone: `weight_codes` and the state dict make them
    anew, so what is changed in place in the tensor that comes back is lost; assign it instead. On CUDA the layer holds
    them twice, as they are and in the order of the kernels of `groupwise_linear_cuda`, which are made at the first
    call; only after it can torch.compile trace the layer in one graph.

    Buffers:
        weight_codes, weight_scale, weight_zero, weight_bits: see `bertkern.formats.GroupwiseWeight`.
        bias: fp32 [N] or None.
        input_scale: fp32 scalar; 0: each token's own range, else the step of static activations; None: activations
            stay float.
        input_zero_point: int32 scalar, as of `Int8Linear`. None beside an input_scale of None.

    Example:
        >>> layer = GroupwiseLinear(quantize_groupwise(torch.randn(32, 64), bits=4, group_size=8))
        >>> layer.eval()(torch.zeros(3, 64)).shape
        torch.Size([3, 32])

    Source: arXiv 1909.05840.
    """

    bias: Tensor | None
    input_scale: Tensor | None
    input_zero_point: Tensor | None

    # The float module that this one replaces, in a tuple to stand outside the module tree.
    original: tuple[nn.Linear] | None = None
    dtype: torch.dtype = torch.float32
    _planes: Copy | None = None
    # On a GPU, see bertkern.ops.linear_providers.
    provider: str = "auto"

    def __init__(
        self,
        weight: GroupwiseWeight,
        bias: Tensor | None = None,
        *,
        input_scale: float | Tensor | None = 0.0,
        input_zero_point: int | Tensor | None = 0,
    ) -> None:
        super().__init__()
        self._hold(weight.check())
        self.out_features, self.in_features = weight.shape
        if bias is not None and list(bias.shape) != [self.out_features]:
            raise ValueError(
                f"GroupwiseLinear: expected bias of shape [N] = [{self.out_features}]. Got {list(bias.shape)}."
            )
        self.register_buffer("bias", None if bias is None else bias.detach().to(torch.float32))
        for name, value, dtype in (
            ("input_scale", input_scale, torch.float32),
            ("input_zero_point", None if input_scale is None else input_zero_point, torch.int32),
        ):
            if value is None:
                self.register_buffer(name, None)
                continue
            made = torch.as_tensor(value, dtype=dtype, device=weight.codes.device).detach().reshape(()).clone()
            if made.device.type != "meta" and not 0 <= float(made) < float("inf"):
                raise ValueError(f"GroupwiseLinear: expected a finite {name} of at least 0. Got {float(made)}.")
            self.register_buffer(name, made)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        config: GroupwiseConfig | None = None,
        *,
        bits: Tensor | Sequence[int] | int | None = None,
        input_range: tuple[float, float] | None = None,
        weight: GroupwiseWeight | None = None,
    ) -> GroupwiseLinear:
        """The low-bit form of `linear`.

        Args:
            linear: weight [N, K] of any float dtype, finite.
            config: all but embedding_bits, pooler, head, skip and layer_bits counts.
            bits: of all groups or of each, instead of the config's.
            input_range: (low, high) of the inputs, low <= 0 <= high, for static activations.
            weight: what the weight becomes, made elsewhere; then config tells of the activations alone.

        Raises:
            ValueError: a weight that is not finite, bits or a weight that do not fit, or activation "static" without
                input_range.

        Example:
            >>> GroupwiseLinear.from_linear(nn.Linear(64, 32), GroupwiseConfig(bits=2, groups=4)).group_size
            8
        """
        config = config or GroupwiseConfig()
        step, zero = input_step(config, input_range, linear.weight.device.type == "meta")
        if weight is None:
            weight = rounded("GroupwiseLinear", linear.weight, config, config.bits if bits is None else bits)
        elif weight.shape != tuple(linear.weight.shape):
            raise ValueError(
                f"GroupwiseLinear: expected weight of shape [N, K] = {list(linear.weight.shape)}. "
                f"Got {list(weight.shape)}."
            )
        bias = None if linear.bias is None else linear.bias.detach().to(torch.float32, copy=True)
        made = cls(weight, bias, input_scale=step, input_zero_point=zero)
        if linear.weight.dtype in FLOATS:
            made.dtype = linear.weight.dtype
        made.original = (linear,) if config.keep_original else None
        return made.train(linear.training)

    @classmethod
    def from_table(
        cls,
        table: GroupwiseEmbedding,
        bias: Tensor | None = None,
        *,
        input_scale: float | None = None,
        input_zero_point: int | None = None,
    ) -> GroupwiseLinear:
        """A layer whose weight is `table`, row by row: it has the table's codes, which the state dict holds once."""
        made = cls(table.groupwise_weight(), bias, input_scale=input_scale, input_zero_point=input_zero_point)
        for name in GroupwiseWeight.TENSORS:
            del made._buffers[f"weight_{name}"]
        made.table, made.dtype = (table,), table.dtype
        return made.train(table.training)

    def dequantize(self) -> nn.Linear:
        """The nearest fp32 nn.Linear."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.dequantized_weight())
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.clone())
        return linear.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        if self.training or x.dtype not in FLOATS or not (x.is_cpu or x.is_cuda):
            return self._plain(x)
        if x.is_cuda:
            return self._by_planes(x)
        return _linear(x, self.packed(), self.out_features)

    def _by_planes(self, x: Tensor) -> Tensor:
        """What `forward` gives on CUDA."""
        planes, options = self.planes()
        return groupwise_linear_cuda(x, planes, self.bias, **options, provider=self.provider)

    def planes(self) -> tuple[GroupwisePlanes, dict[str, Any]]:
        """The weight laid out for the GPU's kernels, on its device, and how they round activations.

        It is made anew whenever the layer's tensors change, and never saved.
        """
        copy = self._planes
        if copy is not None and torch.compiler.is_compiling():
            return copy.packed
        sources = self._operand_sources()
        if copy is None or not copy.follows(sources):
            copy = self._lay_out(sources)
        return copy.packed

    def _make_operand(self) -> Groupwise:
        planes, options = self.planes()
        return Groupwise(planes, self.bias, options)

    def _operand_sources(self) -> tuple[Tensor | None, ...]:
        return (self._buffers.get(CODES), *self._sources())

    @torch.compiler.disable
    @torch.no_grad()
    def _lay_out(self, sources: tuple[Tensor | None, ...]) -> Copy:
        # Steps are read here, once: at every call that would wait for the GPU.
        options: dict[str, Any] = {"quantized": False}
        if self.input_scale is not None:
            static = {"input_scale": float(self.input_scale), "input_zero_point": int(self.input_zero_point)}
            options = {"quantized": True, **static}
        copy = Copy.of(sources, (pack_for_triton(self.groupwise_weight()), options))
        self.__dict__["_planes"] = copy
        return copy

    def stale(self) -> None:
        self.__dict__.pop("_planes", None)
        super().stale()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        self.__dict__.pop("_planes", None)
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict:
        state = super().__getstate__()
        state.pop("_planes", None)
        return state

    def _plain(self, x: Tensor) -> Tensor:
        bias = self.bias
        return F.linear(x, self.dequantized_weight(x.dtype), None if bias is None else bias.to(x.dtype))

    def _sources(self) -> tuple[Tensor | None, ...]:
        get = self._buffers.get
        scale, zero, bits = map(self.held, ("scale", "zero", "bits"))
        shared = self.table[0].codes_in() if self.table else None
        return scale, zero, get("bias"), bits, get("input_scale"), get("input_zero_point"), shared

    def weights(self) -> list[Tensor]:
        held = (*self._sources()[:4], self.held("codes"))
        return [tensor for tensor in held if tensor is not None]

    def _codes_of(self, packed: Tensor) -> Tensor:
        return ops.unpack_groupwise(packed, self.held("bits"))

    def _pack(self) -> Tensor:
        bias, step, zero = self.bias, self.input_scale, self.input_zero_point
        if step is None:
            operand = torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float32
            return ops.pack_groupwise(self.groupwise_weight(), bias, operand=operand)
        static = {"input_scale": float(step), "input_zero_point": int(zero)}
        return ops.pack_groupwise(self.groupwise_weight(), bias, **static)

    @property
    def activation(self) -> str:
        """ "float", "static" or "dynamic"; the last on the meta device for whatever is rounded."""
        step = self.input_scale
        if step is None:
            return "float"
        return "static" if step.device.type != "meta" and float(step) else "dynamic"

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self._bits_repr()}, axis={self.axis}, group_size={self.group_size}, activation={self.activation}"
        )


class GroupwiseEmbedding(_GroupwiseWeight):
    """An embedding table of low-bit codes; groups run along its rows ("n") or its columns ("k").

    Shapes: ids int64 [...] -> [..., H], fp32 or the dtype that the module was cast to.

    Example:
        >>> table = GroupwiseEmbedding(quantize_groupwise(torch.randn(10, 4), bits=4, group_size=1))
        >>> table(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 4])
    """

    original: tuple[nn.Embedding] | None = None

    def __init__(
        self, weight: GroupwiseWeight, padding_idx: int | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self._hold(weight.check())
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx = padding_idx
        self.dtype = dtype

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        config: GroupwiseConfig | None = None,
        *,
        bits: int | None = None,
        weight: GroupwiseWeight | None = None,
    ) -> GroupwiseEmbedding:
        """The low-bit form of `embedding`, its rows each a group; made in blocks of rows.

        Args:
            config: its embedding_bits (None: 8), symmetric, whole_zero, method and keep_original count.
            bits: instead of the config's.
            weight: what the table becomes, made elsewhere.

        Raises:
            ValueError: a table that is not finite, or a weight of another shape.
        """
        config, table = config or GroupwiseConfig(), embedding.weight
        if weight is None:
            bits = bits or config.embedding_bits or 8
            rows = replace(config, axis="n", groups=None, group_size=1, shared=False)
            weight = rounded("GroupwiseEmbedding", table, rows, bits)
        elif weight.shape != tuple(table.shape):
            raise ValueError(
                f"GroupwiseEmbedding: expected weight of shape [R, H] = {list(table.shape)}. Got {list(weight.shape)}."
            )
        made = cls(weight, embedding.padding_idx, table.dtype)
        made.original = (embedding,) if config.keep_original else None
        return made.train(embedding.training)

    def dequantize(self) -> nn.Embedding:
        """The nearest nn.Embedding."""
        made = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta")
        made.weight = nn.Parameter(self.dequantized_weight(self.dtype))
        return made.train(self.training)

    def forward(self, ids: Tensor) -> Tensor:
        if not self.packable():
            return F.embedding(ids, self.dequantized_weight()).to(self.dtype)
        return read_rows(F.embedding(ids, self.packed()), self.embedding_dim).to(self.dtype)

    def packable(self) -> bool:
        """Whether rows can be read one by one: groups of rows, all of as many bits."""
        return self.axis == "n" and self.embedding_dim >= 8 and self._one_width()

    def _one_width(self) -> bool:
        known, bits = self.__dict__.get("_width"), self._buffers["weight_bits"]
        if known is not None and (torch.compiler.is_compiling() or known[:2] == (id(bits), version(bits))):
            return known[2]
        if bits.device.type == "meta":
            return False
        found = bool((bits == bits[:1]).all())
        # The tensor is kept, so that no other has its id.
        self.__dict__["_width"] = id(bits), version(bits), found, bits
        return found

    def codes_in(self) -> Tensor:
        """The tensor that holds the codes now: the canonical ones, or the packed copy."""
        codes = self._buffers.get(CODES)
        return self._packed.packed if codes is None else codes

    def _sources(self) -> tuple[Tensor | None, ...]:
        return tuple(map(self._buffers.get, ("weight_scale", "weight_zero", "weight_bits")))

    def _codes_of(self, packed: Tensor) -> Tensor:
        return packed[:, 8:].reshape(-1)

    def _pack(self) -> Tensor:
        return table_rows(self.groupwise_weight())

    def __getstate__(self) -> dict:
        return {key: value for key, value in super().__getstate__().items() if key != "_width"}

    def extra_repr(self) -> str:
        about = f"{self.num_embeddings}, {self.embedding_dim}, padding_idx={self.padding_idx}"
        return f"{about}, bits={self._bits_repr()}"


def rounded(owner: str, weight: Tensor, config: GroupwiseConfig, bits: Tensor | Sequence[int] | int) -> GroupwiseWeight:
    """The low-bit form of a matrix under `config`, all but its bits."""
    weight = weight.detach()
    if not finite(weight):
        raise ValueError(f"{owner}: expected a finite weight. Got Inf or NaN.")
    size = config.size_of(weight.shape[0] if config.axis == "n" else weight.shape[1])
    wide = expect_bits(owner, bits, group_count(tuple(weight.shape), config.axis, size))
    how = {name: getattr(config, name) for name in ("method", "symmetric", "whole_zero", "shared")}
    return round_weight(weight, wide, size, config.axis, **how)
