"""The classes that a family mixes into transformers' own: one operator where it fits, `super().forward` elsewhere."""

import re
from typing import Any

import torch
from torch import Tensor, nn

from .. import _gradients, gpu
from ..gpu.graphs import GraphPool
from ..head_masks import active_factors, is_mask
from ..nn.encoder import LayerParts, Stack, Unfit, key_mask, usable
from ..nn.gpu_encoder import GpuStack, asked_mask, constant, embed, unusable
from ..nn.groupwise import GroupwiseEmbedding
from ..nn.head_masks import HeadFactors, joined, multiplied
from ..nn.int8 import Int8Embedding
from ..nn.linear import PackedLinear
from ..nn.packed_output import wish_of
from ..nn.packing import lean, needs_grad, plain
from . import _attention, _capture  # noqa: F401  (registers attn_implementation="bertkern")

_embed = lean(torch.ops.bertkern.embed.default)
_embed_from = torch.ops.bertkern.embed_from.default
# The scale of float tables, and the token type of every token when none is given; transformers may import this while
# it loads a model on meta.
_ONE, ZERO = torch.ones(1, device="cpu"), torch.zeros((), dtype=torch.int64, device="cpu")
# Arguments of encoders and layers that change nothing about their result.
HARMLESS = frozenset(
    {
        "num_items_in_batch",  # of Trainer, for its loss
        "output_hidden_states",
        "position_ids",
        "return_dict",
        "token_type_ids",
        "use_cache",
    }
)


class Fused:
    """A mixin: instances were made by a change of class and go back by another.

    Attributes:
        fallbacks: how often a call took the plain path, by reason.
        keep_padding: whether the positions after a sequence's last token are computed too; else they come back as
            zeros.
        empty_attends: whether a sequence without a single token attends evenly to all its positions, as transformers'
            eager attention has it; else to nothing, as its sdpa.
        exact_attention: whether attention between int8 or bf16 projections is computed in fp32; else in bf16 where the
            processor has AVX-512 BF16, with sums in fp32.
    """

    # What the report says of such modules.
    RUNS = "one operator"

    def runs_as(self) -> str:
        """What computes it now."""
        return self.RUNS

    keep_padding: bool = False
    empty_attends: bool = False
    exact_attention: bool = False
    # Of `bertkern.cuda_graphs`.
    _graphs: GraphPool | None = None

    @classmethod
    def unfused(cls) -> type[nn.Module]:
        """The class in transformers that this one stands for."""
        return next(base for base in cls.__mro__ if base.__module__.startswith("transformers."))

    def fuse(self) -> None:
        """Makes the operator's arguments ready.

        Raises:
            Unfit: the module is not what the operator computes.
        """

    def unfuse(self) -> None:
        """Drops what `fuse` made."""
        for name in ("_stack", "_graphs", "fallbacks", "keep_padding", "empty_attends", "exact_attention"):
            self.__dict__.pop(name, None)

    def fell_back(self, reason: str) -> None:
        """Counts a call on the plain path."""
        if not torch.compiler.is_compiling():
            counts = self.__dict__.setdefault("fallbacks", {})
            counts[reason] = counts.get(reason, 0) + 1


def _after_load(module: Any, incompatible: Any) -> None:
    # Now, because compiled code does not look whether its inputs are current.
    module.refuse()


def follow_loading(module: nn.Module) -> None:
    """Has `module.refuse()` called after every load_state_dict."""
    if _after_load not in module._load_state_dict_post_hooks.values():
        module.register_load_state_dict_post_hook(_after_load)


def unfollow_loading(module: nn.Module) -> None:
    """Undoes `follow_loading`."""
    for key, hook in list(module._load_state_dict_post_hooks.items()):
        if hook is _after_load:
            del module._load_state_dict_post_hooks[key]


