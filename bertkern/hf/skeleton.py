"""Models without values, in the shapes of a checkpoint, before transformers loads its tensors."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from .. import exchange, plan
from ..ragged import RaggedConfig
from ..schemes import Header, Scheme, scheme_of, scheme_under
from ..surgery import put
from .files import check_body, complain, headers
from .record import BertkernConfig


def shape_as(model: nn.Module, record: BertkernConfig) -> bool:
    """Gives a model without values the widths and norms that its checkpoint has: as recorded, or as transformers 4 did.

    Returns:
        Whether layers have other widths now.

    Raises:
        ValueError: widths that the model cannot have, or a record that `pruned_heads` of transformers 4 contradict.
    """
    from .. import heads
    from ..checkpoints import pruned_heads

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
    heads.narrow_to("from_pretrained", model, widths or older)
    if pruned_heads.without_norms(model.config):
        heads.remove_norms(model)
    return bool(widths or older)


def check_shapes(model: nn.Module, files: Iterable[str] | None) -> None:
    """Raises ValueError unless a checkpoint holds the tensors of a ragged float model, without values yet.

    Heads of zeros that stand in for none may be there or not: where the file has matrices without rows or columns, so
    has the model until `fill_stand_ins`.
    """
    from .. import heads

    if files is None:
        return
    found = headers(files, model)
    names = {id(module): name.removeprefix(f"{model.base_model_prefix}.") for name, module in model.named_modules()}
    for linear, shapes in heads.headless(model):
        for tensor, shape in shapes.items():
            if found.get(f"{names[id(linear)]}.{tensor}", ("", []))[1] == shape:
                linear._parameters[tensor] = nn.Parameter(torch.empty(shape, device="meta"))
    check_body(model, found, {name for tie in model.all_tied_weights_keys.items() for name in tie})


def fill_stand_ins(model: nn.Module) -> None:
    """Makes heads of zeros of those that a checkpoint left out; raises ValueError where one holds anything else."""
    from .. import heads

    names = {id(module): name for name, module in model.named_modules()}
    for linear, shapes in heads.headless(model):
        for tensor in shapes:
            scheme = None if tensor == "bias" else scheme_of(linear)
            value = getattr(linear, tensor) if scheme is None else scheme.values(linear)
            if value.numel() == 0:
                whole = (linear.out_features, linear.in_features)[: value.dim()]
                name = tensor if scheme is None else "weight_codes"
                setattr(linear, name, nn.Parameter(value.new_zeros(whole), value.requires_grad))
            elif value.device.type != "meta" and bool((value != 0).any()):
                raise ValueError(
                    f"from_pretrained: expected {names[id(linear)]}.{tensor} to be zeros, as the config records no "
                    "heads of this layer. Got others."
                )


def build_skeleton(model: nn.Module, record: BertkernConfig, files: Iterable[str] | None) -> dict[str, str]:
    """Puts quantized modules without values into `model`, as its record and the checkpoint's headers say.

    Returns:
        Of linears that share a table's codes: the name of the linear -> that of the table.

    Raises:
        ValueError: tensors that are missing, superfluous or of another shape or dtype; the text names them.
    """
    config, scheme, base = record.config, scheme_under(record.config), model.base_model_prefix + "."
    if longer := [name for name in record.layers if name.startswith(base)]:
        # They would name nothing, and their tensors be read as if they were not there.
        raise ValueError(
            f"from_pretrained: expected layers of quantization_config without {base} before their names. "
            f"Got {', '.join(longer)}."
        )
    forms = {name: record.layers.get(name.removeprefix(base)) for name, _ in model.named_modules()}
    forms = {name: form for name, form in forms.items() if form is not None}
    choices = plan.choose(model, config, forms)
    linears = [choice.name for choice in choices if choice.action == "quantized"]
    heads = [choice.name for choice in choices if choice.reason == plan.leaves("head") and scheme.ties_heads(config)]
    tables = exchange.tables_of(model, scheme, config, forms)
    tied = {
        target.removesuffix(".weight"): source.removesuffix(".weight")
        for target, source in model.all_tied_weights_keys.items()
        if target.endswith(".weight") and source.removesuffix(".weight") in tables
    }
    shared = {name for tie in model.all_tied_weights_keys.items() for name in tie}
    found = None if files is None else headers(files, model)
    held: dict[str, dict[str, Header]] = {}
    for name in {*linears, *heads, *tables} if found is not None else ():
        tensors = {tensor: f"{name}.{tensor}".removeprefix(base) for tensor in (*scheme.tensors, "weight", "bias")}
        held[name] = {tensor: found[key] for tensor, key in tensors.items() if key in found}
    ties = {
        name: source
        for name, source in tied.items()
        if name in [*linears, *heads] and not {"weight_codes", "weight", "values"} & held.get(name, {}).keys()
    }
    planned = [*linears, *(name for name in ties if name not in linears), *tables]
    if found is not None:
        planned = _checked(model, scheme, config, planned, ties, held, forms)
        complain(_unplanned(model, planned, found))
        ties = {name: source for name, source in ties.items() if name in planned}
    roots = plan.pretrained_roots(model)
    for name in planned:
        if name not in ties:
            module, form = model.get_submodule(name), forms.get(name, {})
            names = plan.aliases(name, roots)
            put(model, name, scheme.skeleton(module, config, held.get(name, {}), form, names))
    for name, source in ties.items():
        linear, table, form = model.get_submodule(name), model.get_submodule(source), forms.get(name, {})
        head = config.head or "activation" in form
        put(model, name, scheme.tied(linear, table, scheme.local(config, form), head, None))
    if found is not None:
        check_body(model, found, shared)
    drop_ties(model)
    return ties


def _checked(
    model: nn.Module,
    scheme: Scheme,
    config: Any,
    planned: list[str],
    ties: Mapping[str, str],
    held: Mapping[str, Mapping[str, Header]],
    forms: Mapping[str, Mapping[str, Any]],
) -> list[str]:
    """Which of the planned modules a checkpoint holds; raises ValueError where their tensors do not fit."""
    roots = plan.pretrained_roots(model)
    problems: list[str] = []
    kept = []
    for name in planned:
        module = model.get_submodule(name)
        wrong = scheme.misfits(name, module, config, held[name], forms.get(name, {}), name in ties)
        # A head or pooler that the saved model did not have starts anew, as in every transformers model.
        if wrong and not held[name].keys() - {"bias"} and plan.role(name, roots) != "body":
            continue
        kept.append(name)
        problems += wrong
    complain(problems)
    return kept


def _unplanned(model: nn.Module, planned: Iterable[str], found: Mapping[str, Header]) -> list[str]:
    """Complaints about codes of modules that are to stay float."""
    base = model.base_model_prefix + "."
    known = {f"{name}.weight_codes".removeprefix(base) for name in planned}
    here = {
        f"{name}.weight_codes".removeprefix(base) for name, module in model.named_modules() if hasattr(module, "weight")
    }
    return [f"expected no {name}. Got it." for name in sorted(found) if name in here and name not in known]


def take_blocks(model: nn.Module) -> None:
    """Makes weights of what a file held as blocks; raises ValueError where the blocks are wrong."""
    for name, module in plan.quantized_modules(model).items():
        scheme_of(module).take_blocks(name, module)


def tie_loaded(model: nn.Module, ties: Mapping[str, str]) -> None:
    """Ties linears anew to the tables whose values have come."""
    for name, source in ties.items():
        linear = model.get_submodule(name)
        scheme_of(linear).tie_loaded(linear, model.get_submodule(source))


def check_values(model: nn.Module) -> None:
    """Raises ValueError where the values of quantized modules cannot be."""
    for name, module in plan.quantized_modules(model).items():
        scheme_of(module).check_loaded(name, module)


def drop_ties(model: nn.Module) -> None:
    """Forgets ties of parameters that quantized modules have replaced; transformers would look for them."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for attribute in ("all_tied_weights_keys", "_tied_weights_keys"):
        ties = getattr(model, attribute, None)
        if ties:
            kept = {target: source for target, source in ties.items() if {target, source} <= parameters}
            setattr(model, attribute, kept)
