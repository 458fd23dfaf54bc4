"""transformers knows bertkern's int8 and ragged models: save_pretrained, from_pretrained, Trainer, dequantize.

Importing this registers the quantizer; `import bertkern` sees to it as soon as transformers' own registry exists.
"""

import functools
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .config import Int8Config
from .ragged import RaggedConfig, checked_widths

METHOD = "bertkern"
_LINEAR = ("weight_codes", "weight_scale", "input_scale", "input_zero_point", "output_scale")
_TABLE = ("weight_codes", "weight_scale")


@register_quantization_config(METHOD)
class BertkernConfig(QuantizationConfigMixin):
    """The `quantization_config` of a config.json: the fields of an Int8Config or RaggedConfig beside `quant_method`.

    Attributes:
        config: that config.
        widths: of layers with fewer heads or units than the model's config says, as `shrink.narrow` takes them; an int8
            record has them beside the config's fields.

    Raises:
        ValueError: a version, kind, field or width that this release does not know.
    """

    def __init__(self, **fields: Any) -> None:
        fields.pop("quant_method", None)
        self.quant_method = METHOD
        self.config: Int8Config | RaggedConfig
        if fields.get("kind") == RaggedConfig.KIND:
            self.config = RaggedConfig.from_dict(fields)
            self.widths = self.config.widths
            self.__class__ = _RaggedRecord
        else:
            self.widths = checked_widths("Int8Config", fields.pop("widths", None) or {})
            self.config = Int8Config.from_dict(fields)
            self.__class__ = _Int8Record

    def to_dict(self) -> dict[str, Any]:
        widths = {"widths": self.widths} if self.widths else {}
        return {"quant_method": METHOD, **self.config.to_dict(), **widths}


class _Int8Record(BertkernConfig):
    pass


class _RaggedRecord(BertkernConfig):
    pass


# transformers takes a config beside the checkpoint's own only if their classes have the same name.
_Int8Record.__name__, _RaggedRecord.__name__ = Int8Config.__name__, RaggedConfig.__name__


@register_quantizer(METHOD)
class BertkernQuantizer(HfQuantizer):
    """Makes the skeleton, ragged or int8, before transformers loads the tensors; fuses an int8 one afterwards."""

    # Training runs the plain path on dequantized weights; without these, Trainer refuses even to evaluate.
    is_trainable = True
    is_qat_trainable = True
    is_compileable = True

    def __init__(self, quantization_config: BertkernConfig | Int8Config | RaggedConfig, **kwargs: Any) -> None:
        if isinstance(quantization_config, (Int8Config, RaggedConfig)):
            quantization_config = BertkernConfig(**quantization_config.to_dict())
        super().__init__(quantization_config, **kwargs)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> nn.Module:
        config = self.quantization_config.config
        ragged = shape_as(model, self.quantization_config)
        if self.pre_quantized and isinstance(config, Int8Config):
            self._ties = build_skeleton(model, config, checkpoint_files)
        elif ragged:
            check_shapes(model, checkpoint_files)
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        from .swap import accelerate, quantize_

        config = self.quantization_config.config
        fill_stand_ins(model)
        if isinstance(config, RaggedConfig):
            # A float model like any other, but for what its config records.
            detach(model)
            return model
        if not self.pre_quantized:
            model.is_quantized = False
            return quantize_(model, config)
        for name, source in self.__dict__.pop("_ties", {}).items():
            model.get_submodule(name).share(model.get_submodule(source))
        _check_values(model)
        accelerate(model)
        attach(model, config)
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        from .swap import dequantize

        return dequantize(model)


def attach(model: nn.Module, config: Int8Config | None = None) -> None:
    """Marks a transformers model that holds int8 modules as quantized, so that it saves and loads as such.

    Args:
        config: what it was made with; None: read from the modules. What stayed float against it goes into `skip`.
    """
    from . import heads

    widths = heads.base_widths(model)
    quantizer = BertkernQuantizer(BertkernConfig(**describe(model, config).to_dict(), widths=widths))
    for module in heads.pretrained(model):
        module.hf_quantizer = quantizer
        module.is_quantized = True
        module.quantization_method = METHOD
        module.config.quantization_config = quantizer.quantization_config
        module.config._is_quantized = True
        # transformers refuses these two on quantized models; here scales and codes stay as they are in every cast.
        module.half = functools.partial(nn.Module.half, module)
        module.float = functools.partial(nn.Module.float, module)
        module.resize_token_embeddings = refuse_resize
        _drop_ties(module)


