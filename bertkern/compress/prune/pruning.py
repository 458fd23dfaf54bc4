"""prune_, and how masks grow."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .config import NmPruneConfig, PruneConfig
from .masks import Masks
from .scores import magnitudes, random_scores
from .select import ranks, smallest, smallest_in_groups
from .targets import Target, find_targets


def prune_(model: nn.Module, config: PruneConfig) -> Masks:
    """Sets the smallest weights of `model` to zero, in place, once; storage stays dense.

    Exactly as many weights, blocks, rows or members of a group as asked become zero, zeros that are there already
    first, of equal ones the first by position: the same weights always give the same zeros. An infinite weight is the
    largest. Everything is checked before the first change.

    Args:
        model: any module with linear layers; transformers models inside are found. Under torch.nn.utils.prune, its
            masks stay, weights that they prune count as zeros, and more zeros are written to `weight_orig`.
        config: what is pruned, how far and in which shape.

    Returns:
        The masks: `hold()` keeps the zeros while the model is trained on; they may also be dropped.

    Raises:
        TypeError, ValueError: an int8 or accelerated model, weights that are no plain parameters or hold NaN (which
            has no magnitude), a block that does not fit into a matrix, a pattern that names none, nothing to prune; the
            model is unchanged then.

    Example:
        >>> import bertkern as bk
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
        >>> masks = bk.prune_(model, bk.BlockPruneConfig(sparsity=0.75, block=(16, 4), skip=("2",)))
        >>> int((model[0].weight == 0).sum())
        3072

    Source: arXiv 2002.08307, one_shot.
    """
    targets = find_targets(model, config)
    masks = Masks(targets)
    masks.pruned = grown(targets, config, masks.pruned, lambda final: final)
    return masks.apply()


def grown(
    targets: list[Target], config: PruneConfig, pruned: dict[str, Tensor], sparsity: Callable[[float], float]
) -> dict[str, Tensor]:
    """New masks, which hold all of the old ones.

    Args:
        pruned: bool [N, K] by name, True where a weight is held at zero; may lack matrices.
        sparsity: what to prune a matrix to, as a function of its final sparsity.
    """
    if isinstance(config, NmPruneConfig):
        return {t.name: _grown_in_groups(t, config, pruned.get(t.name), sparsity(t.final)) for t in targets}
    # Matrices whose smallest units are looked for together, and how many of the units go.
    together = [t for t in targets if config.scope == "global" and not t.own]
    pools = [[t] for t in targets if t not in together] + ([together] if together else [])
    found = {}
    for pool in pools:
        blocks = [config.block_of(tuple(t.stored().shape)) for t in pool]
        keys = [_keys(t, config, block, pruned.get(t.name)) for t, block in zip(pool, blocks, strict=True)]
        count = round(sparsity(pool[0].final) * sum(key.numel() for key in keys))
        for target, block, units in zip(pool, blocks, smallest(keys, count), strict=True):
            found[target.name] = _spread(units, block, tuple(target.stored().shape))
    return {t.name: found[t.name] for t in targets}


def _grown_in_groups(target: Target, config: NmPruneConfig, old: Tensor | None, sparsity: float) -> Tensor:
    return smallest_in_groups(_keys(target, config, (1, 1), old), config.m, round(sparsity * config.m))


def _keys(target: Target, config: PruneConfig, block: tuple[int, int], old: Tensor | None) -> Tensor:
    """Ranks of the units of a matrix, those pruned already first."""
    weight = target.weight()
    scores = magnitudes(weight, block, getattr(config, "norm", "max"))
    if torch.isnan(scores).any():
        raise ValueError(f"prune_: expected {target.name} without NaN. Got some.")
    if config.criterion == "random":
        scores = random_scores(target.name, tuple(scores.shape), config.seed).to(weight.device)
    # A unit goes as a whole, so its first weight speaks for it.
    return ranks(scores, None if old is None else old[:: block[0], :: block[1]])


def _spread(units: Tensor, block: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """bool [N, K] of what belongs to the marked blocks."""
    if block[0] > 1:
        units = units.repeat_interleave(block[0], 0)[: shape[0]]
    if block[1] > 1:
        units = units.repeat_interleave(block[1], 1)[:, : shape[1]]
    return units.contiguous()
