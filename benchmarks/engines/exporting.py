"""What the engines that import a model share: where their files go, and the form that their exporters trace."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel

from ..fetch import cache_dir
from ..models import PATTERN_FILE, fingerprint, gone_from

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OUTPUTS = ("hidden", "pooled")


class Positional(torch.nn.Module):
    """A model behind positional inputs.

    Args:
        added_mask: whether the model gets its mask as what is added to the scores: no logic on masks is traced then.
    """

    def __init__(self, model: torch.nn.Module, added_mask: bool = False):
        super().__init__()
        self.model = model
        self.added_mask = added_mask

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (last_hidden_state, pooler_output)."""
        if self.added_mask:
            attention_mask = (1.0 - attention_mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
        out = self.model(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        return out.last_hidden_state, out.pooler_output


def load_model(folder: str, **options: Any) -> torch.nn.Module:
    """The fp32 model of a folder, in eval mode; without the heads and units that were pruned, as its users have it."""
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, **options).eval()
    gone = gone_from(folder)
    if gone is not None:
        from bertkern import prune_heads

        return prune_heads(model, dict(enumerate(gone)))
    file = Path(folder) / PATTERN_FILE
    if file.exists() and file.read_text().strip() == "d26":
        from bertkern.shrink import shrink

        shrink(model)
    return model


def example() -> tuple[torch.Tensor, ...]:
    """What `Positional` is traced with: INPUTS of two sequences."""
    ids = torch.ones(2, 8, dtype=torch.int64)
    return ids, ids, ids * 0


def export_onnx(folder: str, target: Path, opset: int, added_mask: bool = False) -> None:
    """Writes the model as ONNX, for any batch and length. Attention is traced in its eager form: the one that
    optimizers recognise.
    """
    axes = {name: {0: "batch", 1: "length"} for name in (*INPUTS, "hidden")} | {"pooled": {0: "batch"}}
    torch.onnx.export(
        Positional(load_model(folder, attn_implementation="eager"), added_mask).eval(),
        example(),
        str(target),
        input_names=list(INPUTS),
        output_names=list(OUTPUTS),
        dynamic_axes=axes,
        opset_version=opset,
        dynamo=False,
    )


def with_token_types(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`batch` with token types, zeros where it has none: a graph has no default."""
    return {"token_type_ids": np.zeros_like(batch["input_ids"]), **batch}


def random_tokens(count: int) -> Iterator[dict[str, np.ndarray]]:
    """INPUTS of `count` sequences, one by one: what static ranges are calibrated on where only speed is measured."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        ids = rng.integers(1000, 30000, (1, 64))
        yield with_token_types({"input_ids": ids, "attention_mask": np.ones_like(ids)})


def artifacts(folder: str, library: str) -> Path:
    """A folder of the cache for what `library` ("name-version") makes of a model; another one if the model changes."""
    model = Path(folder).resolve()
    path = cache_dir() / "bench" / f"{model.name}-{fingerprint(model)}" / library
    path.mkdir(parents=True, exist_ok=True)
    return path
