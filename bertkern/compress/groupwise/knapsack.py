"""Choosing one option for every item so that the cost is least and the size within a budget, exactly."""

from collections.abc import Sequence
from typing import NamedTuple


class Option(NamedTuple):
    """One way for an item."""

    size: int
    cost: float


class _State(NamedTuple):
    size: int
    cost: float
    picked: tuple[int, ...]


def cheapest(items: Sequence[Sequence[Option]], budget: int) -> tuple[int, ...] | None:
    """Of every item the number of its option; None where even the smallest do not fit.

    Item by item, the choices so far are kept that no other beats in both size and cost: all that the best one can begin
    with. Of equally cheap ones the smallest counts, then the one whose first options come first.

    Args:
        items: options of each.
        budget: what the sizes may sum up to.

    Example:
        >>> cheapest([[Option(1, 5.0), Option(2, 1.0)], [Option(1, 3.0), Option(2, 2.0)]], 3)
        (1, 0)

    Source: G. Nemhauser, Z. Ullmann 1969.
    """
    # The least that the items from here on take.
    after = [0]
    for options in reversed(items):
        after.append(after[-1] + min(option.size for option in options))
    after = after[-2::-1]
    states = [_State(0, 0.0, ())]
    for options, rest in zip(items, after, strict=True):
        made = [
            _State(state.size + option.size, state.cost + option.cost, (*state.picked, i))
            for state in states
            for i, option in enumerate(options)
            if state.size + option.size + rest <= budget
        ]
        states = []
        for state in sorted(made):
            if not states or state.cost < states[-1].cost:
                states.append(state)
    return states[-1].picked if states else None