class _FusedLayers(Fused):
    """What encoder and layer share: the operator over some layers."""

    # The operator's arguments for some layers, and those on a GPU; None: there it runs module by module.
    STACK: type[Stack] = Stack
    GPU_STACK: type[GpuStack] | None = GpuStack
    _stack: Stack | None = None

    def runs_as(self) -> str:
        return self._stack.runs_as() if isinstance(self._stack, GpuStack) else super().runs_as()

    def layers(self) -> list[nn.Module]:
        """The layers that run here."""
        raise NotImplementedError

    def watched(self) -> list[nn.Module]:
        """The modules that the operator stands for; a hook on one of them would be skipped."""
        raise NotImplementedError

    def fuse(self) -> None:
        self._stack = self._build()
        follow_loading(self)

    def unfuse(self) -> None:
        super().unfuse()
        unfollow_loading(self)

    def refuse(self) -> None:
        """Fuses anew after a change; modules that no longer fit take the plain path."""
        try:
            self._stack = self._build()
        except (Unfit, RuntimeError):
            self._stack = None

    def fused(
        self,
        x: Tensor,
        mask: Tensor | None,
        others: tuple,
        options: dict[str, Any],
        *,
        bias: Tensor | None = None,
        states: bool = False,
    ) -> Tensor | None:
        """The result of the operator, [B, L, H], or None where the plain path has to run.

        Args:
            x: hidden states [B, L, H].
            mask: of any form that transformers hands over.
            others: further arguments by position, options: by keyword; what is None or False asks for nothing.
            bias: what is added to attention scores, fp32 [1 or B, heads, L, L].
            states: whether the result is the hidden states after every layer, [layers, B, L, H].
        """
        if plain():
            return None
        try:
            return self._run(x, mask, others, options, bias, states)
        except Unfit as reason:
            self.fell_back(reason.args[0])
            return None

    def _run(
        self, x: Tensor, mask: Tensor | None, others: tuple, options: dict[str, Any], bias: Tensor | None, states: bool
    ) -> Tensor:
        if self.training:
            raise Unfit("training mode")
        if any(value is not None for value in others):
            raise Unfit("cross-attention or a cache")
        for name, value in options.items():
            if value is not None and value is not False and name not in HARMLESS and not isinstance(value, HeadFactors):
                raise Unfit(f"{name} was given")
        if _capture.wants("attentions"):
            raise Unfit("output_attentions was given")
        on_gpu = gpu.runs_on(x.device)
        if reason := unusable(x) if on_gpu else usable(x):
            raise Unfit(reason)
        if on_gpu:
            keys, bias, empty_attends = asked_mask(mask, bias, x, self.empty_attends)
        else:
            keys, empty_attends = key_mask(mask, x.shape[0], x.shape[1], self.empty_attends)
        wish = wish_of(self)
        collects = wish is None and self.captures() and _capture.wants("hidden_states")
        every = wish is None and (states or collects)

        stack, masked = self._stack, False
        if not torch.compiler.is_compiling():
            stack = self._current()
            hooks = [hook for hook in stack.hooked() if not _capture.is_capture(hook)]
            masked = any(map(is_mask, hooks))
            if not all(map(is_mask, hooks)):
                raise Unfit("hooks on inner modules")
        elif stack is None:
            raise Unfit("changed since the last call")
        if stack.device != x.device:
            raise Unfit("another device")
        heads = _head_factors(stack, options.get("head_mask"), masked, x.shape[0])

        flags = (self.keep_padding, every, empty_attends, self.exact_attention, heads, wish is not None)
        y = None
        if self._graphs is not None and isinstance(stack, GpuStack) and not every and wish is None and heads is None:
            y = self._replayed(stack, {"x": x, "mask": keys, "position_bias": bias}, empty_attends)
        if y is None:
            y = stack.run(x, keys, bias, *flags)
        if wish is not None:
            wish.hidden = y
            return y.new_zeros(()).expand(x.shape)
        if collects:
            _capture.collect(self.layers(), x, y.unbind(0))
        return y[-1] if every and not states else y

    def _replayed(self, stack: GpuStack, given: dict[str, Tensor | None], empty_attends: bool) -> Tensor | None:
        """The result by a CUDA graph, or None."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return None
        inputs = {name: tensor for name, tensor in given.items() if tensor is not None}
        shapes = {name: (tuple(tensor.shape), 0) for name, tensor in inputs.items()}
        flags = (self.keep_padding, empty_attends, self.exact_attention)
        key = (tuple((name, shape, inputs[name].dtype) for name, (shape, _) in shapes.items()), flags)

        def run(**inputs: Tensor) -> tuple[Tensor]:
            own = {"mask": None, **inputs}
            return (
                stack.run(
                    **own,
                    keep_padding=self.keep_padding,
                    empty_attends=empty_attends,
                    exact_attention=self.exact_attention,
                ),
            )

        return self._graphs.run(stack, key, run, inputs, shapes, lambda outputs: outputs[0].clone())

    def captures(self) -> bool:
        """Whether hidden states inside this module are collected by hooks that the operator passes over."""
        return False

    def _build(self) -> Stack:
        layers = self.layers()
        if not all(isinstance(layer, FusedLayer) for layer in layers):
            raise Unfit("its layers stay as they were")
        try:
            parts = [layer.parts() for layer in layers]
            stack = self._stack_class(parts)(layers, parts, self.watched())
        except AttributeError as error:
            raise Unfit(f"its parts have moved: {error}") from error
        if not isinstance(stack, GpuStack):
            _gradients.own(stack.norms, self)
        return stack

    def _stack_class(self, parts: list[LayerParts]) -> type[Stack]:
        if not parts or not gpu.runs_on(getattr(*parts[0].output_norm).weight.device):
            return self.STACK
        if self.GPU_STACK is None:
            raise Unfit("another device")
        return self.GPU_STACK

    def _current(self) -> Stack:
        stack = self._stack
        if stack is None or stack.layers != self.layers() or not stack.current():
            stack = self._stack = self._build()
        return stack

    def stale(self) -> None:
        """Forgets what was made of parameters that may change unseen; see PackedCache."""
        for module in self.modules():
            if isinstance(module, _FusedLayers):
                module._stack = None
            elif isinstance(module, PackedLinear):
                module.stale()

    def train(self, mode: bool = True):
        before = self.training
        super().train(mode)
        if mode:
            self._stack = None
        elif before:
            self.refuse()
        return self

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "_stack"}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.refuse()

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.refuse()
        return self


def _head_factors(stack: Stack, keyword: HeadFactors | None, masked: bool, batch: int) -> Tensor | None:
    """What the heads of all layers are multiplied by: the call's keyword, `bertkern.head_mask`, or both."""
    if keyword is None and not masked:
        return None
    factors = [None if keyword is None else keyword.get(attention) for attention in stack.attentions]
    if masked:
        factors = list(map(multiplied, factors, active_factors(stack.outs)))
    return joined(factors, stack.heads, batch, stack.device)


