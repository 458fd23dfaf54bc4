"""attn_implementation="bertkern": masks of padding reach the encoder as [B, 1, 1, L], never looked at, and what is not
fused runs by the attention kernel.

A sequence without a single token tells transformers' own implementations apart: sdpa gives its positions a context of
zeros, eager the mean of all values. So what was eager becomes "bertkern_eager", whose plain path is eager's formula.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, eager_mask, sdpa_mask

from ..nn.head_masks import HeadFactors, factors_of, scaled, scaled_weights
from . import _capture, _packed_attention

# Ours, by the implementation that it stands in for.
NAMES = {"sdpa": "bertkern", "eager": "bertkern_eager"}


def padding_mask(otherwise: Callable[..., Tensor | None], *args: Any, **kwargs: Any) -> Tensor | None:
    """A bidirectional padding mask as it came, [B, L] bool; every other mask as transformers' own function makes it.

    The same function serves causal masks, whose causality a [B, L] mask would lose, and masks that are longer or
    shorter than the sequences.
    """
    mask = kwargs.get("attention_mask")
    padding_only = kwargs.get("mask_function") is bidirectional_mask_function and not kwargs.get("use_vmap")
    if padding_only and (mask is None or mask.shape == (kwargs.get("batch_size"), kwargs.get("q_length"))):
        return mask
    return otherwise(*args, **kwargs)


def bertkern_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of layers that do not run fused, of any model: by the kernel where it computes this, else by sdpa.

    The kernel takes self-attention on the CPU without dropout. Where weights are asked for, the eager formula runs.
    """
    if kwargs.get("output_attentions") or _capture.wants("attentions") or _capture.wants("cross_attentions"):
        attention_mask = _causal_mask(module, query, key, attention_mask, kwargs)
        return eager_attention(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    factors = factors_of(module, kwargs.pop("head_mask", None))
    if _packed_attention.takes(query, key, value, attention_mask, dropout, scaling, kwargs):
        bias, causal = kwargs.get("position_bias"), is_causal(module, query, attention_mask, kwargs)
        return _packed_attention.run(query, key, value, attention_mask, bias, factors, scaling, causal), None
    if attention_mask is not None and attention_mask.dim() == 2:
        attention_mask = attention_mask[:, None, None, :]
    context, weights = sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    return scaled(context, factors), weights


def is_causal(module: nn.Module, query: Tensor, mask: Tensor | None, options: dict[str, Any]) -> bool:
    """Whether transformers' sdpa would attend to no later tokens: a mask, where there is one, says all."""
    asked = options.get("is_causal")
    asked = getattr(module, "is_causal", True) if asked is None else asked
    # No `and` of these: while tracing it would be symbolic, which no operator takes.
    return True if asked and mask is None and query.shape[2] > 1 else False  # noqa: SIM210


def _causal_mask(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> Tensor | None:
    """The mask, or the one that stands for `is_causal`: sdpa's masks leave it out where that says the same."""
    if not is_causal(module, query, mask, options):
        return mask
    queries, keys = query.shape[2], key.shape[2]
    return torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()[None, None]


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    head_mask: Tensor | HeadFactors | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention by its formula, and its weights, both times the head's factor."""
    if key.shape[1] != query.shape[1]:  # heads that share their keys and values
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * (query.size(-1) ** -0.5 if scaling is None else scaling)
    if kwargs.get("position_bias") is not None:
        scores = scores + kwargs["position_bias"]
    if attention_mask is not None:
        scores = scores + additive(attention_mask, scores.dtype)
    weights = nn.functional.dropout(torch.softmax(scores, dim=-1), p=dropout, training=module.training)
    weights = scaled_weights(weights, factors_of(module, head_mask))
    return (weights @ value).transpose(1, 2).contiguous(), weights


def additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask to add to scores [B, heads, L, L]: 0 where a bool one attends and the lowest value elsewhere."""
    if mask is None:
        return None
    mask = mask[:, None, None, :] if mask.dim() == 2 else mask
    if mask.dtype != torch.bool:
        return mask
    return torch.where(mask, torch.zeros((), dtype=dtype, device=mask.device), torch.finfo(dtype).min)


def bertkern_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask under attn_implementation="bertkern".

    transformers takes a name that was registered for models, too, whose attention is not looked up by it, such as
    MPNet: these go on adding the mask to their scores.
    """
    module = type(kwargs.get("config")).__module__
    if not _looks_attention_up(module):
        return eager_mask(*args, **kwargs)
    mask = padding_mask(sdpa_mask, *args, **kwargs)
    # In a form that sdpa takes, too: a model may ask for the mask by another config than its layers for attention, as
    # EncoderDecoderModel does after set_attn_implementation.
    return mask[:, None, None] if mask is not None and mask.dim() == 2 else mask


@torch.compiler.assume_constant_result
def _looks_attention_up(module: str) -> bool:
    """Whether the models of a config, defined in `module`, look their attention up by its name."""
    modeling = sys.modules.get(module.replace(".configuration_", ".modeling_"))
    return module.count(".configuration_") != 1 or modeling is None or hasattr(modeling, "ALL_ATTENTION_FUNCTIONS")


AttentionInterface.register(NAMES["sdpa"], bertkern_attention)
AttentionMaskInterface.register(NAMES["sdpa"], bertkern_mask)
AttentionInterface.register(NAMES["eager"], eager_attention)
AttentionMaskInterface.register(NAMES["eager"], partial(padding_mask, eager_mask))
