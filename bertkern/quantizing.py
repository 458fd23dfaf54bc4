"""quantize_: float modules become quantized ones, after everything is checked."""

import os
import warnings
from collections.abc import Mapping
from inspect import signature
from typing import Any

from torch import nn

from . import exchange, tuning
from . import plan as layers
from .config import GroupwiseConfig, Int8Config
from .formats.groupwise import GroupwiseWeight
from .nn.int8 import finite
from .pruned import drop_dead, unmask
from .record import RECORD, Record, record_of
from .sampling import rows_seen
from .schemes import SCHEMES, scheme_under
from .surgery import unfuse
from .swap import expect_module, mark_quantized, run_by_kernels


def quantize_(
    model: nn.Module,
    config: Int8Config | GroupwiseConfig | None = None,
    *,
    weights: Mapping[str, GroupwiseWeight] | None = None,
    calibration: Any = None,
    keep_padding: bool = False,
    exact_attention: bool = False,
    plan: tuning.Plan | str | os.PathLike[str] | None = None,
    measure: bool = True,
    sample: Any = None,
    progress: bool = True,
    **options: Any,
) -> nn.Module:
    """Exchanges linear layers and embedding tables for quantized ones, in place; the rest runs by the kernels, too.

    Weights are rounded to int8 or to fewer bits; activations are rounded to int8 at run time, by each token's own range
    or by static ones, or stay float where the config says so. Layers are converted one by one, tables in blocks of
    rows, so that little memory is needed beside the model.
    Everything is checked, and all ranges are known, before the first change.

    Args:
        model: any module with linear layers; transformers models inside are found.
        config: what becomes of which layers; Int8Config() if None.
        weights: with a GroupwiseConfig: low-bit weights that were made elsewhere, by name of the linear or table, also
            of such as the config leaves; the config then tells of their activations and of all others. Dead heads and
            units stay where some are given.
        calibration: for activation "static": batches of the user's data, which the float model then runs over, or what
            `bertkern.calibrate` found on them.
        keep_padding, exact_attention, plan, measure, sample: see `accelerate`; zeros of a pruned model stay zeros and
            are skipped.
        progress: show progress bars: of a calibration over batches, and as `accelerate` does.
        options: with batches, what `bertkern.calibrate` takes: tokenizer, observer, batch_size.

    Returns:
        The model.

    Raises:
        TypeError, ValueError: what cannot be quantized or calibrated; the model is unchanged then.

    Example:
        >>> model = quantize_(nn.Sequential(nn.Linear(8, 4), nn.ReLU()), Int8Config(weight="per_tensor"))

    Source: arXiv 1910.06188 (int8), 1909.05840 (groups).
    """
    config, given = Int8Config() if config is None else config, dict(weights or {})
    expect_module("quantize_", model)
    scheme = scheme_under(config)
    if scheme is None:
        names = " or ".join(known.config.__name__ for known in SCHEMES)
        raise TypeError(f"quantize_: expected a config such as {names}. Got {type(config).__name__}.")
    static = config.activation == "static"
    if static and calibration is None:
        raise ValueError(
            'quantize_: expected calibration with activation "static": batches of your data, or what '
            "bertkern.calibrate finds on them. Got None."
        )
    if not static and calibration is not None:
        raise ValueError(f'quantize_: expected activation "static" with calibration. Got "{config.activation}".')
    if isinstance(model, nn.Linear):
        raise ValueError(
            f"quantize_: expected a module that holds linear layers. Got one: use {scheme.linear.__name__}.from_linear."
        )
    if kind := layers.quantized_as(model):
        raise ValueError(
            f"quantize_: expected a float model. Got one that is {kind} already: see restore and dequantize."
        )
    choices = layers.choose(model, config, given)
    tables = exchange.tables_of(model, scheme, config, given)
    ties = exchange.ties_of(model, scheme, config, choices, tables, given)
    chosen = {choice.name: choice.module for choice in choices if choice.action == "quantized"}
    if not chosen and not given:
        raise ValueError("quantize_: expected at least one linear layer to quantize. Got none.")
    _check_values(model, choices, tables)
    roots = layers.pretrained_roots(model)
    for pattern in config.skip:
        if not any(layers.skipped(name, (pattern,), roots) for name, _ in model.named_modules() if name):
            warnings.warn(
                f"quantize_: skip names no module of this model, and nothing is left out: {pattern!r}.", stacklevel=2
            )
    modules = {**chosen, **{name: model.get_submodule(name) for name in tables}}
    modules = {name: (module, layers.aliases(name, roots)) for name, module in modules.items() if name not in ties}
    scheme.check(config, modules, given)
    ranges = _ranges(model, config, calibration, options, progress)
    rows = {} if sample is None else rows_seen(model, sample)
    for name in chosen if static else ():
        if name not in ranges:
            raise ValueError(f"quantize_: expected calibration to hold a range of {name}. Got none.")
    kept = {choice.name: choice.reason for choice in choices if choice.action == "packed" and choice.name not in ties}
    names = list(chosen)
    # Nothing may hold a float weight any longer: each is freed as its quantized form takes its place.
    del choices, chosen, modules
    record = Record(masked=record_of(model).masked)
    unfuse(model)
    setattr(model, RECORD, record)
    unmask(model, record.masked)
    if not given and not scheme.fixes_shapes(config):
        drop_dead(model)
    exchange.exchange(model, scheme, config, names, tables, ties, ranges, given)
    run_by_kernels(model, rows, keep_padding, exact_attention, True, plan, measure, progress)
    getattr(model, RECORD).kept = kept
    mark_quantized(model, config)
    return model


def _check_values(model: nn.Module, choices: list[layers.Choice], tables: list[str]) -> None:
    """Raises ValueError where a weight has no values, or Inf or NaN among them."""
    for choice in choices:
        if choice.action == "quantized" and choice.module.weight.device.type == "meta":
            raise ValueError(f"quantize_: expected weights on a device. Got {choice.name}.weight on meta.")
    layers.check_finite(choices)
    for name in tables:
        if not finite(model.get_submodule(name).weight):
            raise ValueError(f"quantize_: expected {name}.weight to be finite. Got Inf or NaN.")


def _ranges(
    model: nn.Module,
    config: Int8Config | GroupwiseConfig,
    calibration: Any,
    options: dict[str, Any],
    progress: bool,
) -> Mapping[str, tuple[float, float]]:
    """The ranges that `calibration` is or leads to, by name."""
    from .compress import Calibration, calibrate

    known = [name for name, option in signature(calibrate).parameters.items() if option.kind is option.KEYWORD_ONLY]
    for name in sorted(set(options).difference(known)):
        raise TypeError(
            f"quantize_: expected options {', '.join(known)}, or fields of {type(config).__name__} inside it. "
            f"Got {name}."
        )
    if calibration is not None and not isinstance(calibration, Calibration):
        return calibrate(model, calibration, config, progress=progress, **options).ranges
    if options:
        raise TypeError(f"quantize_: expected {sorted(options)[0]} only with batches in calibration.")
    return {} if calibration is None else calibration.ranges
