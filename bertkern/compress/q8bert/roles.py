"""Which operation of Q8BERT each module of a transformers model is."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

# Paths inside the base model (without `bert.`, `roberta.`, ...). A linear outside of it belongs to the head.
_EMBEDDINGS = {
    "word_embeddings": r"embeddings\.word_embeddings",
    "position_embeddings": r"embeddings\.position_embeddings",
    "token_type_embeddings": r"embeddings\.token_type_embeddings",
}
_BERT = {
    **_EMBEDDINGS,
    "attention_query": r"encoder\.layer\.\d+\.attention\.self\.query",
    "attention_key": r"encoder\.layer\.\d+\.attention\.self\.key",
    "attention_value": r"encoder\.layer\.\d+\.attention\.self\.value",
    "attention_output": r"encoder\.layer\.\d+\.attention\.output\.dense",
    "ffn_intermediate": r"encoder\.layer\.\d+\.intermediate\.dense",
    "ffn_output": r"encoder\.layer\.\d+\.output\.dense",
    "pooler": r"pooler\.dense",
}
_MPNET = {
    **_BERT,
    "attention_query": r"encoder\.layer\.\d+\.attention\.attn\.q",
    "attention_key": r"encoder\.layer\.\d+\.attention\.attn\.k",
    "attention_value": r"encoder\.layer\.\d+\.attention\.attn\.v",
    "attention_output": r"encoder\.layer\.\d+\.attention\.attn\.o",
}
_DISTILBERT = {
    **_EMBEDDINGS,
    "attention_query": r"transformer\.layer\.\d+\.attention\.q_lin",
    "attention_key": r"transformer\.layer\.\d+\.attention\.k_lin",
    "attention_value": r"transformer\.layer\.\d+\.attention\.v_lin",
    "attention_output": r"transformer\.layer\.\d+\.attention\.out_lin",
    "ffn_intermediate": r"transformer\.layer\.\d+\.ffn\.lin1",
    "ffn_output": r"transformer\.layer\.\d+\.ffn\.lin2",
}
_ALBERT_LAYER = r"encoder\.albert_layer_groups\.\d+\.albert_layers\.\d+"
_ALBERT = {
    **_EMBEDDINGS,
    "attention_query": rf"{_ALBERT_LAYER}\.attention\.query",
    "attention_key": rf"{_ALBERT_LAYER}\.attention\.key",
    "attention_value": rf"{_ALBERT_LAYER}\.attention\.value",
    "attention_output": rf"{_ALBERT_LAYER}\.attention\.dense",
    "ffn_intermediate": rf"{_ALBERT_LAYER}\.ffn",
    "ffn_output": rf"{_ALBERT_LAYER}\.ffn_output",
    "pooler": r"pooler",
}
FAMILIES = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "electra": _BERT,
    "distilbert": _DISTILBERT,
    "mpnet": _MPNET,
    "albert": _ALBERT,
}


@dataclass(frozen=True)
class Role:
    """A module of the model, its dotted name there, and the operation of Q8BERT that it is."""

    name: str
    module: nn.Module
    op: str


def pretrained_models(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, model) of each outermost transformers model of a known family in `model`, itself included.

    The search reaches into wrappers such as a SentenceTransformer.
    """
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        inside_another = any(outer == "" or name.startswith(outer + ".") for outer, _ in found)
        if not inside_another and _family(module):
            found.append((name, module))
    return found


def find_roles(model: nn.Module) -> list[Role]:
    """Every module of `model` that Q8BERT has an operation for, in the order of the tree; shared modules once.

    Raises ValueError where `model` holds no transformers model of a family in `FAMILIES`.
    """
    models = pretrained_models(model)
    if not models:
        raise ValueError(
            f"q8bert: expected a transformers model of one of the families {', '.join(FAMILIES)}. "
            f"Got {type(model).__name__}."
        )
    return [role for prefix, pretrained in models for role in _roles(prefix, pretrained)]


def _family(module: nn.Module) -> dict[str, str] | None:
    config = getattr(module, "config", None)
    if not hasattr(module, "base_model"):
        return None
    return FAMILIES.get(getattr(config, "model_type", None))


def _roles(prefix: str, pretrained: nn.Module) -> Iterator[Role]:
    patterns = _family(pretrained)
    inside = {id(module): name for name, module in pretrained.base_model.named_modules()}
    for name, module in pretrained.named_modules():
        if not isinstance(module, (nn.Linear, nn.Embedding)):
            continue
        if id(module) in inside:
            op = next((op for op, path in patterns.items() if re.fullmatch(path, inside[id(module)])), None)
        else:
            op = "head" if isinstance(module, nn.Linear) else None
        if op is not None:
            yield Role(f"{prefix}.{name}" if prefix else name, module, op)
