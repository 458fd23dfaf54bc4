"""The models that the benchmarks run: BERT-base with random weights, a real sentence encoder, or a user's folder.

Each may be pruned by a pattern: random blocks of every linear layer but the pooler (`16x4@0.8`), a share of each
layer's heads (`heads@0.5`), or heads and feed-forward units (`d26`: as many a layer as nn_pruning's hybrid-filled SQuAD
model of that name has left, 26 % of the multiply-adds). What is gone is zero in a checkpoint of ordinary shape, which
every engine can read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import fetch
from .patterns import Pattern

SEED = 2018
HEADS = "heads@"
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
    """`dense`, `d26`, `heads@SHARE`, or a pattern of zeros in its one spelling. Raises ValueError."""
    text = text.strip()
    if text.startswith(HEADS):
        return f"{HEADS}{parse_share(text.removeprefix(HEADS)):g}"
    try:
        return text if text in ("dense", "d26") else str(Pattern.parse(text))
    except ValueError as error:
        raise ValueError(str(error).replace("expected ", "expected dense, d26, heads@SHARE or ")) from None


def parse_share(text: str) -> float:
    """A share of heads above 0 and up to 1. Raises ValueError."""
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0.0 < share <= 1.0:
        raise ValueError(f"share: expected a share of the heads above 0 and up to 1, like 0.5. Got {text!r}.")
    return share


def gone_heads(layers: int, heads: int, share: float) -> list[list[int]]:
    """The heads that `heads@share` takes from each layer: random ones, the same on every call."""
    import numpy as np

    rng = np.random.default_rng(SEED)
    return [sorted(map(int, rng.permutation(heads)[: round(share * heads)])) for _ in range(layers)]


def gone_from(folder: str) -> list[list[int]] | None:
    """The heads that the pattern of a written model took; None where it took none."""
    file = Path(folder) / PATTERN_FILE
    pattern = file.read_text().strip() if file.exists() else ""
    if not pattern.startswith(HEADS):
        return None
    config = json.loads((Path(folder) / "config.json").read_text())
    share = float(pattern.removeprefix(HEADS))
    return gone_heads(config["num_hidden_layers"], config["num_attention_heads"], share)


def pruned(model: Model, pattern: str, make: Callable[..., object]) -> Model:
    """The model with a pattern's zeros, made on the first call.

    Args:
        make: called with folder=, seed=, source= and pattern= where it must be written, see `write_pruned`.

    Raises ValueError where the pattern does not fit the model.
    """
    if pattern == "dense":
        return model
    config = json.loads((model.folder / "config.json").read_text())
    if pattern == "d26":
        shape = [config[key] for key in ("num_hidden_layers", "num_attention_heads", "intermediate_size")]
        if config["model_type"] != "bert" or shape != [12, 12, 3072]:
            raise ValueError(f"pattern d26: expected a model of BERT-base's shape. Got {model.name}.")
        hidden = config["hidden_size"]
        left = 4 * hidden * hidden // 12 * sum(D26_HEADS) + 2 * hidden * sum(D26_UNITS)
        kept = left / model.macs_per_token
    elif pattern.startswith(HEADS):
        if config["model_type"] != "bert":
            raise ValueError(f"pattern {pattern}: expected a BERT model. Got {model.name}.")
        layers, heads, hidden = (config[k] for k in ("num_hidden_layers", "num_attention_heads", "hidden_size"))
        gone = sum(map(len, gone_heads(layers, heads, float(pattern.removeprefix(HEADS)))))
        kept = 1.0 - 4 * hidden * hidden / heads * gone / model.macs_per_token
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
    import numpy as np
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(source, dtype=torch.float32)
    config = model.config
    with torch.no_grad():
        if pattern == "d26":
            rng = np.random.default_rng(seed)
            for layer, heads, units in zip(model.encoder.layer, D26_HEADS, D26_UNITS, strict=True):
                fill_heads(layer, rng.permutation(config.num_attention_heads)[heads:])
                _zero_units(layer, rng.permutation(config.intermediate_size)[units:].tolist())
        elif pattern.startswith(HEADS):
            share = float(pattern.removeprefix(HEADS))
            gone = gone_heads(config.num_hidden_layers, config.num_attention_heads, share)
            for layer, heads in zip(model.encoder.layer, gone, strict=True):
                fill_heads(layer, heads)
        else:
            zeros = Pattern.parse(pattern)
            linears = (
                m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "pooler" not in name
            )
            for i, linear in enumerate(linears):
                linear.weight *= torch.from_numpy(zeros.mask(*linear.weight.shape, seed=seed + i))
    model.save_pretrained(folder)
    (Path(folder) / PATTERN_FILE).write_text(pattern + "\n")


def fill_heads(layer: Any, heads: Iterable[int], deviation: float = 0.0) -> None:
    """Gives heads of a BERT layer random weights of this deviation; of 0, takes all that they are made of away."""
    attention = layer.attention.self
    size = attention.attention_head_size
    rows = [int(head) * size + i for head in heads for i in range(size)]
    for linear in (attention.query, attention.key, attention.value):
        linear.weight[rows] = linear.weight[rows].normal_(0.0, deviation) if deviation else 0.0
        linear.bias[rows] = linear.bias[rows].normal_(0.0, deviation) if deviation else 0.0
    out = layer.attention.output.dense
    out.weight[:, rows] = out.weight[:, rows].normal_(0.0, deviation) if deviation else 0.0


def _zero_units(layer: Any, dead: list[int]) -> None:
    first, second = layer.intermediate.dense, layer.output.dense
    first.weight[dead], first.bias[dead], second.weight[:, dead] = 0.0, 0.0, 0.0


def write_random_bert(folder: str, seed: int) -> None:
    """Saves `BertModel(BertConfig())`: 12 layers x 768, 12 heads, 110 M parameters, weights drawn as BERT's are."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    BertModel(BertConfig()).eval().save_pretrained(folder)
