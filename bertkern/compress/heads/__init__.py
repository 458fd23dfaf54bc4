"""Attention heads: how important each is, and which a model can do without.

- `head_importance(model, dataloader)` scores them by the loss, or by their weights;
- `choose_heads(model, config, dataloader, metric=...)` says which may go, and draws the metric against the heads;
- `prune_heads_by_importance(...)` removes them, too.
"""

from .config import HeadPruneConfig
from .importance import head_importance
from .pruning import HeadPoint, HeadPruning, choose_heads, prune_heads_by_importance

__all__ = [
    "HeadPoint",
    "HeadPruneConfig",
    "HeadPruning",
    "choose_heads",
    "head_importance",
    "prune_heads_by_importance",
]
