"""Small transformers models of every family and head, with weights large enough for attention to choose."""

import torch
import transformers
from torch import Tensor, nn

VOCABULARY, LABELS, LENGTH = 120, 3, 24

_SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 40,
    "num_labels": LABELS,
    "initializer_range": 0.15,
}
_CONFIGS = {
    "Bert": lambda: transformers.BertConfig(**_SIZES),
    "Roberta": lambda: transformers.RobertaConfig(**_SIZES),
    "XLMRoberta": lambda: transformers.XLMRobertaConfig(**_SIZES),
    "Electra": lambda: transformers.ElectraConfig(**_SIZES, embedding_size=32),
    "DistilBert": lambda: transformers.DistilBertConfig(
        dim=48,
        n_layers=2,
        n_heads=4,
        hidden_dim=80,
        vocab_size=VOCABULARY,
        max_position_embeddings=40,
        num_labels=LABELS,
        initializer_range=0.15,
    ),
    "MPNet": lambda: transformers.MPNetConfig(**_SIZES),
    "Albert": lambda: transformers.AlbertConfig(**_SIZES, embedding_size=20, num_hidden_groups=2),
}
HEADS = [
    "Model",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMaskedLM",
    "ForMultipleChoice",
]
CLASSES = [family + head for family in _CONFIGS for head in HEADS]
CLASSES += ["ElectraForPreTraining", "BertForPreTraining", "AlbertForPreTraining"]


def tiny(class_name: str, seed: int = 0, **config) -> nn.Module:
    """A model of a transformers class with random weights, in evaluation mode."""
    family = next(f for f in _CONFIGS if class_name.startswith((f + "For", f + "Model")))
    settings = _CONFIGS[family]()
    if class_name.endswith("QuestionAnswering"):
        settings.num_labels = 2
    for name, value in config.items():
        setattr(settings, name, value)
    torch.manual_seed(seed)
    model = getattr(transformers, class_name)(settings)
    # A fresh model has biases of zero, which would hide a bias that goes astray.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
    return model.eval()


# Early transformers 5 builds this class without the pooler that its forward then reads.
if tiny("XLMRobertaForMultipleChoice").base_model.pooler is None:
    CLASSES.remove("XLMRobertaForMultipleChoice")


def inputs(
    model: nn.Module, batch: int = 4, length: int = LENGTH, seed: int = 1, padding: bool = True
) -> dict[str, Tensor]:
    """Random ids and a mask of trailing padding, [batch, length], or [batch, 2, length] for multiple choice."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, 2, length) if "MultipleChoice" in type(model).__name__ else (batch, length)
    ids = torch.randint(5, VOCABULARY, shape, generator=generator)
    mask = torch.ones_like(ids)
    if padding and batch > 1:
        mask[1:2, ..., length * 2 // 3 :] = 0
        ids = torch.where(mask > 0, ids, torch.full_like(ids, model.config.pad_token_id))
    return {"input_ids": ids, "attention_mask": mask}


def main_output(outputs) -> Tensor:
    """Logits, or the hidden states of a bare model, [..., features]."""
    if "start_logits" in outputs:
        return torch.stack([outputs.start_logits, outputs.end_logits])
    for name in ("logits", "prediction_logits", "last_hidden_state"):
        if name in outputs:
            return outputs[name]
    raise AssertionError(f"no main output among {list(outputs)}")
