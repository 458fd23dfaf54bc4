"""Which weights of a model are held at zero, and what holds them there while it trains."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .config import PruneConfig, UnstructuredPruneConfig
from .report import PruneReport, PruneRow
from .targets import Target, find_targets


class Masks:
    """The pruned weights of a model; made by `prune_`, or by `Masks.of_zeros` from a model that is pruned already.

    Three ways keep the weights at exactly zero in training:

    - `masks.hold(optimizer)`: gradients of pruned weights are zero, and zeros are written again after each step of the
      optimizer. Right for any optimizer, also one with momentum from before the pruning.
    - `masks.hold()`: gradients only. Exact for a new SGD, Adam or AdamW, also with momentum and weight decay: all that
      they multiply and add is zero.
    - `masks.apply()` after each step, by hand.

    `remove()` ends it; weights are plain ones all the time.

    Attributes:
        pruned: bool [N, K] by the name of the weight, True where it is held at zero.

    Example:
        >>> import bertkern as bk
        >>> model = nn.Linear(8, 8)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> masks = bk.prune_(model, bk.UnstructuredPruneConfig(sparsity=0.5)).hold(optimizer)
        >>> model(torch.ones(1, 8)).sum().backward(); optimizer.step(); int((model.weight == 0).sum())
        32

    Source: fine-tuning with fixed masks: arXiv 2002.08307; of the zeros found: arXiv 2111.05754 ("pattern lock").
    """

    def __init__(self, targets: list[Target], pruned: Mapping[str, Tensor] | None = None) -> None:
        self._targets = targets
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self.pruned: dict[str, Tensor] = dict(pruned or {})

    @classmethod
    def of_zeros(cls, model: nn.Module, config: PruneConfig | None = None) -> "Masks":
        """The masks of the zeros that `model` has.

        Args:
            config: which matrices count, by `skip`, `embeddings`, `pooler` and `head`; its other fields are not read.
                By default those of UnstructuredPruneConfig.

        Raises:
            TypeError, ValueError: as `prune_` does.
        """
        targets = find_targets(model, UnstructuredPruneConfig(sparsity=0) if config is None else config)
        return cls(targets, {t.name: t.weight() == 0 for t in targets})

    @torch.no_grad()
    def apply(self) -> "Masks":
        """Writes the zeros into the weights.

        Raises:
            RuntimeError: a weight has another shape than its mask, after a change of the vocabulary, say.
        """
        for target in self._targets:
            if (pruned := self._mask(target)) is None:
                continue
            stored = target.stored()
            if stored.shape != pruned.shape:
                raise RuntimeError(
                    f"Masks: expected {target.name} of shape {list(pruned.shape)}. Got {list(stored.shape)}."
                )
            # Not a product, which would keep NaN, and would make zeros negative.
            stored.masked_fill_(pruned, 0)
            if target.key != "weight":
                # torch.nn.utils.prune computes it anew in the next forward only.
                target.module.weight = target.weight()
        return self

    def hold(self, *optimizers: torch.optim.Optimizer) -> "Masks":
        """Keeps the weights at zero from now on: by their gradients, and after each step of `optimizers`.

        Replaces what an earlier call has set up.

        Raises:
            TypeError: something else than optimizers.
        """
        # What accelerate wraps around an optimizer steps it, but takes no hooks.
        optimizers = tuple(getattr(optimizer, "optimizer", optimizer) for optimizer in optimizers)
        for optimizer in optimizers:
            if not isinstance(optimizer, torch.optim.Optimizer):
                raise TypeError(f"Masks.hold: expected a torch.optim.Optimizer. Got {type(optimizer).__name__}.")
        self.remove()
        for target in self._targets:
            if target.stored().requires_grad:
                self._handles.append(target.stored().register_hook(self._gradient_hook(target)))
        for optimizer in optimizers:
            self._handles.append(optimizer.register_step_post_hook(self._after_step))
        return self

    def remove(self) -> None:
        """Takes off what `hold` has set up. The weights stay as they are."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def report(self) -> PruneReport:
        """How many weights of each matrix are pruned; print it, or take `to_dict`."""
        return PruneReport(
            tuple(
                PruneRow(
                    t.name, tuple(t.stored().shape), int(self.pruned[t.name].sum()) if t.name in self.pruned else 0
                )
                for t in self._targets
            )
        )

    def state_dict(self) -> dict[str, Tensor]:
        """The masks as tensors, bool [N, K] by the name of the weight."""
        return dict(self.pruned)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes masks over, and writes their zeros.

        Raises:
            ValueError: masks of other matrices, or of another shape or dtype.
        """
        shapes = {t.name: tuple(t.stored().shape) for t in self._targets}
        if extra := sorted(set(state) - set(shapes)):
            raise ValueError(f"Masks: expected masks of the model's matrices. Got one of {extra[0]}.")
        for name, mask in state.items():
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != shapes[name]:
                got = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
                raise ValueError(f"Masks: expected {name} to be torch.bool {list(shapes[name])}. Got {got}.")
        self.pruned = {name: mask.clone() for name, mask in state.items()}
        self.apply()

    def _mask(self, target: Target) -> Tensor | None:
        """The mask of a matrix, where the matrix is; None before the first pruning."""
        pruned, device = self.pruned.get(target.name), target.stored().device
        if pruned is not None and pruned.device != device:
            pruned = self.pruned[target.name] = pruned.to(device)
        return pruned

    def _after_step(self, *_: Any) -> None:
        self.apply()

    def _gradient_hook(self, target: Target) -> Callable[[Tensor], Tensor | None]:
        def hook(gradient: Tensor) -> Tensor | None:
            pruned = self._mask(target)
            # The gradient of an embedding with sparse=True has no elements to fill.
            return None if pruned is None or gradient.is_sparse else gradient.masked_fill(pruned, 0)

        return hook
