"""accelerate, restore and dequantize: leaves are exchanged and classes changed, the module tree stays."""

import os
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from . import gpu, gpu_tuning, mapped, tuning
from . import plan as layers
from .nn import GroupwiseLinear, Int8Linear, SparseLinear
from .nn.linear import FLOATS
from .nn.packing import PackedCache
from .nn.sparse import DENSE
from .ops import pack_linear, pack_qlinear
from .progress import LateBar
from .pruned import drop_dead, grow, unmask
from .record import RECORD, record_of
from .sampling import rows_seen
from .surgery import fuse, pack, put, unfuse


def accelerate(
    model: nn.Module,
    sample: Any = None,
    *,
    keep_padding: bool = False,
    exact_attention: bool = False,
    sparse: bool = True,
    plan: tuning.Plan | str | os.PathLike[str] | None = None,
    measure: bool = True,
    progress: bool = True,
) -> nn.Module:
    """Makes `model` run by bertkern's kernels, in place; its answers change by no more than float rounding.

    Linear layers, also quantized ones that are already there, run by the kernels; encoders of known families run as one
    operator. Zeros are skipped: dead heads and feed-forward units are removed, and weights with enough zeros for it run
    in the sparse form that is fastest on this machine, which `report` names. Undo with `restore`.

    The state dict, and so what `save_pretrained` writes, stays that of the whole dense model; `bertkern.save_blocks`
    writes its nonzero blocks instead.

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
        plan: what `bertkern.plan_of` gave for this model, or the file where it was saved: layers that it tells of are
            not timed.
        measure: whether layers with zeros are timed, once a shape and density on a machine; else a cost model decides.
        progress: show a progress bar where that takes more than a few seconds.

    Returns:
        The model.

    Example:
        >>> model = accelerate(nn.Sequential(nn.Linear(8, 4), nn.ReLU())).eval()

    Source: the fused layer is that of arXiv 1810.04805 (post-LayerNorm).
    """
    expect_module("accelerate", model)
    try:
        layers.scheme_in(model)
    except ValueError as error:
        raise ValueError(f"accelerate: {error}") from None
    rows = {} if sample is None else rows_seen(model, sample)
    return run_by_kernels(model, rows, keep_padding, exact_attention, sparse, plan, measure, progress)


def run_by_kernels(
    model: nn.Module,
    rows: Mapping[str, int],
    keep_padding: bool,
    exact_attention: bool,
    sparse: bool,
    plan: tuning.Plan | str | os.PathLike[str] | None,
    measure: bool,
    progress: bool,
) -> nn.Module:
    """`accelerate`, the sample's rows by layer known."""
    known = tuning.usable(plan)
    record = record_of(model)
    quantized = layers.quantized_modules(model)
    if not quantized:
        unmask(model, record.masked)
        drop_dead(model)
    shared = _shared_weights(model)
    choices = layers.choose(model, None)
    known = tuning.naming(known, [*(choice.name for choice in choices), *quantized])
    anew: list[str] = []

    def form_of(name: str, module: nn.Module) -> tuning.Form:
        record.forms[name] = _form(name, module, known, times, shared, rows, anew)
        return record.forms[name].form

    # Of layers that a plan does not tell of, too.
    with (
        LateBar("measure kernels", "layer", progress) as bar,
        tuning.Times(bar=bar) if measure else nullcontext() as times,
    ):
        bar.expect(len(choices) + len(quantized))
        for choice in choices:
            if choice.action == "packed":
                record.forms[choice.name] = tuning.Choice(DENSE)
                pack(choice.module, form_of(choice.name, choice.module) if sparse else DENSE)
                record.left.pop(choice.name, None)
            else:
                record.left[choice.name] = choice.reason
            bar.step()
        for name, module in quantized.items():
            _pack_quantized(name, module, form_of)
            bar.step()
        if times is not None:
            _choose_providers(model, times, bar, exact_attention)
    tuning.tell_others(anew)
    fuse(model, record, keep_padding, exact_attention)
    setattr(model, RECORD, record)
    mapped.trim()
    if quantized:
        mark_quantized(model, None)
    # Float weights, norms, and what stands between the codes of a file: the kernels have copies of it all.
    mapped.release(*model.parameters(), *model.buffers())
    return model


def _pack_quantized(name: str, module: nn.Module, form_of: Callable[[str, nn.Module], tuning.Form]) -> None:
    """Packs a quantized module's codes, of an Int8Linear in the form of `form_of`.

    Now, because torch.compile must find the packed weights when it traces.
    """
    if isinstance(module, PackedCache) and gpu.runs_on(module.weight_scale.device):
        if isinstance(module, (Int8Linear, GroupwiseLinear)) and module.packable():
            if isinstance(module, Int8Linear):
                module.take_form(form_of(name, module))
            module.operand()
        return
    if not isinstance(module, PackedCache) or module.weight_scale.device.type != "cpu" or not module.packable():
        return
    codes = module.weight_codes
    if isinstance(module, Int8Linear):
        module.take_form(form_of(name, module))
    module.packed()
    # The kernels read the packed copy. Now, because the module may have let go of its codes.
    mapped.release(codes)
    codes = None
    mapped.trim()