class FusedLayer(_FusedLayers):
    """A mixin for layers; a family adds `parts`."""

    def parts(self) -> LayerParts:
        """Where this layer keeps what the operator needs; raises Unfit. `self` may be of the unfused class."""
        raise NotImplementedError

    @classmethod
    def set_heads(cls, layer: nn.Module, kept: tuple[int, ...] | None, count: int) -> None:
        """Tells the attention of `layer`, whose projections have another width now, that it has `count` heads.

        Args:
            layer: of this class or of the unfused one.
            kept: which ones they are of those that it was built with, ascending; None: all of them.
        """
        parts = cls.parts(layer)
        attention = parts.query[0]
        for name in ("num_attention_heads", "n_heads"):
            if hasattr(attention, name):
                setattr(attention, name, count)
        if hasattr(attention, "all_head_size"):
            attention.all_head_size = count * attention.attention_head_size
        if kept is None:
            attention.__dict__.pop("kept_heads", None)
        else:
            attention.kept_heads = kept

    def layers(self) -> list[nn.Module]:
        return [self]

    def watched(self) -> list[nn.Module]:
        return [module for module in self.modules() if module is not self]

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args, **kwargs) -> Tensor:
        y = self.fused(hidden_states, attention_mask, args, kwargs)
        return super().forward(hidden_states, attention_mask, *args, **kwargs) if y is None else y


class FusedEncoder(_FusedLayers):
    """A mixin for encoders that keep their layers in `layer`; a family adds `forward`."""

    def layers(self) -> list[nn.Module]:
        return list(self.layer)

    def watched(self) -> list[nn.Module]:
        return [module for module in self.modules() if module is not self]

    def captures(self) -> bool:
        return True


