"""Head masks as transformers 4 had them: the factor that each attention head's output is multiplied by.

transformers 4 multiplied the attention probabilities, after dropout. The product with the values is linear, so the same
factor on the head's context gives the same, and needs no probabilities.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class HeadFactors(dict[nn.Module, Tensor | None]):
    """What a `head_mask` comes to on its way through an encoder's keywords: the factors by attention module.

    Of shape [1 or B, kept heads]; None where all are one.
    """


def checked(mask: Tensor, layers: int, heads: int) -> Tensor:
    """`mask` as [layers, 1 or B, heads] in the numbering of the model as it was built, with its gradient.

    A copy: what is written into `mask` later does not count.

    Args:
        mask: [heads], [layers, heads] or [layers, B, heads], bool, int or float; 1 keeps a head, 0 leaves it out.

    Raises:
        TypeError, ValueError: another type or shape, or a factor that is NaN or Inf.
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"head_mask: expected a tensor. Got {type(mask).__name__}.")
    shape = list(mask.shape)
    fits = shape == [heads] or (len(shape) in (2, 3) and shape[0] == layers and shape[-1] == heads)
    if not fits:
        raise ValueError(
            f"head_mask: expected a mask of shape [heads] = [{heads}], [layers, heads] = [{layers}, {heads}] or "
            f"[layers, batch, heads] = [{layers}, batch, {heads}]. Got {shape}."
        )
    if mask.is_complex():
        raise TypeError(f"head_mask: expected bool, int or float. Got {str(mask.dtype).removeprefix('torch.')}.")
    # Looking at what is on a GPU would wait for it.
    looked_at = mask.device.type == "cpu" and not torch.compiler.is_compiling()
    if looked_at and not bool(torch.isfinite(mask.detach()).all()):
        raise ValueError("head_mask: expected finite factors. Got NaN or Inf.")
    mask = mask.clone()
    if mask.dim() == 1:
        return mask.expand(layers, 1, heads)
    return mask[:, None] if mask.dim() == 2 else mask


def kept_of(attention: nn.Module, heads: int) -> tuple[int, ...]:
    """The numbers of the heads that an attention module still has, by what was recorded when it lost others.

    Args:
        heads: how many it has.

    Raises:
        ValueError: a record of another number of heads.
    """
    # In a layer without heads one of zeros stands in.
    if getattr(attention, "headless", False):
        return ()
    kept = getattr(attention, "kept_heads", None)
    if kept and len(kept) != heads:
        raise ValueError(
            f"kept_heads: expected the numbers of the {heads} heads that the projections have. Got {list(kept)}."
        )
    return tuple(range(heads)) if kept is None else tuple(kept)


def layer_factors(mask: Tensor, kept: Sequence[Sequence[int]]) -> list[Tensor | None]:
    """For each layer the factors of the heads that it still has, [1 or B, kept heads]; None where all are one, or none
    is left. Of a mask for a batch, one layer at least has factors.

    A mask with a gradient, or on a GPU, gives factors everywhere, be they one. Made without operations that keep
    tensors, so one call serves any number of backward passes.

    Args:
        mask: [layers, 1 or B, heads], as of `checked`.
        kept: the numbers of each layer's heads.
    """
    traced = torch.compiler.is_compiling() or (torch.is_grad_enabled() and mask.requires_grad)
    traced = traced or mask.device.type != "cpu"
    made: list[Tensor | None] = []
    for row, heads in zip(mask.unbind(0), kept, strict=True):
        if list(heads) != list(range(mask.shape[-1])):
            row = torch.stack([row[:, head] for head in heads], 1) if heads else None
        made.append(row)
    if traced:
        return made
    plain = [None if row is None or bool((row == 1).all()) else row for row in made]
    if mask.shape[1] != 1 and all(row is None for row in plain):
        # Ones of each sequence fit one size of a batch alone: a layer keeps them, for the call to compare.
        first = next((i for i, row in enumerate(made) if row is not None), None)
        plain = [made[i] if i == first else None for i in range(len(made))]
    return plain


def multiplied(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The product of a layer's factors; None: all one."""
    if one is None or other is None:
        return other if one is None else one
    return one * other


def joined(factors: Sequence[Tensor | None], heads: Sequence[int], batch: int, device: torch.device) -> Tensor | None:
    """The factors of all layers side by side, fp32 [1 or B, heads of all layers], for the encoder operator.

    Args:
        factors: of each layer, [1 or B, its heads]; None: all one.
        heads: how many each layer computes; one without heads computes one of zeros.
        batch: how many sequences there are.
        device: of the operator.

    Returns:
        None where nothing is to be done.

    Raises:
        ValueError: factors for another batch.
    """
    if all(factor is None for factor in factors):
        return None
    given = [factor for factor in factors if factor is not None]
    rows = 1 if all(factor.shape[0] == 1 for factor in given) else batch
    made = []
    for factor, count in zip(factors, heads, strict=True):
        if factor is None:
            made.append(torch.ones((), device=device).expand(rows, count))
        else:
            check_batch(factor, batch)
            made.append(factor.to(device, torch.float32).expand(rows, count))
    return torch.cat(made, 1)


def factors_of(attention: nn.Module, mask: Tensor | HeadFactors | None) -> Tensor | None:
    """The factors of one attention module, [1 or B, kept heads], by the `head_mask` that reached it; None: all one.

    An encoder of known layers hands on HeadFactors; else a module that knows the number of its layer finds its row.

    Raises:
        ValueError: a mask, and a module that does not know its layer.
    """
    if mask is None or isinstance(mask, HeadFactors):
        return None if mask is None else mask.get(attention)
    row, config = getattr(attention, "layer_idx", None), getattr(attention, "config", None)
    if row is None or config is None:
        raise ValueError(
            f"head_mask: expected a module that knows the number of its layer. Got {type(attention).__name__}: "
            "run the model within bertkern.head_mask(model, mask)."
        )
    mask = checked(mask, config.num_hidden_layers, config.num_attention_heads)
    heads = attention.query.out_features // attention.attention_head_size
    return layer_factors(mask[row : row + 1], [kept_of(attention, heads)])[0]


def scaled(context: Tensor, factor: Tensor | None) -> Tensor:
    """`context` [B, L, heads, d] with every head times its factor [1 or B, heads]."""
    return context if factor is None else context * _fitting(factor, context)[:, None, :, None]


def scaled_weights(weights: Tensor, factor: Tensor | None) -> Tensor:
    """Attention probabilities [B, heads, L, L] times the head's factor [1 or B, heads]."""
    return weights if factor is None else weights * _fitting(factor, weights)[:, :, None, None]


def check_batch(factor: Tensor, batch: int) -> None:
    """Raises ValueError where a layer's factors [1 or B, heads] are for a batch of another size."""
    # No `in`: while tracing, it does not see that symbols are equal.
    if factor.shape[0] != 1 and factor.shape[0] != batch:
        raise ValueError(
            f"head_mask: expected a mask of [layers, batch, heads] for a batch of {batch} sequences. "
            f"Got one for {factor.shape[0]}."
        )


def _fitting(factor: Tensor, x: Tensor) -> Tensor:
    check_batch(factor, x.shape[0])
    return factor.to(x.device, x.dtype)
