"""accelerate, quantize_, restore and dequantize: leaves are exchanged and classes changed, the module tree stays."""

import os
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from . import mapped, tuning
from . import plan as layers
from .config import Int8Config
from .nn import Int8Embedding, Int8Linear, SparseLinear
from .nn.int8 import finite, input_step
from .nn.sparse import DENSE
from .ops import pack_linear, pack_qlinear
from .pruned import drop_dead, grow, unmask
from .record import RECORD, Record, record_of
from .sampling import rows_seen
from .surgery import family_tables, fuse, pack, put, unfuse


def accelerate(
    model: nn.Module,
    sample: Any = None,
    *,
    keep_padding: bool = False,
    exact_attention: bool = False,
    sparse: bool = True,
    plan: tuning.Plan | str | os.PathLike[str] | None = None,
    measure: bool = True,
) -> nn.Module:
    """Makes `model` run by bertkern's kernels, in place; its answers change by no more than float rounding.

    Linear layers, also int8 ones that are already there, run by the kernels; encoders of known families run as one
    operator. Zeros are skipped: dead heads and feed-forward units are removed, and weights with enough zeros for it run
    in the sparse form that is fastest on this machine, which `report` names. Undo with `restore`.

    Args:
        model: any module; transformers models inside are found.
        sample: an input of the size that will be usual, as a tensor, a tuple of arguments or a mapping of keywords:
            layers with zeros are timed at the rows that it brings them, instead of at 16 and 128. The model runs over
            it once.
        keep_padding: whether positions after a sequence's last token are computed too; else they come back as zeros.
        exact_attention: whether attention between bf16 (or int8) projections is computed in fp32. Else its operands and
            probabilities are rounded to bf16 where the processor has AVX-512 BF16, sums stay fp32. Between fp32
            projections it always is exact, and where a checkpoint prescribes requantized outputs.
        sparse: whether float weights may be kept as their nonzero blocks. They are parameters in training mode only
            then; False keeps every weight, so that gradients reach it in eval mode, too.
        plan: what `bertkern.plan_of` gave for this model, or the file where it was saved, instead of measuring.
        measure: whether layers with zeros are timed, once a shape and density on a machine; else a cost model decides.

    Returns:
        The model.

    Example:
        >>> model = accelerate(nn.Sequential(nn.Linear(8, 4), nn.ReLU())).eval()

    Source: the fused layer is that of arXiv 1810.04805 (post-LayerNorm).
    """
    _expect_module("accelerate", model)
    rows = {} if sample is None else rows_seen(model, sample)
    return _run_by_kernels(model, rows, keep_padding, exact_attention, sparse, plan, measure)


def _run_by_kernels(
    model: nn.Module,
    rows: Mapping[str, int],
    keep_padding: bool,
    exact_attention: bool,
    sparse: bool,
    plan: tuning.Plan | str | os.PathLike[str] | None,
    measure: bool,
) -> nn.Module:
    """`accelerate`, the sample's rows by layer known."""
    known = tuning.usable(plan)
    record = record_of(model)
    quantized = layers.int8_modules(model)
    if not quantized:
        unmask(model, record.masked)
        drop_dead(model)
    shared = _shared_weights(model)
    times = tuning.Times() if measure and known is None else None
    for choice in layers.choose(model, None):
        if choice.action == "packed":
            form = tuning.Choice(DENSE)
            if sparse:
                form = _form(choice.name, choice.module, known, times, shared, rows)
            record.forms[choice.name] = form
            pack(choice.module, form.form)
            record.left.pop(choice.name, None)
        else:
            record.left[choice.name] = choice.reason
    for name, module in quantized.items():
        # Now, because torch.compile must find the packed weights when it traces.
        if isinstance(module, Int8Linear) and module.weight_scale.device.type == "cpu":
            record.forms[name] = _form(name, module, known, times, shared, rows)
            codes = module.weight_codes
            module.take_form(record.forms[name].form)
            module.packed()
            mapped.release(codes)  # the kernels read the packed copy
    if times is not None:
        times.save()
    fuse(model, record, keep_padding, exact_attention)
    setattr(model, RECORD, record)
    if quantized:
        _mark_quantized(model, None)
    return model


def plan_of(model: nn.Module) -> tuning.Plan:
    """The forms in which the linear layers of an accelerated or quantized model run, to be saved and used again.

    Raises:
        ValueError: a model that was not accelerated.

    Example:
        >>> plan_of(accelerate(nn.Sequential(nn.Linear(8, 4)))).save("plan.json")
    """
    _expect_module("plan_of", model)
    if getattr(model, RECORD, None) is None:
        raise ValueError("plan_of: expected an accelerated model. Got one that was not: call accelerate first.")
    return tuning.Plan(dict(record_of(model).forms))


