"""The models that the benchmarks run: BERT-base with random weights, a real sentence encoder, or a user's folder.

Each may be pruned by a pattern: random blocks of every linear layer but the pooler (`16x4@0.8`), or heads and
feed-forward units (`d26`: as many a layer as nn_pruning's hybrid-filled SQuAD model of that name has left, 26 % of the
multiply-adds). What is gone is zero in a checkpoint of ordinary shape, which every engine can read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import fetch
from .patterns import Pattern

SEED = 2018
PATTERN_FILE = "pattern.txt"  # beside the weights of a pruned model
# Heads and feed-forward units of each layer, arXiv 2109.04838.
D26_HEADS = (4, 4, 6, 7, 7, 5, 6, 7, 5, 5, 5, 3)
D26_UNITS = (552, 717, 795, 789, 833, 792, 620, 466, 283, 112, 96, 238)


@dataclass(frozen=True)
class Model:
    """A model folder and what the benchmarks must know of its shape."""

    name: str
    folder: Path
    vocab: int
    longest: int
    macs_per_token: int  # of the linear layers of the encoder: the work that a dense int8 engine cannot avoid
    kept: float = 1.0  # the share of them that a pattern leaves


def parse_pattern(text: str) -> str:
    """`dense`, `d26`, or a pattern of zeros in its one spelling. Raises ValueError."""
    text = text.strip()
    try:
        return text if text in ("dense", "d26") else str(Pattern.parse(text))
    except ValueError as error:
        raise ValueError(str(error).replace("expected ", "expected dense, d26 or ")) from None


def pruned(model: Model, pattern: str, make: Callable[..., object]) -> Model:
    """The model with a pattern's zeros, made on the first call.

    Args:
        make: called with folder=, seed=, source= and pattern= where it must be written, see `write_pruned`.

    Raises ValueError where the pattern does not fit the model.
    """
    if pattern == "dense":
        return model
    if pattern == "d26":
        config = json.loads((model.folder / "config.json").read_text())
        shape = [config[key] for key in ("num_hidden_layers", "num_attention_heads", "intermediate_size")]
        if config["model_type"] != "bert" or shape != [12, 12, 3072]:
            raise ValueError(f"pattern d26: expected a model of BERT-base's shape. Got {model.name}.")
        hidden = config["hidden_size"]
        left = 4 * hidden * hidden // 12 * sum(D26_HEADS) + 2 * hidden * sum(D26_UNITS)
        kept = left / model.macs_per_token
    else:
        kept = 1.0 - Pattern.parse(pattern).zeros
    folder = fetch.cache_dir() / "bench" / f"{model.folder.name}-{fingerprint(model.folder)}-{pattern}"
    if not (folder / PATTERN_FILE).exists():
        make(folder=str(folder), seed=SEED, source=str(model.folder), pattern=pattern)
    return replace(model, name=f"{model.name}-{pattern}", folder=folder, kept=kept)


def fingerprint(folder: Path) -> str:
    """Twelve digits that change when the files of a model do."""
    folder = folder.resolve()
    state = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(folder.iterdir()) if f.is_file()]
    return hashlib.sha256(repr((str(folder), state)).encode()).hexdigest()[:12]


def resolve(name: str, make: Callable[..., object], progress: fetch.Progress | None = None) -> Model:
    """Finds or makes a model.

    Args:
        name: "bert-base" (random weights: speed does not depend on them), "minilm", or a folder with a config.json.
        make: called with folder= and seed= where the random model must be written first, see `write_random_bert`.
        progress: for the download of "minilm".

    Raises ValueError for anything else.
    """
    if name == "bert-base":
        folder = fetch.cache_dir() / "bench" / f"bert-base-seed{SEED}"
        if not (folder / "model.safetensors").exists():
            make(folder=str(folder), seed=SEED)
    elif name == "minilm":
        folder = fetch.fetch(fetch.MINILM, progress)
    else:
        folder = Path(name).expanduser()
        if not (folder / "config.json").is_file():
            raise ValueError(f"model: expected bert-base, minilm or a folder with a config.json. Got {name!r}.")
    config = json.loads((folder / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    return Model(
        name=name if name in ("bert-base", "minilm") else folder.name,
        folder=folder,
        vocab=config["vocab_size"],
        longest=config["max_position_embeddings"],
        macs_per_token=config["num_hidden_layers"] * (4 * hidden * hidden + 2 * hidden * inner),
    )


def write_pruned(source: str, folder: str, pattern: str, seed: int) -> None:
    """Saves the model in `source` with zeros by a pattern."""
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        if pattern == "d26":
            _zero_d26(model, seed)
        else:
            zeros = Pattern.parse(pattern)
            linears = (
                m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "pooler" not in name
            )
            for i, linear in enumerate(linears):
                linear.weight *= torch.from_numpy(zeros.mask(*linear.weight.shape, seed=seed + i))
    model.save_pretrained(folder)
    (Path(folder) / PATTERN_FILE).write_text(pattern + "\n")


def _zero_d26(model: Any, seed: int) -> None:
    """Zeros all that heads and units are made of, where they are fewer than they were; which go is random."""
    import numpy as np

    rng = np.random.default_rng(seed)
    for layer, heads, units in zip(model.encoder.layer, D26_HEADS, D26_UNITS, strict=True):
        attention = layer.attention.self
        gone = rng.permutation(attention.num_attention_heads)[heads:]
        size = attention.attention_head_size
        dead = [int(head) * size + i for head in gone for i in range(size)]
        for linear in (attention.query, attention.key, attention.value):
            linear.weight[dead], linear.bias[dead] = 0.0, 0.0
        layer.attention.output.dense.weight[:, dead] = 0.0
        first, second = layer.intermediate.dense, layer.output.dense
        dead = rng.permutation(first.out_features)[units:].tolist()
        first.weight[dead], first.bias[dead], second.weight[:, dead] = 0.0, 0.0, 0.0


def write_random_bert(folder: str, seed: int) -> None:
    """Saves `BertModel(BertConfig())`: 12 layers x 768, 12 heads, 110 M parameters, weights drawn as BERT's are."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    BertModel(BertConfig()).eval().save_pretrained(folder)
