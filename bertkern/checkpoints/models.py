"""The transformers model that a checkpoint's config.json describes, and its weights put into it under checks."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, BertConfig, PretrainedConfig, PreTrainedModel

from .checked import CheckedTensors

# What of a config.json is not about the model itself. Left in, some of it would have transformers fetch code by the
# name that a file gives.
ASIDE = ("architectures", "auto_map", "attn_implementation", "experts_implementation", "dtype", "torch_dtype")
# What older libraries wrote of embeddings: buffers that are made anew.
_BUFFERS = ("position_ids", "token_type_ids")


def build(
    values: dict[str, Any],
    tensors: Iterable[str],
    model_class: type[PreTrainedModel] | None = None,
    foreign: Iterable[str] = (),
) -> PreTrainedModel:
    """The model that `values` describe, with weights that are about to be overwritten.

    Args:
        values: of config.json.
        tensors: names of the weights, which tell the class where neither `values` nor `model_class` do.
        model_class: the transformers class.
        foreign: keys of `values` that transformers is not to see.

    Raises:
        ValueError: there is no such model, or no telling which one it is.
    """
    model_class = model_class or _model_class(values, tensors)
    # Weights are drawn and at once overwritten; the caller's random numbers are not to notice.
    with torch.random.fork_rng(devices=[]):
        try:
            return model_class(_model_config(values, {*foreign, *ASIDE}))
        # Which exception an impossible width, name or kind raises is up to transformers and torch.
        except Exception as error:
            raise ValueError(
                f"load_checkpoint: expected config.json to describe a {model_class.__name__}. Got one of which none "
                f"can be made: {error}"
            ) from None


def fill(model: PreTrainedModel, checked: CheckedTensors, empty: Mapping[str, Sequence[int]] | None = None) -> None:
    """Takes every parameter and stored buffer of `model` out of `checked` and puts it in place.

    The model gets the dtype of the file's tensors where they have one in common, else it stays fp32. Nothing is changed
    before all of them have been found right, and no tensor is left over.

    Args:
        model: of the shapes that the tensors must have.
        checked: the tensors; NaN and Inf among them are kept.
        empty: shapes of tensors without elements that the file holds for parameters that stay as they are.

    Raises:
        ValueError: as of `CheckedTensors.finish`.
    """
    empty = empty or {}
    state: dict[str, Tensor] = {}
    for tied in by_identity(model):
        # Tied tensors are written under one of their names, or under all.
        names = [name for name in tied if name in checked] or tied[:1]
        if names[0] in empty:
            checked.take(names[0], empty[names[0]])
            continue
        shape = model.get_parameter(names[0]).shape
        for name in names:
            state[name] = checked.take(name, shape, finite=False)
            if not _equal(state[name], state[names[0]]):
                checked.wrong(f"expected {name} to be {names[0]}, to which it is tied. Got other values.")
    floats = {tensor.dtype for tensor in state.values()}
    for name, buffer in model.state_dict().items():
        if name not in state and name in dict(model.named_buffers()):
            state[name] = checked.take(name, buffer.shape, buffer.dtype)
    pass_over_unused(model, checked)
    checked.finish()
    if len(floats) == 1:
        model.to(floats.pop())
    model.load_state_dict(state, strict=False)


def pass_over_unused(model: PreTrainedModel, checked: CheckedTensors) -> None:
    """Drops what older libraries wrote and this model has no place for."""
    base = f"{model.base_model_prefix}." if model.base_model is not model else ""
    has_pooler = getattr(model.base_model, "pooler", None) is not None
    for name in checked.names():
        buffer = name in [f"{base}embeddings.{made}" for made in _BUFFERS]
        # Older token classifiers and question answerers carried a pooler that nothing read.
        idle_pooler = not has_pooler and name.startswith(f"{base}pooler.dense.")
        if buffer or idle_pooler:
            checked.pass_over(name)


def of_body(model: PreTrainedModel, name: str) -> bool:
    """Whether a checkpoint's tensor `name` must be one of `model`: it stands in the base model, the pooler aside."""
    first, *rest = name.removeprefix(model.base_model_prefix + ".").split(".")
    made_anew = "pooler" in (first, *rest) or rest[-1:] in ([buffer] for buffer in _BUFFERS)
    return model.base_model._modules.get(first) is not None and not made_anew


def by_identity(model: nn.Module) -> list[list[str]]:
    """The names of each parameter, tied ones together."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return list(names.values())


def named_class(values: dict[str, Any]) -> type[PreTrainedModel] | None:
    """The transformers class that `values` name under architectures, if there is one."""
    names = values.get("architectures")
    for name in names if isinstance(names, list) else ():
        found = getattr(transformers, str(name).removeprefix("Quantized"), None)
        # The name comes from a file: nothing but a model is to be called by it.
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    return None


def _model_class(values: dict[str, Any], tensors: Iterable[str]) -> type[PreTrainedModel]:
    if (found := named_class(values)) is not None:
        return found
    heads = {name.split(".")[0] for name in tensors} - {"bert"}
    if "qa_outputs" in heads:
        return transformers.BertForQuestionAnswering
    if "classifier" in heads:
        raise ValueError(
            "load_checkpoint: expected config.json to name the class under architectures, or model_class= "
            "(BertForSequenceClassification or BertForTokenClassification). Got neither."
        )
    return transformers.BertModel


def _model_config(values: dict[str, Any], aside: set[str]) -> PretrainedConfig:
    plain = {key: value for key, value in values.items() if key not in aside and not key.startswith("_")}
    # Files from before transformers 3 do not say that they are a BERT.
    kind = plain.pop("model_type", None)
    if kind is None or kind == "quant_bert":
        return BertConfig.from_dict(plain)
    return AutoConfig.for_model(kind, **plain)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a is b or bool(((a == b) | ((a != a) & (b != b))).all())
