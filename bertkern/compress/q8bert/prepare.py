"""Quantization-aware training: the model's own layers become ones that round as int8 would."""

import torch
from torch import nn

from .config import EMBEDDINGS, PAPER, Q8BertConfig
from .modules import FakeQuantEmbedding, FakeQuantLinear
from .roles import Role, find_roles, pretrained_models


def prepare_qat(model: nn.Module, config: Q8BertConfig = PAPER) -> nn.Module:
    """Makes `model` train and evaluate as Q8BERT, in place, and returns it.

    Names, parameters, their ties and the module objects stay, so an optimizer made before goes on to work, and
    `Trainer` trains the model as it would the plain one. What the model is to be quantized like is written to
    `model.config.q8bert`: `save_pretrained` keeps it, and `bertkern.checkpoints.load_checkpoint` reads it back
    together with the ranges.

    Args:
        model: a transformers BERT, RoBERTa, XLM-RoBERTa, ELECTRA, DistilBERT or MPNet, with any head, or a module that
            holds some (a SentenceTransformer).
        config: what is quantized, and how. An operation that the model lacks is passed over.

    Raises:
        ValueError, TypeError: before the first change, where a layer to be quantized is not a plain torch one (already
            prepared, parametrized, adapted) or holds Inf or NaN; the text names it.

    Example::

        model = AutoModelForSequenceClassification.from_pretrained(...)
        prepare_qat(model, Q8BertConfig.uniform(start_step=100))
        Trainer(model, ...).train()
        convert(model.eval())
    """
    roles = check_model(model, config)
    for role in roles:
        kind = FakeQuantEmbedding if role.op in EMBEDDINGS else FakeQuantLinear
        kind.adopt(role.module, getattr(config, role.op))
    for _, pretrained in pretrained_models(model):
        pretrained.config.q8bert = config.to_dict()
    return model


def check_model(model: nn.Module, config: Q8BertConfig) -> list[Role]:
    """The modules that `config` quantizes, each found fit to be; raises as `prepare_qat` does."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"prepare_qat: expected model to be a torch module. Got {type(model).__name__}.")
    if not isinstance(config, Q8BertConfig):
        raise TypeError(f"prepare_qat: expected config to be a Q8BertConfig. Got {type(config).__name__}.")
    roles = [role for role in find_roles(model) if getattr(config, role.op) is not None]
    if not roles:
        raise ValueError("prepare_qat: expected a config that quantizes some operation of the model. Got none.")
    for role in roles:
        _check_layer(role)
    return roles


def _check_layer(role: Role) -> None:
    plain = nn.Embedding if role.op in EMBEDDINGS else nn.Linear
    if type(role.module) is not plain:
        prepared = isinstance(role.module, (FakeQuantLinear, FakeQuantEmbedding))
        raise TypeError(
            f"prepare_qat: expected {role.name} to be a plain {plain.__name__}. "
            f"Got {type(role.module).__name__}{' (prepared already)' if prepared else ''}."
        )
    if plain is nn.Embedding and role.module.max_norm is not None:
        raise ValueError(f"prepare_qat: expected {role.name} without max_norm. Got {role.module.max_norm}.")
    weight = role.module.weight
    if not weight.is_floating_point():
        raise TypeError(f"prepare_qat: expected {role.name}.weight to be floating point. Got {weight.dtype}.")
    if not weight.is_meta and not torch.isfinite(weight).all():
        raise ValueError(f"prepare_qat: expected {role.name}.weight to be finite. Got Inf or NaN.")
