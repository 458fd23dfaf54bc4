"""The wish for packed hidden states on its way to a fused encoder: models have no argument for it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Wish:
    """That one encoder hands its hidden states over without padding.

    Attributes:
        hidden: [tokens, H], when the encoder has granted it; None where it takes the plain path.
    """

    def __init__(self, encoder: nn.Module) -> None:
        self.encoder = encoder
        self.hidden: Tensor | None = None


class _State(threading.local):
    wish: Wish | None = None


_state = _State()


@contextmanager
def wished(encoder: nn.Module) -> Iterator[Wish]:
    """Within it, in this thread, `encoder` grants the wish, and returns zeros that take no memory in its place."""
    before, _state.wish = _state.wish, Wish(encoder)
    try:
        yield _state.wish
    finally:
        _state.wish = before


def wish_of(encoder: nn.Module) -> Wish | None:
    """The wish that `encoder` is to grant now."""
    # A thread-local cannot be traced.
    if torch.compiler.is_compiling() or _state.wish is None or _state.wish.encoder is not encoder:
        return None
    return _state.wish
