"""The models that the benchmarks run: BERT-base with random weights, a real sentence encoder, or a user's folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import fetch

SEED = 2018


@dataclass(frozen=True)
class Model:
    """A model folder and what the benchmarks must know of its shape."""

    name: str
    folder: Path
    vocab: int
    longest: int
    macs_per_token: int  # of the linear layers of the encoder: the work that a dense int8 engine cannot avoid


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


def write_random_bert(folder: str, seed: int) -> None:
    """Saves `BertModel(BertConfig())`: 12 layers x 768, 12 heads, 110 M parameters, weights drawn as BERT's are."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    BertModel(BertConfig()).eval().save_pretrained(folder)
