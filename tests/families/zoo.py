"""Tiny random models of every family and head, with awkward sizes."""

import copy
from functools import cache

import pytest
import torch
import transformers

VOCAB = 97
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 52,
    "num_attention_heads": 2,
    "intermediate_size": 117,
    "num_hidden_layers": 3,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
    "num_labels": 2,
}
_CONFIGS = {
    "Bert": {},
    "Roberta": {"type_vocab_size": 1},
    "XLMRoberta": {"type_vocab_size": 1},
    "Electra": {"embedding_size": 36},
    "DistilBert": {
        "dim": 52,
        "n_heads": 2,
        "hidden_dim": 117,
        "n_layers": 3,
        "hidden_size": None,
        "num_attention_heads": None,
        "intermediate_size": None,
        "num_hidden_layers": None,
    },
    "MPNet": {},
    "Albert": {"embedding_size": 20},
    "MobileBert": {"hidden_size": 68, "intra_bottleneck_size": 52, "embedding_size": 20},
}
_HEADS = (
    "Model",
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
)
_MORE = ("BertForPreTraining", "BertForNextSentencePrediction", "ElectraForPreTraining", "AlbertForPreTraining")
_MORE += ("MobileBertForPreTraining", "MobileBertForNextSentencePrediction")
FAMILIES = tuple(_CONFIGS)
# Options that give every family three layers with weights of their own.
OWN_WEIGHTS = {"Albert": {"num_hidden_groups": 3}}
MODELS = tuple(family + head for family in FAMILIES for head in _HEADS) + _MORE


@cache
def _made(name: str, options: tuple) -> torch.nn.Module:
    family = next(family for family in FAMILIES if name.startswith(family))
    sizes = {key: value for key, value in {**_SIZES, **_CONFIGS[family], **dict(options)}.items() if value is not None}
    torch.manual_seed(len(name))
    model = getattr(transformers, name)(getattr(transformers, family + "Config")(**sizes)).eval()
    with torch.no_grad():
        # Fresh models have zero biases and unit norms, which would hide an exchange of tensors.
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.mul_(4)
    return model


def make(name: str, **options) -> torch.nn.Module:
    """A fresh copy of the model of this class; options go to its config."""
    return copy.deepcopy(_made(name, tuple(sorted(options.items()))))


def inputs(model: torch.nn.Module, batch: int = 3, length: int = 11, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random ids without padding."""
    shape = (batch, 2, length) if type(model).__name__.endswith("MultipleChoice") else (batch, length)
    ids = torch.randint(5, VOCAB, shape, generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def padded(model: torch.nn.Module, kind: str) -> dict[str, torch.Tensor]:
    """Ids with padding of a kind: "none", "trailing", "left", "holes" or "empty" (a row without tokens)."""
    made = inputs(model)
    mask = made["attention_mask"].flatten(0, -2)
    if kind == "trailing":
        mask[0, 4:] = 0
        mask[2, 9:] = 0
    elif kind == "left":
        mask[1, :5] = 0
    elif kind == "holes":
        mask[0, 3:5] = 0
        mask[2, 8] = 0
    elif kind == "empty":
        mask[1] = 0
    made["attention_mask"] = mask.view_as(made["attention_mask"])
    made["input_ids"] = torch.where(made["attention_mask"] == 0, 1, made["input_ids"])
    return made


def answer(model: torch.nn.Module, **call):
    """What the untouched model says; the test is skipped where transformers' own model fails, as some releases' do."""
    try:
        return model(**call)
    except (IndexError, ValueError) as error:
        pytest.skip(f"the untouched model fails: {error}")


def tensors(output) -> dict[str, torch.Tensor]:
    """The tensors of a model's output by name."""
    return {key: value for key, value in output.items() if isinstance(value, torch.Tensor)}


def real(name: str, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`value` at real tokens, if it has a value per token."""
    per_token = value.shape[: mask.dim()] == mask.shape
    return value[mask.bool()] if per_token else value
