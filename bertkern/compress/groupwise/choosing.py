"""Which matrices of a model a config makes low-bit, of how many bits and in which groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from bertkern import exchange, plan
from bertkern.config import GroupwiseConfig
from bertkern.formats.groupwise import expect_bits, group_count
from bertkern.nn.int8 import finite
from bertkern.schemes import scheme_under


@dataclass(frozen=True)
class Matrix:
    """A linear layer or a table that is to become low-bit.

    Attributes:
        bits: of all groups, or of each; of a table a number.
        group_size: neighbours in a group; of a table 1: its rows are the groups.
        rounds: whether a linear's inputs are rounded, too.
    """

    module: nn.Module
    bits: int | Sequence[int]
    group_size: int
    rounds: bool = True


@dataclass(frozen=True)
class Chosen:
    """By name, in the order of the model: linears with weights of their own, tables, and linears that have a table's.

    Attributes:
        ties: the table's name by that of the linear.
    """

    linears: dict[str, Matrix]
    tables: dict[str, Matrix]
    tied: dict[str, Matrix]
    ties: dict[str, str]


def choose(model: nn.Module, config: GroupwiseConfig, caller: str) -> Chosen:
    """What `quantize_` would make low-bit.

    Raises:
        TypeError: no model, or another config.
        ValueError: no linear layer to quantize, weights with Inf or NaN, or bits that do not fit; the text names it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: expected a torch.nn.Module. Got {type(model).__name__}.")
    if not isinstance(config, GroupwiseConfig):
        raise TypeError(f"{caller}: expected config to be a GroupwiseConfig. Got {type(config).__name__}.")
    roots, scheme = plan.pretrained_roots(model), scheme_under(config)
    choices = plan.choose(model, config)
    names = exchange.tables_of(model, scheme, config)
    ties = exchange.ties_of(model, scheme, config, choices, names)
    wanted = {choice.name: choice.module for choice in choices if choice.action == "quantized"}
    linears, tables = {}, {}
    for name, module in wanted.items():
        if name not in ties:
            side = module.weight.shape[0 if config.axis == "n" else 1]
            bits, size = config.bits_of(plan.aliases(name, roots)), config.size_of(side)
            expect_bits(f"{caller}: {name}", bits, group_count(tuple(module.weight.shape), config.axis, size))
            linears[name] = Matrix(module, bits, size)
    for name in names:
        bits = config.bits_of(plan.aliases(name, roots), table=True)
        if not isinstance(bits, int):
            raise ValueError(f"{caller}: expected one number of bits for the table {name}. Got {list(bits)}.")
        tables[name] = Matrix(model.get_submodule(name), bits, 1)
    tied = {name: Matrix(model.get_submodule(name), tables[ties[name]].bits, 1, name in wanted) for name in ties}
    if not linears:
        raise ValueError(f"{caller}: expected a float model with a linear layer to quantize. Got none.")
    for name, matrix in {**linears, **tables}.items():
        weight = matrix.module.weight
        if weight.is_meta:
            raise ValueError(f"{caller}: expected weights on a device. Got {name}.weight on meta.")
        if not finite(weight):
            raise ValueError(f"{caller}: expected {name}.weight to be finite. Got Inf or NaN.")
    return Chosen(linears, tables, tied, ties)
