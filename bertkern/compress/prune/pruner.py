"""Pruning little by little, in any training loop."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from .config import PruneConfig
from .masks import Masks
from .pruning import grown
from .schedule import PruneSchedule
from .targets import find_targets

VERSION = 1


class Pruner:
    """Prunes a model in place while it trains, as a schedule says; what is pruned once stays zero.

    A mask grows by the smallest of the weights as they then are. Zeros are written into the weights themselves, so
    whatever is saved at any step is the pruned model; a pruned weight is therefore the smallest at the next pruning,
    too, and masks never shrink. (TensorFlow's model_pruning, which Gordon et al. used, keeps the last value of a
    masked weight aside and ranks by it; the gradient is zero in both, so there a weight returns only where others
    shrink below its last value.) With criterion "random" the order of a matrix's weights is fixed.

    Gradients of pruned weights are zero, so they neither enter momentum nor the norm that gradients are clipped by, and
    `step` writes the zeros again: any optimizer, weight decay and gradient accumulation keep them.

    Args:
        model: as for `prune_`. Not the one inside a wrapper that changes parameters, such as FSDP.
        config: what is pruned, how far and in which shape. The members of an n:m group go one by one.
        schedule: when.
        step: how many optimizer steps the model has been trained for by this schedule. The masks are then those of its
            last pruning, found in the model's zeros; `load_state_dict` brings the very masks.

    Attributes:
        masks: the `Masks`.
        steps: how many optimizer steps are done.

    Raises:
        TypeError, ValueError: as `prune_` does; `schedule.initial` above the config's sparsity.

    Example::

        pruner = bk.Pruner(model, bk.BlockPruneConfig(sparsity=0.8), bk.PruneSchedule(begin=100, end=2000))
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            pruner.step()
            optimizer.zero_grad()
        pruner.remove()

    Source: arXiv 1710.01878 (gradual pruning), as in arXiv 2002.08307.
    """

    def __init__(self, model: nn.Module, config: PruneConfig, schedule: PruneSchedule, *, step: int = 0) -> None:
        if not isinstance(schedule, PruneSchedule):
            raise TypeError(f"Pruner: expected schedule to be a PruneSchedule. Got {type(schedule).__name__}.")
        if type(step) is not int or step < 0:
            raise ValueError(f"Pruner: expected step to be a whole number of at least 0. Got {step!r}.")
        self._targets = find_targets(model, config)
        if schedule.begin < schedule.end and schedule.initial > config.sparsity:
            raise ValueError(
                f"Pruner: expected schedule.initial to be at most the config's sparsity {config.sparsity}. "
                f"Got {schedule.initial}."
            )
        self.config, self.schedule, self.steps = config, schedule, step
        self.masks = Masks(self._targets)
        last = schedule.last_pruning(step)
        if last is not None:
            self._grow(last)
            self.masks.apply()
        self.masks.hold()

    @property
    def sparsity(self) -> float:
        """What the masks are pruned to now; overrides apart."""
        last = self.schedule.last_pruning(self.steps)
        return 0.0 if last is None else self.schedule.sparsity(last, self.config.sparsity)

    @property
    def done(self) -> bool:
        """Whether the final sparsity is reached."""
        return self.steps >= self.schedule.end

    def step(self) -> bool:
        """To be called once after each step of the optimizer.

        Returns:
            Whether masks grew.

        Raises:
            ValueError: a weight is NaN where masks were to grow.
        """
        self.steps += 1
        grows = self.schedule.prunes_at(self.steps)
        if grows:
            self._grow(self.steps)
        self.masks.apply()
        return grows

    def remove(self) -> None:
        """Ends the pruning: the weights stay as they are, and nothing holds them any longer."""
        self.masks.remove()

    def state_dict(self) -> dict[str, Any]:
        """The number of steps and the masks, with the config and the schedule that led to them."""
        return {
            "version": VERSION,
            "config": self.config.to_dict(),
            "schedule": self.schedule.to_dict(),
            "steps": self.steps,
            "pruned": self.masks.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken; the weights are expected to be loaded.

        Raises:
            ValueError: another version, config or schedule, or masks of another model.
        """
        if not isinstance(state, Mapping) or state.get("version") != VERSION:
            got = state.get("version") if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(f"Pruner: expected a state of version {VERSION}. Got {got!r}.")
        for name in ("config", "schedule"):
            own = getattr(self, name).to_dict()
            if state.get(name) != own:
                raise ValueError(f"Pruner: expected a state of the {name} {own}. Got {state.get(name)}.")
        if type(state.get("steps")) is not int or state["steps"] < 0 or not isinstance(state.get("pruned"), Mapping):
            raise ValueError("Pruner: expected a state with steps and masks. Got one without.")
        self.masks.load_state_dict(state["pruned"])
        self.steps = state["steps"]

    def _grow(self, step: int) -> None:
        self.masks.pruned = grown(
            self._targets, self.config, self.masks.pruned, lambda final: self.schedule.sparsity(step, final)
        )
