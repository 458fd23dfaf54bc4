"""What the engines that import a model share: where their files go, and the form that their exporters trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel

from ..fetch import cache_dir
from ..models import PATTERN_FILE, fingerprint

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OUTPUTS = ("hidden", "pooled")


class Positional(torch.nn.Module):
    """A model behind positional inputs."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (last_hidden_state, pooler_output)."""
        out = self.model(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        return out.last_hidden_state, out.pooler_output


def load_model(folder: str, **options: Any) -> torch.nn.Module:
    """The fp32 model of a folder, in eval mode; without the heads and units that d26 zeroed, as its users have it."""
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, **options).eval()
    file = Path(folder) / PATTERN_FILE
    if file.exists() and file.read_text().strip() == "d26":
        from bertkern.shrink import shrink

        shrink(model)
    return model


def artifacts(folder: str, library: str) -> Path:
    """A folder of the cache for what `library` ("name-version") makes of a model; another one if the model changes."""
    model = Path(folder).resolve()
    path = cache_dir() / "bench" / f"{model.name}-{fingerprint(model)}" / library
    path.mkdir(parents=True, exist_ok=True)
    return path
