"""Hidden states of real tokens alone, one sentence after another: no padding to write, to skip or to pool over."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import plan
from .nn.packed_output import wished


@dataclass(frozen=True)
class PackedStates:
    """The hidden states of a batch without its padding.

    Attributes:
        hidden: [tokens, H], the real tokens of the first sequence, then of the second, and so on.
        cu_seqlens: int32 [B + 1], where each sequence begins: 0, ..., tokens. As `bertkern.ops.attention` and flash
            attention take it.
        indices: int64 [tokens], where each token stood in the batch, counted through its B * L positions.
        shape: (B, L) of the batch.
    """

    hidden: Tensor
    cu_seqlens: Tensor
    indices: Tensor
    shape: tuple[int, int]

    @property
    def lengths(self) -> Tensor:
        """int32 [B]: how many real tokens each sequence has."""
        return self.cu_seqlens.diff()

    def unpack(self, values: Tensor | None = None, fill: float = 0.0) -> Tensor:
        """`values` [tokens, ...] at their places in the batch, [B, L, ...], and `fill` in all others.

        Args:
            values: of each token; None: the hidden states.
        """
        values = self._checked(values)
        batch, length = self.shape
        padded = values.new_full((batch * length, *values.shape[1:]), fill)
        return padded.index_copy(0, self.indices, values).view(batch, length, *values.shape[1:])

    def split(self, values: Tensor | None = None) -> tuple[Tensor, ...]:
        """`values` [tokens, ...] of each sequence by itself: B views of [its tokens, ...].

        Args:
            values: of each token; None: the hidden states.
        """
        return self._checked(values).split(self.lengths.tolist())

    def mean(self) -> Tensor:
        """The mean hidden state of each sequence, [B, H]; zeros for one without tokens.

        Sums are fp32 at least; one sequence's bits depend on no other.
        """
        rows = self.hidden.to(torch.promote_types(self.hidden.dtype, torch.float32))
        total = rows.new_zeros(self.shape[0], rows.shape[1]).index_add(0, self._sequences(), rows)
        return (total / self.lengths.clamp(min=1)[:, None]).to(self.hidden.dtype)

    def max(self) -> Tensor:
        """The largest value of each feature in each sequence, [B, H]; zeros for one without tokens."""
        rows = self._sequences()[:, None].expand_as(self.hidden)
        zeros = self.hidden.new_zeros(self.shape[0], self.hidden.shape[1])
        return zeros.scatter_reduce(0, rows, self.hidden, "amax", include_self=False)

    def first(self) -> Tensor:
        """The hidden state of each sequence's first real token, [CLS] mostly: [B, H]; zeros for one without tokens."""
        if not self.hidden.shape[0]:
            return self.hidden.new_zeros(self.shape[0], self.hidden.shape[1])
        starts, empty = self.cu_seqlens[:-1], (self.lengths == 0)[:, None]
        return self.hidden[starts.clamp(max=self.hidden.shape[0] - 1)].masked_fill(empty, 0)

    def _sequences(self) -> Tensor:
        """int64 [tokens]: the sequence of each token."""
        return self.indices.div(max(self.shape[1], 1), rounding_mode="floor")

    def _checked(self, values: Tensor | None) -> Tensor:
        if values is None:
            return self.hidden
        if not isinstance(values, Tensor) or values.dim() < 1 or values.shape[0] != len(self.indices):
            got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(
                f"PackedStates: expected values of shape [tokens, ...] = [{len(self.indices)}, ...]. Got {got}."
            )
        return values


def encode_packed(model: nn.Module, input_ids: Tensor | None = None, **inputs: Any) -> PackedStates:
    """The last hidden states of `model`'s encoder, real tokens alone.

    Only these are computed, and they have the bits that they have in the padded output. Heads that work token by token,
    such as a classifier or a language model's, then work on real tokens alone, too. Gradients are followed.

    Models that are not fused, and calls that take the plain path, give the same, by leaving the padding out at the end.

    Args:
        model: a transformers model, or a module with one inside; its heads and its pooler do not count.
        input_ids: [B, L]; or `inputs_embeds` [B, L, ...].
        inputs: further arguments of the model, as a tokenizer gives them; `attention_mask` [B, L] of any dtype says
            where real tokens are: padding behind, before or between them. Without it, all are real.

    Returns:
        PackedStates.

    Raises:
        TypeError, ValueError: no such model, ids or a mask of another shape, or a wish for further outputs.

    Example::

        batch = tokenizer(sentences, padding=True, return_tensors="pt")
        states = bk.encode_packed(model, **batch)
        embeddings = states.mean()  # [B, H], as sentence-transformers pools

        states = bk.encode_packed(tagger, **batch)  # a BertForTokenClassification
        labels = [row.argmax(-1) for row in states.split(tagger.classifier(states.hidden))]
    """
    base = _base(model)
    given = input_ids if input_ids is not None else inputs.get("inputs_embeds")
    if not isinstance(given, Tensor):
        raise TypeError(f"encode_packed: expected input_ids or inputs_embeds as a tensor. Got {type(given).__name__}.")
    if given.dim() != (2 if input_ids is not None else 3):
        raise ValueError(
            "encode_packed: expected input_ids of shape [B, L] or inputs_embeds of shape [B, L, H]. "
            f"Got {list(given.shape)}."
        )
    for name in ("output_hidden_states", "output_attentions", "return_dict"):
        if name in inputs:
            raise ValueError(f"encode_packed: expected no {name}: the last hidden states are all that it gives.")
    shape = (given.shape[0], given.shape[1])
    mask = inputs.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != shape):
        got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"encode_packed: expected attention_mask of shape [B, L] = {list(shape)}. Got {got}.")

    if input_ids is not None:
        inputs["input_ids"] = input_ids
    with wished(_granting(base)) as wish:
        output = base(**inputs, output_hidden_states=False, output_attentions=False, return_dict=True)
    real = torch.ones(shape, dtype=torch.bool, device=given.device) if mask is None else mask != 0
    indices = real.flatten().nonzero().flatten()
    cu_seqlens = torch.zeros(shape[0] + 1, dtype=torch.int32, device=real.device)
    cu_seqlens[1:] = real.sum(1).cumsum(0)
    hidden = wish.hidden
    if hidden is None:
        padded = output.last_hidden_state
        if padded.shape[:2] != shape:
            raise ValueError(
                f"encode_packed: expected a model with a hidden state for each of {list(shape)} positions. "
                f"Got {list(padded.shape)}."
            )
        hidden = padded.flatten(0, 1).index_select(0, indices)
    return PackedStates(hidden, cu_seqlens, indices, shape)


def _base(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"encode_packed: expected a torch.nn.Module. Got {type(model).__name__}.")
    roots = list(plan.pretrained_roots(model).values())
    if len(roots) != 1:
        raise ValueError(f"encode_packed: expected a module with one transformers model. Got one with {len(roots)}.")
    return roots[0].base_model


def _granting(base: nn.Module) -> nn.Module | None:
    """The encoder that may leave the padding out: nobody but it looks at hidden states meanwhile."""
    from .families._fused import FusedEncoder

    children = list(base.children())
    encoder = next((child for child in children if isinstance(child, FusedEncoder)), None)
    others = [base, *(module for child in children if child is not encoder for module in child.modules())]
    if encoder is None or encoder._forward_hooks or any(m._forward_hooks or m._forward_pre_hooks for m in others):
        return None
    return encoder
