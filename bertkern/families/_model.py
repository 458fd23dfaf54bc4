"""Whole models: embeddings, encoder and pooler called one after another, past what transformers does between them.

Between small calls the weights of a model push everything else out of the caches, so each line of Python, each object
and each operator that a call does not touch counts: with 32 tokens in BERT-base transformers' own way costs 4 %.
"""

from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from .. import gpu
from ..gpu.graphs import bucket
from ..nn.activations import activation_code
from ..nn.encoder import LEAVES, Unfit, usable
from ..nn.linear import PackedLinear
from ..nn.packed_output import wish_of
from ..nn.packing import lean, needs_grad, plain, version
from . import _capture
from ._attention import NAMES
from ._fused import Fused, FusedEncoder

_linear = lean(torch.ops.bertkern.linear.default)
_linear_from = torch.ops.bertkern.linear_from.default
# Options of a model that change nothing about the result of an encoder.
_HARMLESS = frozenset({"num_items_in_batch", "return_dict", "use_cache"})


class FusedModel(Fused):
    """A mixin for models; a family adds `direct`. Instances have the signature of the model that they stand for."""

    RUNS = "its parts, one by one"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not any(base.__module__.startswith("transformers.") for base in cls.__mro__):
            return
        model = cls.unfused()
        forward = model.forward

        @wraps(forward)
        def call(self, *args, **kwargs):
            y = None
            if not (torch.compiler.is_compiling() or self.training or plain()):
                y = self.direct(*args, **kwargs)
            return forward(self, *args, **kwargs) if y is None else y

        cls.forward = call
        # transformers looks up what a model can record by the name of its class.
        dict.__setitem__(_CAN_RECORD_REGISTRY, str(cls), model._can_record_outputs)

    def direct(self, *args, **kwargs) -> Any:
        """The result of the model's call, or None where transformers' own way has to be taken."""
        raise NotImplementedError

    def takes(self, ids: Tensor | None, mask: Tensor | None, others: tuple, options: dict[str, Any]) -> bool:
        """Whether a call asks for nothing but the last hidden states of tokens [B, L] under a mask [B, L] or None.

        Args:
            others: arguments that must not be given, options: further keywords.
        """
        if ids is None or ids.dim() != 2 or _capture.active() or not (ids.is_cpu or gpu.runs_on(ids.device)):
            return False
        if mask is not None and (mask.shape != ids.shape or mask.device != ids.device):
            return False
        if any(value is not None and value is not False for value in others):
            return False
        for name, value in options.items():
            if value is not None and value is not False and name not in _HARMLESS:
                return False
        config = self.config
        return (
            options.get("return_dict", config.return_dict) is True
            and config._attn_implementation in NAMES.values()
            and not (config.output_hidden_states or config.output_attentions)
            and not (getattr(config, "is_decoder", False) or getattr(config, "is_causal", None))
        )

    def parts_of(self, encoder: nn.Module, ids: Tensor, mask: Tensor | None, others: dict[str, Tensor | None]) -> Any:
        """The hidden states after the encoder and the pooled ones, None where there is no pooler; or None where the
        encoder does not run fused.

        Args:
            others: what the embeddings take beside ids, by name.
        """
        made = self._replayed(encoder, ids, mask, others) if self._graphs is not None else None
        return self._parts(encoder, ids, mask, others) if made is None else made

    def _parts(self, encoder: nn.Module, ids: Tensor, mask: Tensor | None, others: dict[str, Tensor | None]) -> Any:
        parts = self._modules
        x = parts["embeddings"](input_ids=ids, **others)
        if "embeddings_project" in parts:
            x = parts["embeddings_project"](x)
        y = self.encoded(encoder, x, mask)
        if y is None:
            return None
        pooler = parts.get("pooler")
        return y, None if pooler is None else pooler(y)

    def _replayed(self, encoder: nn.Module, ids: Tensor, mask: Tensor | None, others: dict[str, Tensor | None]) -> Any:
        """What `_parts` gives, by a CUDA graph, or None."""
        if not gpu.runs_on(ids.device) or torch.is_grad_enabled() or not ids.numel():
            return None
        stamp = self._stamp(encoder)
        if stamp is None:
            return None
        length, most = ids.shape[1], getattr(self.config, "max_position_embeddings", 0)
        # A sequence without a token attends to all its positions: there, their number counts.
        wide = length if encoder.empty_attends else bucket(length, most)
        given = {"ids": ids, "mask": mask, **others}
        if mask is None and wide != length:
            given["mask"] = torch.ones(ids.shape, dtype=torch.bool, device=ids.device)
        elif mask is not None and mask.dtype != torch.bool:
            given["mask"] = mask.bool()
        inputs = {name: tensor for name, tensor in given.items() if tensor is not None}
        if any(tensor.dim() != 2 or tensor.device != ids.device for tensor in inputs.values()):
            return None
        fills = {"ids": self.config.pad_token_id or 0}
        shapes = {name: ((*tensor.shape[:1], wide), fills.get(name, 0)) for name, tensor in inputs.items()}
        if any(tensor.shape[1] != length for tensor in inputs.values()):
            return None
        flags = (encoder.keep_padding, encoder.empty_attends, encoder.exact_attention)
        key = (tuple((name, shape, inputs[name].dtype) for name, (shape, _) in shapes.items()), flags)

        def run(ids: Tensor, mask: Tensor | None = None, **others: Tensor) -> Any:
            return self._parts(encoder, ids, mask, others)

        def take(outputs: Any) -> Any:
            y, pooled = outputs
            y = y[:, :length]
            return y.clone(memory_format=torch.contiguous_format), None if pooled is None else pooled.clone()

        return self._graphs.run(stamp, key, run, inputs, shapes, take)

    def _stamp(self, encoder: nn.Module) -> Any:
        """What a graph of this model would be captured from, to be compared; None where none may be."""
        if not isinstance(encoder, FusedEncoder) or encoder.training or wish_of(encoder) is not None:
            return None
        try:
            stack = encoder._current()
        except Unfit:
            return None
        others = [module for name, part in self._modules.items() if part is not encoder for module in part.modules()]
        if any(module.training or hooked(module) for module in (*others, encoder)):
            return None
        # transformers' own hooks stay once they are there, and collect nothing in such a call.
        if not all(map(_capture.is_capture, stack.hooked())):
            return None
        tensors = [
            tensor
            for module in others
            for tensor in (*module._parameters.values(), *module._buffers.values())
            if tensor is not None
        ]
        return _Stamp(stack, [(tensor, version(tensor), tensor.data_ptr()) for tensor in tensors])

    def encoded(self, encoder: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor | None:
        """The hidden states after the encoder, or None where it does not run fused."""
        if not isinstance(encoder, FusedEncoder) or encoder.training or hooked(encoder):
            return None
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.bool()
        try:
            return encoder._run(x, mask, (), {}, None, False)
        except Unfit:
            return None  # which the way through the encoder counts


class _Stamp:
    """A stack, and tensors beside it with their state; equal where nothing was exchanged or changed."""

    def __init__(self, stack: Any, tensors: list[tuple[Tensor, int, int]]) -> None:
        self.stack = stack
        # The tensors are held, so that no other comes to have its id.
        self.tensors, self.state = tensors, [(id(tensor), *state) for tensor, *state in tensors]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stamp) and self.stack is other.stack and self.state == other.state

    __hash__ = None  # type: ignore[assignment]


class FusedPooler(Fused):
    """A mixin for poolers: `activation(dense(x[:, 0]))` as one operator."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        dense, activation = self._modules["dense"], self._modules["activation"]
        code = activation_code(activation)
        direct = (
            code is not None
            and type(dense) in LEAVES
            and not (self.training or plain())
            and (torch.compiler.is_compiling() or not (hooked(dense) or hooked(activation)))
            and dense.packable()
            and usable(hidden_states) is None
        )
        if not direct:
            return super().forward(hidden_states)
        first, packed = hidden_states[:, 0], dense.packed()
        if type(dense) is PackedLinear and needs_grad(dense.weight, dense.bias):
            return _linear_from(first, packed, dense.weight, dense.bias, code)
        return _linear(first, packed, dense.out_features, code)


def hooked(module: nn.Module) -> bool:
    """Whether calling `module` does more than its forward."""
    own = module.__dict__
    return bool(
        own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    )
