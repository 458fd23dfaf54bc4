"""What the engines that import a model share: where their files go, and the form that their exporters trace."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from ..fetch import cache_dir

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


def artifacts(folder: str, library: str) -> Path:
    """A folder of the cache for what `library` ("name-version") makes of a model; another one if the model changes."""
    model = Path(folder).resolve()
    state = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(model.iterdir()) if f.is_file()]
    key = hashlib.sha256(repr((str(model), state)).encode()).hexdigest()[:12]
    path = cache_dir() / "bench" / f"{model.name}-{key}" / library
    path.mkdir(parents=True, exist_ok=True)
    return path