class FusedEmbeddings(Fused):
    """A mixin for embeddings: rows of all tables gathered, summed and normalised by one operator."""

    TABLES = ("word_embeddings", "token_type_embeddings", "position_embeddings")

    def fuse(self) -> None:
        self._arguments()

    def tables(self) -> tuple[list[Tensor], list[Tensor], list[int]]:
        """The tables, their scales, and the rows that get no gradient (-1: none); raises Unfit."""
        tables, scales, padding = [], [], []
        for name in self.TABLES:
            table = self._modules[name]
            if type(table) is Int8Embedding:
                tables.append(table._buffers["weight_codes"])
                scales.append(table._buffers["weight_scale"])
            elif type(table) is GroupwiseEmbedding and table.packable():
                tables.append(table.packed())
                scales.append(_ONE)
            elif type(table) is nn.Embedding and table.max_norm is None:
                weight = table._parameters["weight"]
                half = weight.dtype == torch.float16 and gpu.runs_on(weight.device)
                if weight.dtype not in (torch.float32, torch.bfloat16) and not half:
                    raise Unfit("another dtype")
                if table.sparse or table.scale_grad_by_freq:
                    raise Unfit("a table with sparse or scaled gradients")
                tables.append(weight)
                scales.append(_ONE)
            else:
                raise Unfit(f"a table is {type(table).__name__}")
            padding.append(-1 if table.padding_idx is None else table.padding_idx)
        return tables, scales, padding

    def _arguments(self) -> tuple[list[Tensor], list[Tensor], list[int], nn.LayerNorm]:
        norm = self._modules["LayerNorm"]
        if type(norm) is not nn.LayerNorm or norm.weight is None or norm.bias is None:
            raise Unfit(f"a norm is {type(norm).__name__}")
        return *self.tables(), norm

    def embed(self, ids: Tensor | None, *others: Tensor) -> Tensor | None:
        """The embeddings of `ids` [B, L] and of `others`, which broadcast to it, in the order of TABLES.

        Returns:
            [B, L, H], or None where the plain path has to run.
        """
        if plain():
            return None
        try:
            return self._embed(ids, *others)
        except Unfit as reason:
            self.fell_back(reason.args[0])
            return None

    def check(self, ids: Tensor | None) -> None:
        """Raises Unfit where a call has to take the plain path."""
        if self.training:
            raise Unfit("training mode")
        if ids is None:
            raise Unfit("inputs_embeds was given")
        if not (ids.is_cpu or gpu.runs_on(ids.device)) or ids.dim() != 2:
            raise Unfit("another device or shape")
        if not torch.compiler.is_compiling():
            for module in self._modules.values():
                if module._forward_hooks or module._forward_pre_hooks:
                    raise Unfit("hooks on inner modules")

    def _embed(self, ids: Tensor | None, *others: Tensor) -> Tensor:
        self.check(ids)
        tables, scales, padding, norm = self._arguments()
        weight, bias = norm._parameters["weight"], norm._parameters["bias"]
        if weight.device != ids.device:
            raise Unfit("another device or shape")
        dtype = weight.dtype
        if gpu.runs_on(ids.device):
            nothing, one = (constant(value, dtype, ids.device) for value, dtype in ((0, ZERO.dtype), (1, _ONE.dtype)))
            rows = self.rows(ids, *(nothing if part is ZERO else part for part in others))
            scales = [one if scale is _ONE else scale for scale in scales]
            return embed(rows, tables, scales, norm)
        rows = self.rows(ids, *others)
        fp32 = (weight, bias) if dtype == torch.float32 else (weight.float(), bias.float())
        try:
            if needs_grad(*tables, weight, bias):
                return _embed_from(rows, tables, scales, *fp32, norm.eps, dtype, padding)
            return _embed(rows, tables, scales, *fp32, norm.eps, dtype)
        except RuntimeError as error:
            raise self.named(error) from None

    def rows(self, ids: Tensor, *others: Tensor) -> list[Tensor]:
        """The ids of every table, int64 of one shape; raises Unfit."""
        return [_int64(part, ids.shape, name) for part, name in zip((ids, *others), self.TABLES, strict=True)]

    def named(self, error: RuntimeError) -> RuntimeError:
        """An operator's error with the name of the table that it tells of."""
        found = re.search(r"of table (\d)", str(error))
        if found is None:
            return error
        # RoBERTa's positions, for example, begin behind that of padding.
        name = self.TABLES[int(found[1])]
        return RuntimeError(f"{error} Table {found[1]}: {name}, of {self._modules[name].num_embeddings}.")


def _int64(ids: Tensor, shape: torch.Size, name: str) -> Tensor:
    # At 16 tokens even an operation that does nothing shows.
    if ids.dtype != torch.int64:
        if ids.dtype != torch.int32:
            raise Unfit("ids of another dtype")
        ids = ids.long()
    if ids.shape == shape:
        return ids
    if ids.dim() and ids.shape[-1] != 1 and ids.shape[-1] != shape[-1]:
        # BERT slices its positions: sequences that are too long find fewer.
        raise RuntimeError(f"{name}: expected ids for {shape[-1]} tokens. Got {ids.shape[-1]}.")
    return ids.expand(shape)
