"""Codes of 2 to 8 bits, a scale and a zero point a group.

A file holds, of a low-bit linear or table `<name>`, N x K with G groups (of axis "n" or "k"), little-endian:

<name>.weight_codes       uint8 [bytes]   the codes, bit by bit: see `bertkern.formats.GroupwiseWeight`
<name>.weight_scale       fp32            above 0: "n": [G]; "k": [N, G], or [1, G] where all rows share their ranges
<name>.weight_zero        fp32            of the shape of weight_scale; not there where grids are symmetric, as the
                                          config says, or "symmetric" of the module under "layers"
<name>.weight_bits        uint8 [G]       2 to 8
<name>.bias               fp32 [N]        of a linear that has one
<name>.input_scale        fp32 []         of a linear with int8 activations: 0: each token's own range; else the step
<name>.input_zero_point   int32 []        beside input_scale: 0: signed codes; else of uint8 codes. Beside a
                                          step of 0: 0, or 128 where tokens' ranges are symmetric about 0

A decoder that shares a table has no tensors of the weight. A module without weight_codes is a float one, with its own
`<name>.weight`.

In config.json, `quantization_config` holds the fields of `bertkern.GroupwiseConfig` beside "quant_method": "bertkern"
and "kind": "groupwise". These tell how the tensors are to be read:

axis, group_size, groups          how linears are cut: into runs of group_size rows ("n") or columns ("k"), of
                                  ceil(rows or columns / groups) where group_size is null
symmetric                         whether weight_zero is missing, of linears and tables
pooler, head, skip                which linears stay float, and embedding_bits, if it is null, that tables do
activation                        "float": no linear has input_scale and input_zero_point
layers                            of modules by name, the base model's prefix ("bert.") left out, what is not so:
                                  {"<name>": {"axis": "k", "group_size": 64, "symmetric": true, "activation": "float"}},
                                  axis and group_size both or neither; modules that stand there are low-bit

Tables are cut into single rows unless they stand under "layers". What the config says of bits tells how the model was
made; weight_bits counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..config import GroupwiseConfig
from ..config.groupwise import ACTIVATIONS, AXES
from ..formats.groupwise import GroupwiseWeight, expect_bits, group_count
from ..names import fits
from ..nn import GroupwiseEmbedding, GroupwiseLinear
from ..nn.int8 import input_step
from .scheme import Header, Known, Scheme, check_input, expect


class GroupwiseScheme(Scheme):
    """Q-BERT."""

    name = "low-bit"
    config = GroupwiseConfig
    linear, table = GroupwiseLinear, GroupwiseEmbedding
    tensors = ("weight_codes", "weight_scale", "weight_zero", "weight_bits", "input_scale", "input_zero_point")

    def tables(self, config: GroupwiseConfig) -> bool:
        return config.embedding_bits is not None

    def ties_heads(self, config: GroupwiseConfig) -> bool:
        return True

    def fixes_shapes(self, config: GroupwiseConfig) -> bool:
        return any(isinstance(bits, tuple) for _, bits in config.layer_bits)

    def check(
        self,
        config: GroupwiseConfig,
        modules: Known,
        given: Mapping[str, GroupwiseWeight],
    ) -> None:
        for name, weight in given.items():
            if not isinstance(weight, GroupwiseWeight):
                raise TypeError(
                    f"quantize_: expected weights of {name} to be a GroupwiseWeight. Got {type(weight).__name__}."
                )
            if name not in modules:
                raise ValueError(
                    f"quantize_: expected weights of linear layers and tables that can be quantized. Got {name!r}."
                )
            shape = list(modules[name][0].weight.shape)
            if list(weight.shape) != shape:
                raise ValueError(
                    f"quantize_: expected weights of {name} of shape [N, K] = {shape}. Got {list(weight.shape)}."
                )
            try:
                weight.check()
            except ValueError as error:
                raise ValueError(f"quantize_: weights of {name}: {error}") from None
        for name, (module, names) in modules.items():
            if name in given:
                continue
            shape, table = tuple(module.weight.shape), isinstance(module, nn.Embedding)
            bits = config.bits_of(names, table)
            if table and not isinstance(bits, int):
                raise ValueError(f"quantize_: expected one number of bits for the table {name}. Got {list(bits)}.")
            if not table:
                side = shape[0] if config.axis == "n" else shape[1]
                expect_bits(f"quantize_: {name}", bits, group_count(shape, config.axis, config.size_of(side)))
        every = [names for _, names in modules.values()]
        for pattern, _ in config.layer_bits:
            if not any(fits(pattern, names) for names in every):
                raise ValueError(
                    f"quantize_: expected layer_bits to name modules that become low-bit. Got {pattern!r}."
                )

    def make(
        self,
        module: nn.Module,
        config: GroupwiseConfig,
        names: Sequence[str],
        input_range: tuple[float, float] | None = None,
        weight: GroupwiseWeight | None = None,
    ) -> nn.Module:
        table = isinstance(module, nn.Embedding)
        bits = None if weight is not None else config.bits_of(names, table)
        if table:
            return GroupwiseEmbedding.from_embedding(module, config, bits=bits, weight=weight)
        return GroupwiseLinear.from_linear(module, config, bits=bits, input_range=input_range, weight=weight)

    def tied(
        self,
        linear: nn.Module,
        table: GroupwiseEmbedding,
        config: GroupwiseConfig,
        head: bool,
        input_range: tuple[float, float] | None,
    ) -> GroupwiseLinear:
        bias = None if linear.bias is None else linear.bias.detach().clone()
        later = table.weight_bits.device.type == "meta"
        step, zero = input_step(config, input_range, later) if head else (None, None)
        made = GroupwiseLinear.from_table(table, bias, input_scale=step, input_zero_point=zero)
        made.original = (linear,) if config.keep_original else None
        return made.train(linear.training)

    def describe(self, modules: Mapping[str, nn.Module]) -> GroupwiseConfig:
        layers = [module for module in modules.values() if isinstance(module, GroupwiseLinear) and not module.table]
        tables = [module for module in modules.values() if isinstance(module, GroupwiseEmbedding)]
        activations = [layer.activation for layer in layers]
        activation = _most(activations) if layers else "float"
        zeros = [layer.held("zero") for layer in layers]
        unsigned = any(layer.activation == "static" and int(layer.input_zero_point) for layer in layers)
        axis, size = _most([(layer.axis, layer.group_size) for layer in layers]) if layers else ("n", 1)
        return GroupwiseConfig(
            bits=_most([int(bits) for layer in layers for bits in layer.weight_bits.unique()]) if layers else 4,
            group_size=size,
            axis=axis,
            symmetric=bool(layers) and all(zero is None for zero in zeros),
            whole_zero=all(zero is None or bool((zero == zero.round()).all()) for zero in zeros),
            shared=axis == "k" and all(layer.held("scale").shape[0] == 1 for layer in layers if layer.axis == "k"),
            activation=activation,
            activation_unsigned=unsigned and activation == "static",
            embedding_bits=_most([int(table.weight_bits.max()) for table in tables]) if tables else None,
            pooler=True,
            head=True,
        )

    def stored(self, module: nn.Module) -> str:
        if module.weight_bits.device.type == "meta":
            return "low-bit"
        bits = "/".join(map(str, sorted(set(module.weight_bits.tolist()))))
        return f"int{bits} {module.axis}/{module.weight_bits.numel()}"

    def runs(self, module: nn.Module) -> str:
        about = self.stored(module)
        if isinstance(module, GroupwiseEmbedding) or module.activation == "dynamic":
            return about
        return f"{about} static" if module.activation == "static" else f"{about}, float activations"

    def values(self, module: nn.Module) -> Tensor:
        return module.dequantized_weight()

    # ------------------------------------------------------------------------------------------------------- files
    def form(self, module: nn.Module, config: GroupwiseConfig, planned: bool, tied: bool) -> dict[str, Any] | None:
        table = isinstance(module, GroupwiseEmbedding)
        activation = None if table else module.activation
        wanted = _layout(module.shape, table, config)
        expected = "float" if tied and not config.head else config.activation
        symmetric = config.symmetric if tied else module.held("zero") is None
        same = tied or ((module.axis, module.group_size) == wanted and symmetric == config.symmetric)
        if same and (planned or tied) and (table or (activation == "float") == (expected == "float")):
            return None
        made = {} if tied else {"axis": module.axis, "group_size": module.group_size}
        if symmetric != config.symmetric:
            made["symmetric"] = symmetric
        return made if table else {**made, "activation": activation}

    def check_form(self, name: str, form: Any) -> dict[str, Any]:
        known = {"axis": AXES, "activation": ACTIVATIONS, "symmetric": (True, False)}
        right = isinstance(form, Mapping) and set(form) <= {"axis", "group_size", "activation", "symmetric"}
        if right:
            size = form.get("group_size", 1)
            right = type(size) is int and size >= 1
            right = right and ("axis" in form) == ("group_size" in form)
            right = right and all(form[key] in allowed for key, allowed in known.items() if key in form)
        if not right:
            raise ValueError(
                f"GroupwiseConfig: expected axis, group_size, activation and symmetric of the layer {name}. "
                f"Got {form!r}."
            )
        return dict(form)

    def misfits(
        self,
        name: str,
        module: nn.Module,
        config: GroupwiseConfig,
        held: Mapping[str, Header],
        form: Mapping[str, Any],
        tied: bool,
    ) -> list[str]:
        problems: list[str] = []
        n, k = module.weight.shape
        table = isinstance(module, nn.Embedding)
        axis, size = _layout((n, k), table, config, form)
        groups = group_count((n, k), axis, size)
        scales = [[groups]] if axis == "n" else [[n, groups], [1, groups]]
        if not tied:
            of = "[G]" if axis == "n" else "[N, G] or [1, G]"
            codes = held.get("weight_codes", ("", []))
            shapes = [codes[1]] if len(codes[1]) == 1 else [["bytes"]]
            expect(problems, name, held, "weight_codes", "torch.uint8", shapes, "[bytes]")
            expect(problems, name, held, "weight_scale", "torch.float32", scales, of)
            expect(problems, name, held, "weight_bits", "torch.uint8", [[groups]], "[G]")
            if not form.get("symmetric", config.symmetric):
                expect(problems, name, held, "weight_zero", "torch.float32", scales, of)
            elif "weight_zero" in held:
                problems.append(f"expected no {name}.weight_zero, as its grids are symmetric. Got it.")
        if table:
            return problems
        rounds = self._rounds(config, form, tied)
        for tensor, dtype in (("input_scale", "torch.float32"), ("input_zero_point", "torch.int32")):
            if rounds:
                expect(problems, name, held, tensor, dtype, [[]], "[]")
            elif tensor in held:
                problems.append(f"expected no {name}.{tensor}, as its activations stay float. Got it.")
        if module.bias is not None:
            expect(problems, name, held, "bias", "torch.float32", [[n]], "[N]")
        return problems

    def skeleton(
        self,
        module: nn.Module,
        config: GroupwiseConfig,
        held: Mapping[str, Header],
        form: Mapping[str, Any],
        names: Sequence[str],
    ) -> nn.Module:
        shape, table = tuple(module.weight.shape), isinstance(module, nn.Embedding)
        if "weight_codes" not in held:
            raise ValueError(f"from_pretrained: expected files that hold {names[0]}.weight_codes. Got none.")

        def empty(name: str, dtype: torch.dtype) -> Tensor:
            return torch.empty(held[f"weight_{name}"][1], dtype=dtype, device="meta")

        zero = empty("zero", torch.float32) if "weight_zero" in held else None
        tensors = empty("codes", torch.uint8), empty("scale", torch.float32), zero, empty("bits", torch.uint8)
        weight = GroupwiseWeight(*tensors, shape, *_layout(shape, table, config, form))
        if table:
            return self.make(module, config, names, weight=weight)
        return self.make(module, self.local(config, form), names, weight=weight)

    def local(self, config: GroupwiseConfig, form: Mapping[str, Any]) -> GroupwiseConfig:
        # Steps come with the file.
        activation = "float" if form.get("activation", config.activation) == "float" else "dynamic"
        return replace(config, activation=activation, activation_unsigned=False)

    def check_loaded(self, name: str, module: nn.Module) -> None:
        if not module.table:
            try:
                module.groupwise_weight().check()
            except ValueError as error:
                raise ValueError(f"from_pretrained: {name}: {error}") from None
        check_input(name, module)

    def _rounds(self, config: GroupwiseConfig, form: Mapping[str, Any], tied: bool) -> bool:
        """Whether the inputs of a linear are rounded."""
        default = "float" if tied and not config.head else config.activation
        return form.get("activation", default) != "float"


def _layout(
    shape: tuple[int, int], table: bool, config: GroupwiseConfig, form: Mapping[str, Any] | None = None
) -> tuple[str, int]:
    """Axis and group size."""
    form = form or {}
    if "axis" in form:
        return form["axis"], form["group_size"]
    if table:
        return "n", 1
    return config.axis, config.size_of(shape[0] if config.axis == "n" else shape[1])


def _most(values: list[Any]) -> Any:
    """The value that occurs most."""
    return Counter(values).most_common(1)[0][0]
