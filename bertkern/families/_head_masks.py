"""`head_mask=` on its way through a model call: keywords of a model reach its encoder, and all of its layers alike."""

from typing import Any

from torch import nn

from ..nn.encoder import Unfit
from ..nn.head_masks import HeadFactors, checked, kept_of, layer_factors
from ._attention import NAMES


def refuse(model: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """A forward pre-hook of models whose code in transformers drops the keyword on the way to their encoder."""
    if options.get("head_mask") is not None:
        raise ValueError(
            f"head_mask: expected no such keyword for {type(model).__name__}, whose code in transformers drops it. Got "
            "one: run the model within `with bk.head_mask(model, mask):`."
        )


def for_layers(encoder: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
    """The keywords of a call of `encoder`, their `head_mask` as what the attention of its layers takes.

    A mask whose factors are all one is left out: nothing is to be done.

    Args:
        encoder: whose `layers` are of a family's class.

    Raises:
        TypeError, ValueError: a mask of another type or shape or with NaN or Inf, or attention that would not heed it.
    """
    mask = options.get("head_mask")
    if mask is None:
        return options
    try:
        parts = [layer.parts() for layer in encoder.layers()]
    except (AttributeError, Unfit) as reason:
        raise ValueError(f"head_mask: expected layers of an encoder. Got {reason}.") from None
    attentions = [part.query[0] for part in parts]
    config = attentions[0].config
    if config._attn_implementation not in NAMES.values():
        raise ValueError(
            f'head_mask: expected attn_implementation "sdpa" or "eager" before accelerate. Got '
            f"{config._attn_implementation!r}: run the model within bertkern.head_mask(model, mask)."
        )
    kept = [
        kept_of(attention, getattr(*part.query).out_features // round(part.scaling**-2))
        for attention, part in zip(attentions, parts, strict=True)
    ]
    factors = layer_factors(checked(mask, len(parts), config.num_attention_heads), kept)
    if all(factor is None for factor in factors):
        return {**options, "head_mask": None}
    return {**options, "head_mask": HeadFactors(zip(attentions, factors, strict=True))}
