"""int8 codes, a scale for each row or for all.

A file holds, of an int8 linear or table `<name>`, N x K:

<name>.weight_codes       int8 [N, K]              in [-127, 127]
<name>.weight_scale       fp32 [N] or [1]
<name>.bias               fp32 [N]                 of a linear that has one
<name>.input_scale        fp32 []                  of a linear; see `Int8Linear`
<name>.input_zero_point   int32 []
<name>.output_scale       fp32 []

Of a linear with so many zeros that blocks br x bc of codes take less room, there are, in the place of weight_codes, the
tensors of `bertkern.formats.BsrWeight`:

<name>.crow               int32 [ceil(N / br) + 1]
<name>.col                int32 [blocks]
<name>.values             int8 [blocks, br, bc]

and in config.json, in `quantization_config` under "layers": {"<name>": {"block": [br, bc]}}. Which block that is
depends on the zeros alone; in which form the kernels take them is found anew where the file is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Int8Config
from ..formats.bsr import BsrWeight
from ..nn import Int8Embedding, Int8Linear
from ..nn.int8 import input_step
from .scheme import Header, Scheme, check_input, expect


class Int8Scheme(Scheme):
    """W8A8."""

    name = "int8"
    config = Int8Config
    linear, table = Int8Linear, Int8Embedding
    tensors = ("weight_codes", "weight_scale", "input_scale", "input_zero_point", "output_scale", *BsrWeight.TENSORS)

    def tables(self, config: Int8Config) -> bool:
        return config.embeddings

    def make(
        self,
        module: nn.Module,
        config: Int8Config,
        names: Sequence[str],
        input_range: tuple[float, float] | None = None,
        weight: Any = None,
    ) -> nn.Module:
        if isinstance(module, nn.Embedding):
            return Int8Embedding.from_embedding(module, config)
        return Int8Linear.from_linear(module, config, input_range=input_range)

    def tied(
        self,
        linear: nn.Module,
        table: Int8Embedding,
        config: Int8Config,
        head: bool,
        input_range: tuple[float, float] | None,
    ) -> Int8Linear:
        bias = None if linear.bias is None else linear.bias.detach().clone()
        step, zero = input_step(config, input_range, table.weight_codes.device.type == "meta")
        made = Int8Linear(table.weight_codes, table.weight_scale, bias, input_scale=step, input_zero_point=zero)
        # The codes of both are the same, row by row, so one tensor serves both.
        made.share(table)
        made.original = (linear,) if config.keep_original else None
        return made.train(linear.training)

    def describe(self, modules: Mapping[str, nn.Module]) -> Int8Config:
        layers = [module for module in modules.values() if isinstance(module, Int8Linear)]
        one_scale = all(module.weight_scale.numel() == 1 for module in modules.values())
        return Int8Config(
            weight="per_tensor" if one_scale else "per_channel",
            activation="static" if any(float(layer.input_scale) for layer in layers) else "dynamic",
            activation_unsigned=any(float(layer.input_scale) and int(layer.input_zero_point) for layer in layers),
            embeddings=any(isinstance(module, Int8Embedding) for module in modules.values()),
        )

    def stored(self, module: nn.Module) -> str:
        return "int8"

    def runs(self, module: nn.Module) -> str:
        if isinstance(module, Int8Embedding):
            return "int8"
        static = " static" if float(module.input_scale) else ""
        return f"int8{static}" + ("" if module.form.layout == "dense" else f", {module.form}")

    def values(self, module: nn.Module) -> Tensor:
        return module.weight_codes

    def blocks(self, module: nn.Module) -> BsrWeight | None:
        # Those of a table's are in the file once, as the table's.
        shared = "weight_codes" in module._non_persistent_buffers_set
        return BsrWeight.smallest(module.weight_codes) if isinstance(module, Int8Linear) and not shared else None

    def check_form(self, name: str, form: Any) -> dict[str, Any]:
        block = form.get("block") if isinstance(form, Mapping) and set(form) == {"block"} else None
        right = isinstance(block, (list, tuple)) and len(block) == 2 and all(type(side) is int for side in block)
        if not right or min(block) < 1:
            raise ValueError(f"Int8Config: expected the block of {name}, such as [16, 4]. Got {form!r}.")
        return {"block": list(block)}

    def misfits(
        self,
        name: str,
        module: nn.Module,
        config: Int8Config,
        held: Mapping[str, Header],
        form: Mapping[str, Any],
        tied: bool,
    ) -> list[str]:
        problems: list[str] = []
        rows, columns = module.weight.shape
        if not tied:
            if _in_blocks(form, held):
                br, bc = form["block"]
                blocks = _blocks_in(held)
                expect(problems, name, held, "crow", "torch.int32", [[-(-rows // br) + 1]], "[ceil(N / br) + 1]")
                expect(problems, name, held, "col", "torch.int32", [[blocks]], "[blocks]")
                expect(problems, name, held, "values", "torch.int8", [[blocks, br, bc]], "[blocks, br, bc]")
            else:
                expect(problems, name, held, "weight_codes", "torch.int8", [[rows, columns]], "[N, K]")
            expect(problems, name, held, "weight_scale", "torch.float32", [[rows], [1]], "[N]")
        if isinstance(module, nn.Linear):
            for tensor, dtype in zip(self.tensors[2:5], ("torch.float32", "torch.int32", "torch.float32"), strict=True):
                expect(problems, name, held, tensor, dtype, [[]], "[]")
            if module.bias is not None:
                expect(problems, name, held, "bias", "torch.float32", [[rows]], "[N]")
        return problems

    def skeleton(
        self,
        module: nn.Module,
        config: Int8Config,
        held: Mapping[str, Header],
        form: Mapping[str, Any],
        names: Sequence[str],
    ) -> nn.Module:
        made = self.make(module, config, names)
        if "weight_scale" in held:
            made.weight_scale = torch.empty(held["weight_scale"][1], dtype=torch.float32, device="meta")
        if _in_blocks(form, held):
            made.await_blocks(_blocks_in(held), tuple(form["block"]))
        return made

    def tie_loaded(self, linear: Int8Linear, table: Int8Embedding) -> None:
        linear.share(table)

    def take_blocks(self, name: str, module: nn.Module) -> None:
        if isinstance(module, Int8Linear):
            try:
                module.take_blocks()
            except ValueError as error:
                raise ValueError(f"from_pretrained: {name}: {error}") from None

    def check_loaded(self, name: str, module: nn.Module) -> None:
        if module.weight_codes.numel() and int(module.weight_codes.min()) < -127:
            raise ValueError(f"from_pretrained: expected {name}.weight_codes in [-127, 127]. Got -128.")
        check_input(name, module)
        for tensor in ("weight_scale", "output_scale"):
            values = getattr(module, tensor, None)
            if values is not None and not bool((torch.isfinite(values) & (values >= 0)).all()):
                raise ValueError(f"from_pretrained: expected {name}.{tensor} finite and at least 0. Got others.")


def _in_blocks(form: Mapping[str, Any], held: Mapping[str, Header]) -> bool:
    """Whether a file holds blocks; a state dict saved beside the record of such a file has dense codes all the same."""
    return "block" in form and "weight_codes" not in held


def _blocks_in(held: Mapping[str, Header]) -> int:
    """How many blocks a file holds of a module, by the shape of `values`."""
    shape = held["values"][1] if "values" in held else []
    return shape[0] if len(shape) == 3 else 0