def detach(model: nn.Module) -> None:
    """Takes the marks of `attach` away from a model that is float again."""
    from . import heads

    for module in heads.pretrained(model):
        for name in (
            "hf_quantizer",
            "is_quantized",
            "quantization_method",
            "half",
            "float",
            "resize_token_embeddings",
            "_tied_weights_keys",
        ):
            module.__dict__.pop(name, None)
        for name in ("quantization_config", "_is_quantized"):
            module.config.__dict__.pop(name, None)
        module.all_tied_weights_keys = module.get_expanded_tied_weights_keys(all_submodels=False)
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    heads.record(model)


def describe(model: nn.Module, config: Int8Config | None = None) -> Int8Config:
    """The config under which `build_skeleton` makes the int8 modules that `model` has."""
    from . import plan, swap
    from .nn import Int8Embedding, Int8Linear

    quantized = plan.int8_modules(model)
    layers = [module for module in quantized.values() if isinstance(module, Int8Linear)]
    if config is None:
        config = Int8Config(
            weight="per_tensor"
            if all(module.weight_scale.numel() == 1 for module in quantized.values())
            else "per_channel",
            activation="static" if any(float(layer.input_scale) for layer in layers) else "dynamic",
            activation_unsigned=any(float(layer.input_scale) and int(layer.input_zero_point) for layer in layers),
            embeddings=any(isinstance(module, Int8Embedding) for module in quantized.values()),
        )
    bare = replace(config, skip=(), keep_original=False)
    float_linears = [choice.name for choice in plan.choose(model, bare) if choice.action == "int8"]
    float_tables = swap.family_tables(model) if config.embeddings else []
    return replace(bare, skip=tuple(sorted({*float_linears, *float_tables})))


def shape_as(model: nn.Module, record: BertkernConfig) -> bool:
    """Gives a model without values the widths and norms that its checkpoint has: as recorded, or as transformers 4 did.

    Returns:
        Whether layers have other widths now.

    Raises:
        ValueError: widths that the model cannot have, or a record that `pruned_heads` of transformers 4 contradict.
    """
    from . import heads
    from .checkpoints import pruned_heads

    gone = pruned_heads.heads_gone("from_pretrained", model, getattr(model.config, "pruned_heads", None))
    widths, older = record.widths, heads.pruned_widths("from_pretrained", model, gone) if gone else {}
    # Of an int8 model, more heads may be gone: those that added nothing.
    if widths and older and isinstance(record.config, RaggedConfig):
        every = list(range(model.config.num_attention_heads))
        for name in sorted({*older, *widths}):
            told = [kept.get(name, {}).get("heads", every) for kept in (older, widths)]
            if told[0] != told[1]:
                raise ValueError(
                    f"from_pretrained: expected pruned_heads and quantization_config to agree on the heads of {name}. "
                    f"Got {told[0]} and {told[1]}."
                )
    heads.narrow_to(model, widths or older)
    if pruned_heads.without_norms(model.config):
        heads.remove_norms(model)
    return bool(widths or older)


def check_shapes(model: nn.Module, files: Iterable[str] | None) -> None:
    """Raises ValueError unless a checkpoint holds the tensors of a ragged float model, without values yet.

    Heads of zeros that stand in for none may be there or not: where the file has matrices without rows or columns, so
    has the model until `fill_stand_ins`.
    """
    from . import heads

    if files is None:
        return
    found = _headers(files, model)
    names = {id(module): name.removeprefix(f"{model.base_model_prefix}.") for name, module in model.named_modules()}
    for linear, shapes in heads.headless(model):
        for tensor, shape in shapes.items():
            if found.get(f"{names[id(linear)]}.{tensor}", ("", []))[1] == shape:
                linear._parameters[tensor] = nn.Parameter(torch.empty(shape, device="meta"))
    _check_body(model, found, {name for tie in model.all_tied_weights_keys.items() for name in tie})


def fill_stand_ins(model: nn.Module) -> None:
    """Makes heads of zeros of those that a checkpoint left out; raises ValueError where one holds anything else."""
    from . import heads

    names = {id(module): name for name, module in model.named_modules()}
    for linear, shapes in heads.headless(model):
        for tensor in shapes:
            tensor = tensor if tensor in linear._parameters or tensor == "bias" else "weight_codes"
            value = getattr(linear, tensor)
            if value.numel() == 0:
                whole = (linear.out_features, linear.in_features)[: value.dim()]
                setattr(linear, tensor, nn.Parameter(value.new_zeros(whole), value.requires_grad))
            elif value.device.type != "meta" and bool((value != 0).any()):
                raise ValueError(
                    f"from_pretrained: expected {names[id(linear)]}.{tensor} to be zeros, as the config records no "
                    "heads of this layer. Got others."
                )


