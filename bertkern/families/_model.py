"""Whole models: embeddings, encoder and pooler called one after another, past what transformers does between them.

Between small calls the weights of a model push everything else out of the caches, so each line of Python, each object
and each operator that a call does not touch counts: with 32 tokens in BERT-base transformers' own way costs 4 %.
"""

from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from ..nn.activations import activation_code
from ..nn.encoder import LEAVES, Unfit, usable
from ..nn.linear import PackedLinear
from ..nn.packing import lean, needs_grad, plain
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
        if ids is None or ids.dim() != 2 or not ids.is_cpu or _capture.active():
            return False
        if mask is not None and (mask.shape != ids.shape or not mask.is_cpu):
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