def plan_of(model: nn.Module) -> tuning.Plan:
    """The forms in which the linear layers of an accelerated or quantized model run, to be saved and used again.

    Raises:
        ValueError: a model that was not accelerated.

    Example:
        >>> plan_of(accelerate(nn.Sequential(nn.Linear(8, 4)))).save("plan.json")
    """
    expect_module("plan_of", model)
    if getattr(model, RECORD, None) is None:
        raise ValueError("plan_of: expected an accelerated model. Got one that was not: call accelerate first.")
    return tuning.Plan(dict(record_of(model).forms))


def restore(model: nn.Module) -> nn.Module:
    """Undoes `accelerate` exactly, and `quantize_` if its config kept the originals; in place, returns the model.

    Raises:
        RuntimeError: quantized layers without their originals; `dequantize` gives the nearest float model.
    """
    expect_module("restore", model)
    for name, module in layers.quantized_modules(model).items():
        if module.original is None:
            raise RuntimeError(
                f"restore: expected quantized layers that keep their originals (keep_original=True). Got {name} "
                "without; dequantize gives the nearest float model."
            )
    _take_out(model, lambda module: module.original[0], exact=True)
    return model


def dequantize(model: nn.Module) -> nn.Module:
    """The nearest float model: quantized layers become nn.Linear and nn.Embedding of their codes' values; in place."""
    expect_module("dequantize", model)
    _take_out(model, lambda module: module.dequantize(), exact=False)
    return model


def _form(
    name: str,
    module: nn.Module,
    known: tuning.Plan | None,
    times: tuning.Times | None,
    shared: set[int],
    rows: Mapping[str, int],
    anew: list[str],
) -> tuning.Choice:
    """In which form the layer `name` is to run.

    Args:
        anew: takes the name in, where the plan tells of another weight.
    """
    given = None if known is None else known.layers.get(name)
    if given is None and isinstance(module, (Int8Linear, SparseLinear)) and module.form != DENSE:
        return tuning.Choice(module.form)
    weight = module.weight_codes if isinstance(module, Int8Linear) else module.weight
    on_gpu = gpu.runs_on(weight.device)
    if not (weight.device.type == "cpu" or on_gpu) or weight.data_ptr() in shared:
        return tuning.Choice(DENSE)
    at = (rows[name],) if rows.get(name) else gpu_tuning.ROWS if on_gpu else tuning.ROWS
    if given is not None:
        if tuning.holds(given, weight.detach()):
            return given
        anew.append(name)
    if on_gpu:
        # Kernels of sparse codes round no output.
        choosable = not isinstance(module, Int8Linear) or not float(module.output_scale)
        return gpu_tuning.choose(weight.detach(), times, at) if choosable else tuning.Choice(DENSE)
    if isinstance(module, Int8Linear):
        codes, scale, bias = weight.detach(), module.weight_scale, module.bias
        return tuning.choose(codes, lambda: pack_qlinear(codes, scale, bias), scale, times, at)
    dense = weight.detach()
    if dense.dtype == torch.float16:
        dense = dense.float()
    return tuning.choose(dense, lambda: pack_linear(dense.contiguous(), None), None, times, at)


def _choose_providers(model: nn.Module, times: tuning.Times, bar: LateBar, exact_attention: bool) -> None:
    """Has the row operators and the attention of models on a GPU computed by whoever is fastest."""
    norms = [module for module in model.modules() if type(module) is nn.LayerNorm and module.weight is not None]
    known = {(norm.weight.numel(), norm.weight.dtype, norm.weight.device) for norm in norms}
    roots = layers.pretrained_roots(model)
    bar.expect(len(known) + len(roots))
    for width, dtype, device in sorted(known, key=str):
        if device.type == "cuda" and dtype in FLOATS:
            gpu_tuning.choose_providers(width, dtype, device, times)
        bar.step()
    for root in roots.values():
        bar.step()
        heads, width = (getattr(root.config, name, 0) for name in ("num_attention_heads", "hidden_size"))
        weight = next(root.parameters(), None)
        if not heads or weight is None or weight.device.type != "cuda":
            continue
        # Beside fp32 attention is bf16, see bertkern.gpu.encoder.
        half = weight.dtype == torch.float32 and not exact_attention
        dtype = torch.bfloat16 if half else weight.dtype
        gpu_tuning.choose_attention(heads, width // heads, dtype, weight.device, times)


def _shared_weights(model: nn.Module) -> set[int]:
    """The addresses of weights that more than one module holds: such as a table's that is an LM head's, too."""
    holders = Counter(
        tensor.data_ptr()
        for module in model.modules()
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if name in ("weight", "weight_codes") and tensor is not None and tensor.device.type != "meta"
    )
    return {address for address, count in holders.items() if count > 1}


def _take_out(model: nn.Module, original: Callable[[nn.Module], nn.Module], *, exact: bool) -> None:
    quantized, masked = layers.quantized_modules(model), record_of(model).masked
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


def mark_quantized(model: nn.Module, config: Any) -> None:
    """Tells the transformers models in `model` that they are quantized, under `config` or as their modules say."""
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


def expect_module(function: str, model: object) -> None:
    """Raises TypeError unless `model` is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: expected a torch.nn.Module. Got {type(model).__name__}.")