def build_skeleton(model: nn.Module, config: Int8Config, files: Iterable[str] | None) -> dict[str, str]:
    """Puts int8 modules without values into `model`, as `config` and the checkpoint's headers say.

    Returns:
        Of linears that share a table's codes: the name of the linear -> that of the table.

    Raises:
        ValueError: tensors that are missing, superfluous or of another shape or dtype; the text names them.
    """
    from . import plan, swap

    roots = plan.pretrained_roots(model)
    linears = [choice.name for choice in plan.choose(model, config) if choice.action == "int8"]
    tables = swap.family_tables(model) if config.embeddings else []
    tables = [name for name in tables if not plan.skipped(name, config.skip, roots)]
    tied = {
        target.removesuffix(".weight"): source.removesuffix(".weight")
        for target, source in model.all_tied_weights_keys.items()
        if target.endswith(".weight") and source.removesuffix(".weight") in tables
    }
    ties = {name: source for name, source in tied.items() if name in linears}
    shared = {name for tie in model.all_tied_weights_keys.items() for name in tie}
    scales: dict[str, list[int]] = {}
    found = None if files is None else _headers(files, model)
    if found is not None:
        linears, ties, scales = _check_headers(model, linears, tables, ties, found)
    swap.exchange(model, config, linears, tables, ties)
    for name, shape in scales.items():
        module = model.get_submodule(name)
        module.weight_scale = torch.empty(shape, dtype=torch.float32, device="meta")
    if found is not None:
        _check_body(model, found, shared)
    _drop_ties(model)
    return ties


def of_body(model: nn.Module, name: str) -> bool:
    """Whether a checkpoint's tensor `name` must be one of `model`: it stands in the base model, the pooler aside.

    Heads and poolers may be there or not: they start anew, or stay unread, as in every transformers model.
    """
    first, *rest = name.removeprefix(model.base_model_prefix + ".").split(".")
    return model.base_model._modules.get(first) is not None and "pooler" not in (first, *rest)


def damage(error: Exception) -> str:
    """What is wrong with a file of tensors, in one line, from the error of whatever was reading it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # torch's first line recommends to run what the file holds.
    unsafe = [line.partition(". ")[0] for line in lines if "nsupported" in line]
    return f"truncated, damaged or holding other objects: {(unsafe or lines)[0]}"


def refuse_resize(*args: Any, **kwargs: Any) -> None:
    """What `resize_token_embeddings` of an int8 model does."""
    raise ValueError(
        "resize_token_embeddings: expected a float model. Got int8 embeddings: resize first, then quantize; "
        "bertkern.dequantize gives the nearest float model."
    )


def _drop_ties(model: nn.Module) -> None:
    """Forgets ties of parameters that int8 modules have replaced; transformers would look for them."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for attribute in ("all_tied_weights_keys", "_tied_weights_keys"):
        ties = getattr(model, attribute, None)
        if ties:
            kept = {target: source for target, source in ties.items() if {target, source} <= parameters}
            setattr(model, attribute, kept)