def quantize_(
    model: nn.Module,
    config: Int8Config | None = None,
    *,
    calibration: Any = None,
    keep_padding: bool = False,
    exact_attention: bool = False,
    plan: tuning.Plan | str | os.PathLike[str] | None = None,
    measure: bool = True,
    sample: Any = None,
    **options: Any,
) -> nn.Module:
    """Exchanges linear layers and embedding tables for int8 ones, in place, and makes the rest run by the kernels.

    Weights are rounded to int8; activations are rounded at run time, by each token's own range or by static ones.
    Layers are converted one by one, tables in blocks of rows, so that little memory is needed beside the model.
    Everything is checked, and all ranges are known, before the first change.

    Args:
        model: any module with linear layers; transformers models inside are found.
        config: what becomes int8.
        calibration: for activation "static": batches of the user's data, which the float model then runs over, or what
            `bertkern.calibrate` found on them.
        keep_padding, exact_attention, plan, measure, sample: see `accelerate`; zeros of a pruned model stay zeros and
            are skipped.
        options: with batches, what `bertkern.calibrate` takes: tokenizer, observer, batch_size, progress.

    Returns:
        The model.

    Raises:
        TypeError, ValueError: what cannot be quantized or calibrated; the model is unchanged then.

    Example:
        >>> model = quantize_(nn.Sequential(nn.Linear(8, 4), nn.ReLU()), Int8Config(weight="per_tensor"))

    Source: arXiv 1910.06188.
    """
    config = Int8Config() if config is None else config
    _expect_module("quantize_", model)
    if not isinstance(config, Int8Config):
        raise TypeError(f"quantize_: expected a config such as Int8Config. Got {type(config).__name__}.")
    if config.activation == "static" and calibration is None:
        raise ValueError(
            'quantize_: expected calibration with activation "static": batches of your data, or what '
            "bertkern.calibrate finds on them. Got None."
        )
    if config.activation != "static" and calibration is not None:
        raise ValueError(f'quantize_: expected activation "static" with calibration. Got "{config.activation}".')
    if isinstance(model, nn.Linear):
        raise ValueError("quantize_: expected a module that holds linear layers. Got one: use Int8Linear.from_linear.")
    if layers.int8_modules(model):
        raise ValueError("quantize_: expected a float model. Got one that is int8 already: see restore and dequantize.")
    choices = layers.choose(model, config)
    tables = _tables(model, config)
    if not any(choice.action == "int8" for choice in choices):
        raise ValueError("quantize_: expected at least one linear layer to quantize. Got none.")
    for choice in choices:
        if choice.action == "int8" and choice.module.weight.device.type == "meta":
            raise ValueError(f"quantize_: expected weights on a device. Got {choice.name}.weight on meta.")
    layers.check_finite(choices)
    for name, table in tables.items():
        if not finite(table.weight):
            raise ValueError(f"quantize_: expected {name}.weight to be finite. Got Inf or NaN.")
    ranges = _ranges(model, config, calibration, options)
    rows = {} if sample is None else rows_seen(model, sample)
    for choice in choices:
        if config.activation == "static" and choice.action == "int8" and choice.name not in ranges:
            raise ValueError(f"quantize_: expected calibration to hold a range of {choice.name}. Got none.")
    kept = {choice.name: choice.reason for choice in choices if choice.action == "packed"}
    names, table_names = [choice.name for choice in choices if choice.action == "int8"], list(tables)
    ties = _ties(model, names, table_names)
    # Nothing may hold a float weight any longer: each is freed as its int8 form takes its place.
    del choices, tables
    record = Record(masked=record_of(model).masked)
    unfuse(model)
    setattr(model, RECORD, record)
    unmask(model, record.masked)
    drop_dead(model)
    exchange(model, config, names, table_names, ties, ranges)
    _run_by_kernels(model, rows, keep_padding, exact_attention, True, plan, measure)
    getattr(model, RECORD).kept = kept
    _mark_quantized(model, config)
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undoes `accelerate` exactly, and `quantize_` if its config kept the originals; in place, returns the model.

    Raises:
        RuntimeError: int8 layers without their originals; `dequantize` gives the nearest float model.
    """
    _expect_module("restore", model)
    for name, module in layers.int8_modules(model).items():
        if module.original is None:
            raise RuntimeError(
                f"restore: expected int8 layers that keep their originals (keep_original=True). Got {name} without; "
                "dequantize gives the nearest float model."
            )
    _take_out(model, lambda module: module.original[0], exact=True)
    return model


def dequantize(model: nn.Module) -> nn.Module:
    """The nearest float model: int8 layers become nn.Linear and nn.Embedding of code * scale; in place."""
    _expect_module("dequantize", model)
    _take_out(model, lambda module: module.dequantize(), exact=False)
    return model


def exchange(
    model: nn.Module,
    config: Int8Config,
    linears: list[str],
    tables: list[str],
    ties: dict[str, str],
    ranges: Mapping[str, tuple[float, float]] | None = None,
) -> None:
    """Puts int8 modules in the place of the named ones; also on the meta device, for weights that are yet to come.

    Args:
        linears, tables: names of nn.Linear and nn.Embedding modules.
        ties: of `linears` whose weight is a table: the name of the linear -> that of the table.
        ranges: of static activations, by name of the linear; on the meta device there need be none.
    """
    ranges = ranges or {}
    for name in linears:
        if name not in ties:
            linear = model.get_submodule(name)
            put(model, name, Int8Linear.from_linear(linear, config, input_range=ranges.get(name)))
            mapped.release(linear.weight)
    for name in tables:
        table = model.get_submodule(name)
        put(model, name, Int8Embedding.from_embedding(table, config))
        mapped.release(table.weight)
    linear = table = None  # the last ones are freed, too
    for name, source in ties.items():
        linear, table = model.get_submodule(name), model.get_submodule(source)
        bias = None if linear.bias is None else linear.bias.detach().clone()
        # The codes of both are the same, row by row, so one tensor serves both.
        meta = table.weight_codes.device.type == "meta"
        step, zero_point = input_step(config, ranges.get(name), meta)
        layer = Int8Linear(
            table.weight_codes, table.weight_scale, bias, input_scale=step, input_zero_point=zero_point
        ).train(linear.training)
        layer.share(table)
        layer.original = (linear,) if config.keep_original else None
        put(model, name, layer)


def _ranges(
    model: nn.Module, config: Int8Config, calibration: Any, options: dict[str, Any]
) -> Mapping[str, tuple[float, float]]:
    """The ranges that `calibration` is or leads to, by name."""
    from .compress import Calibration, calibrate

    if calibration is not None and not isinstance(calibration, Calibration):
        return calibrate(model, calibration, config, **options).ranges
    if options:
        raise TypeError(f"quantize_: expected {sorted(options)[0]} only with batches in calibration.")
    return {} if calibration is None else calibration.ranges


def _tables(model: nn.Module, config: Int8Config) -> dict[str, nn.Embedding]:
    if not config.embeddings:
        return {}
    roots = layers.pretrained_roots(model)
    names = [name for name in family_tables(model) if not layers.skipped(name, config.skip, roots)]
    return {name: model.get_submodule(name) for name in names}


def _form(
    name: str,
    module: nn.Module,
    known: tuning.Plan | None,
    times: tuning.Times | None,
    shared: set[int],
    rows: Mapping[str, int],
) -> tuning.Choice:
    """In which form the layer `name` is to run."""
    at = (rows[name],) if rows.get(name) else tuning.ROWS
    given = None if known is None else known.layers.get(name)
    if given is None and isinstance(module, (Int8Linear, SparseLinear)) and module.form != DENSE:
        return tuning.Choice(module.form)
    weight = module.weight_codes if isinstance(module, Int8Linear) else module.weight
    if weight.device.type != "cpu" or weight.data_ptr() in shared:
        return tuning.Choice(DENSE)
    if given is not None and tuning.fits(given.form, weight):
        return given
    if isinstance(module, Int8Linear):
        codes, scale, bias = weight.detach(), module.weight_scale, module.bias
        return tuning.choose(codes, lambda: pack_qlinear(codes, scale, bias), scale, times, at)
    dense = weight.detach()
    if dense.dtype == torch.float16:
        dense = dense.float()
    return tuning.choose(dense, lambda: pack_linear(dense.contiguous(), None), None, times, at)


def _shared_weights(model: nn.Module) -> set[int]:
    """The addresses of weights that more than one module holds: such as a table's that is an LM head's, too."""
    holders = Counter(
        tensor.data_ptr()
        for module in model.modules()
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if name in ("weight", "weight_codes") and tensor is not None and tensor.device.type == "cpu"
    )
    return {address for address, count in holders.items() if count > 1}


def _take_out(model: nn.Module, original: Callable[[nn.Module], nn.Module], *, exact: bool) -> None:
    quantized, masked = layers.int8_modules(model), record_of(model).masked
    unfuse(model)
    made = {name: original(module).train(module.training) for name, module in quantized.items()}
    for name, module in made.items():
        put(model, name, module)
    for root in layers.pretrained_roots(model).values():
        grow(root)
    if exact:
        for name, module in masked.items():
            put(model, name, module.train(model.get_submodule(name).training))
    if quantized:
        _mark_float(model)


def _ties(model: nn.Module, linears: list[str], tables: list[str]) -> dict[str, str]:
    """Of `linears` whose weight is that of one of `tables`: the name of the linear -> that of the table."""
    sources = {id(model.get_submodule(name).weight): name for name in tables}
    weights = {name: id(model.get_submodule(name).weight) for name in linears}
    return {name: sources[weight] for name, weight in weights.items() if weight in sources}


def _mark_quantized(model: nn.Module, config: Int8Config | None) -> None:
    roots = layers.pretrained_roots(model)
    if roots:
        from . import hf

        for root in roots.values():
            hf.attach(root, config)


def _mark_float(model: nn.Module) -> None:
    roots = layers.pretrained_roots(model)
    if roots:
        from . import hf

        for root in roots.values():
            hf.detach(root)


def _expect_module(function: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: expected a torch.nn.Module. Got {type(model).__name__}.")
