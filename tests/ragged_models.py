"""Tiny models of every family that can lose heads, and what they are to compute without some of them."""

import copy
from collections.abc import Iterable, Mapping

from torch import nn

from bertkern.families import layers_of

from .families.zoo import FAMILIES as FAMILIES
from .families.zoo import make

HEADS, SIZE = 4, 13  # an odd head size


def model_of(family: str, head: str = "Model", **options) -> nn.Module:
    """Three layers of four heads; of ALBERT one, which runs three times."""
    return make(family + head, **{"n_heads" if family == "DistilBert" else "num_attention_heads": HEADS}, **options)


def parts_of(model: nn.Module) -> list:
    return [family.parts(layer) for _, layer, family in layers_of(model)]


def some(family: str) -> dict[int, list[int]]:
    """Heads to remove: one, most and all of a layer's."""
    return {0: [2, 0]} if family == "Albert" else {0: [1], 1: [3, 0, 2], 2: [0, 1, 2, 3]}


def zeroed(model: nn.Module, heads: Mapping[int, Iterable[int]]) -> nn.Module:
    """A copy whose heads of these numbers hand on a context of zeros; they are all there."""
    made = copy.deepcopy(model)
    for index, parts in enumerate(parts_of(made)):
        columns = [head * SIZE + i for head in heads.get(index, ()) for i in range(SIZE)]

        def zero(module, args, columns=columns):
            context = args[0].clone()
            context[..., columns] = 0
            return (context, *args[1:])

        getattr(*parts.out).register_forward_pre_hook(zero)
    return made


def kept(model: nn.Module) -> list[tuple[int, ...]]:
    """The heads that the modules and the shapes of their weights say each layer has."""
    made = []
    for parts in parts_of(model):
        attention = parts.query[0]
        numbers = tuple(getattr(attention, "kept_heads", range(HEADS)))
        width = len(numbers) * SIZE
        shapes = [tuple(getattr(*slot).weight.shape) for slot in parts.linears()[:4]]
        # Values may come from a wider state than queries and keys.
        assert shapes == [(width, HEADS * SIZE)] * 2 + [(width, model.config.hidden_size), (HEADS * SIZE, width)]
        for slot in parts.linears()[:4]:
            linear = getattr(*slot)
            assert (linear.out_features, linear.in_features) == linear.weight.shape
        if getattr(attention, "headless", False):
            assert numbers == (0,)
            for slot in parts.linears()[:4]:
                assert not getattr(*slot).weight.any()
            assert not any(getattr(*slot).bias.any() for slot in parts.linears()[:3])
            numbers = ()
        made.append(numbers)
    return made


def left(heads: Mapping[int, Iterable[int]], layers: int) -> list[tuple[int, ...]]:
    return [tuple(h for h in range(HEADS) if h not in set(heads.get(i, ()))) for i in range(layers)]
