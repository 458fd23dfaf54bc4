"""Writes a prepared model as NLP Architect would: the same files, keys, dtypes, shapes (PyTorch 1.x, transformers 2).

It reads a module's attributes and buffers only and computes the integers by itself, so that an import of its files
checks the importer's arithmetic, too. Nothing of bertkern is imported.
"""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

INT8_FILE, TRAINING_FILE = "quant_pytorch_model.bin", "pytorch_model.bin"
BERT_KEYS = [
    "attention_probs_dropout_prob",
    "hidden_act",
    "hidden_dropout_prob",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "layer_norm_eps",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "type_vocab_size",
    "vocab_size",
]


def export(model: nn.Module, folder: Path, ops: dict[str, object], *, architectures: bool = True) -> None:
    """What QuantizedBert*.save_pretrained leaves in `folder`: config.json, the training file and the int8 file.

    ops: settings by operation (dataclasses), absent or None for an ordinary layer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {key: getattr(model.config, key) for key in BERT_KEYS}
    config |= {"finetuning_task": None, "num_labels": model.config.num_labels, "output_attentions": False}
    config |= {"pruned_heads": {}, "torchscript": False, "use_bfloat16": False, "is_decoder": False}
    if architectures:
        config["architectures"] = ["Quantized" + type(model).__name__]
    config |= {op: asdict(settings) for op, settings in ops.items() if settings is not None}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    torch.save(_detached(model.state_dict()), folder / TRAINING_FILE)
    torch.save(int8_state_dict(model), folder / INT8_FILE)


def int8_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict under toggle_8bit(True)."""
    state = _detached(model.state_dict())
    for name, module in model.named_modules():
        settings = getattr(module, "settings", None)
        if settings is None or settings.mode == "none":
            continue
        weight = state.pop(f"{name}.weight")
        state.pop(f"{name}._step")
        weight_scale = 127 / weight.abs().max()
        state[f"{name}.quantized_weight"] = weight.mul(weight_scale).round().clamp(-127, 127).char()
        state[f"{name}._weight_scale"] = weight_scale
        if isinstance(module, nn.Linear) and settings.mode == "ema" and module.bias is not None:
            bias_scale = 127 / state[f"{name}.input_thresh"] * weight_scale
            state[f"{name}._quantized_bias"] = state.pop(f"{name}.bias").mul(bias_scale).round().int()
            state[f"{name}.bias_scale"] = bias_scale
    return state


def _detached(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}