def _headers(files: Iterable[str], model: nn.Module) -> dict[str, tuple[str, list[int]]]:
    """Of every tensor in `files`: its name in `model`, without the prefix of the base model -> (dtype, shape)."""
    from safetensors import safe_open
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    # Some architectures keep old names in their files.
    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]

    def renamed(name: str) -> str:
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        return name.removeprefix(model.base_model_prefix + ".")

    found: dict[str, tuple[str, list[int]]] = {}
    for file in files:
        try:
            if str(file).endswith(".safetensors"):
                with safe_open(file, framework="pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118  (not a dict)
                        part = tensors.get_slice(name)
                        dtype = part.get_dtype()
                        found[renamed(name)] = (_DTYPES.get(dtype, dtype), part.get_shape())
            else:
                for name, tensor in torch.load(file, map_location="meta", weights_only=True).items():
                    found[renamed(name)] = (str(tensor.dtype), list(tensor.shape))
        # SafetensorError, UnpicklingError, RuntimeError, EOFError, ...: which one depends on where the damage lies.
        except Exception as error:
            raise ValueError(
                f"from_pretrained: expected {str(file)!r} to be a file of tensors. Got one {damage(error)}"
            ) from None
    return found


def _check_body(model: nn.Module, found: dict[str, tuple[str, list[int]]], shared: set[str]) -> None:
    """Raises ValueError unless the checkpoint holds all tensors of the base model, in their shapes, and no others.

    Args:
        model: with its int8 modules in place.
        found: see `_headers`.
        shared: names of tied parameters, of which a checkpoint holds one.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    if not all(isinstance(entry, WeightRenaming) for entry in get_model_conversion_mapping(model)):
        return  # transformers puts the tensors of this architecture together from others
    base, prefix = model.base_model, model.base_model_prefix + "."
    expected = {name.removeprefix(prefix): list(tensor.shape) for name, tensor in base.state_dict().items()}
    known = {*expected, *(name for name, _ in base.named_buffers()), *(name.removeprefix(prefix) for name in shared)}
    problems = []
    for name, shape in expected.items():
        absent = name not in found and not {name, prefix + name} & shared
        if of_body(model, name) and (absent or found.get(name, ("", shape))[1] != shape):
            problems.append(f"expected {name} of shape {shape}. Got {'none' if absent else found[name][1]}.")
    problems += [f"expected no {name}. Got it." for name in found if of_body(model, name) and name not in known]
    _complain(problems)


def _complain(problems: list[str]) -> None:
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise ValueError("from_pretrained: the checkpoint does not fit: " + " ".join(problems[:5]) + more)


_DTYPES = {
    "I8": "torch.int8",
    "F32": "torch.float32",
    "I32": "torch.int32",
    "BF16": "torch.bfloat16",
    "F16": "torch.float16",
}


def _check_headers(
    model: nn.Module,
    linears: list[str],
    tables: list[str],
    ties: dict[str, str],
    found: dict[str, tuple[str, list[int]]],
) -> tuple[list[str], dict[str, str], dict[str, list[int]]]:
    """What of the planned modules the checkpoint holds: linears, ties, and the shapes of scales."""
    from . import plan

    base = model.base_model_prefix + "."
    roots = plan.pretrained_roots(model)
    problems: list[str] = []
    kept, scales, ties = [], {}, dict(ties)

    def key(name: str, tensor: str) -> str:
        return f"{name}.{tensor}".removeprefix(base)

    def expect(name: str, tensor: str, dtype: str, shapes: list[list[int]], of: str) -> None:
        got = found.get(key(name, tensor))
        if got is None:
            problems.append(f"expected {name}.{tensor}. Got none.")
        elif got[0] != dtype or got[1] not in shapes:
            problems.append(
                f"expected {name}.{tensor} {dtype} of shape {of} = {shapes[0]}. Got {got[0]} of shape {got[1]}."
            )

    for name in [*linears, *tables]:
        module = model.get_submodule(name)
        absent = not any(key(name, tensor) in found for tensor in (*_LINEAR, "weight"))
        # A head or pooler that the saved model did not have starts anew, as in every transformers model.
        if absent and plan.role(name, roots) != "body":
            ties.pop(name, None)
            continue
        rows, columns = module.weight.shape
        if name not in ties or key(name, "weight_codes") in found:
            ties.pop(name, None)
            expect(name, "weight_codes", "torch.int8", [[rows, columns]], "[N, K]")
            expect(name, "weight_scale", "torch.float32", [[rows], [1]], "[N]")
        if name in linears:
            kept.append(name)
            for tensor, dtype in zip(_LINEAR[2:], ("torch.float32", "torch.int32", "torch.float32"), strict=False):
                expect(name, tensor, dtype, [[]], "[]")
            if module.bias is not None:
                expect(name, "bias", "torch.float32", [[rows]], "[N]")
        if key(name, "weight_scale") in found:
            scales[name] = found[key(name, "weight_scale")][1]
    planned = {key(name, "weight_codes") for name in (*kept, *tables)}
    here = {key(name, "weight_codes") for name, module in model.named_modules() if hasattr(module, "weight")}
    problems += [f"expected no {name}. Got it." for name in sorted(found) if name in here and name not in planned]
    _complain(problems)
    return kept, ties, scales


def _check_values(model: nn.Module) -> None:
    from . import plan

    for name, module in plan.int8_modules(model).items():
        if module.weight_codes.numel() and int(module.weight_codes.min()) < -127:
            raise ValueError(f"from_pretrained: expected {name}.weight_codes in [-127, 127]. Got -128.")
        for tensor in ("weight_scale", "input_scale", "output_scale"):
            values = getattr(module, tensor, None)
            if values is not None and not bool((torch.isfinite(values) & (values >= 0)).all()):
                raise ValueError(f"from_pretrained: expected {name}.{tensor} finite and at least 0. Got others.")
