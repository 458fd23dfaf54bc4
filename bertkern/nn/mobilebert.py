"""A stack of MobileBERT layers as one operator call."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .encoder import LEAVES, LayerParts, Stack, Unfit, _activation, _common, _norm_eps
from .linear import PackedLinear
from .norms import NoNorm
from .packing import Epoch, lean, needs_grad

_encoder = lean(torch.ops.bertkern.mobilebert_encoder.default)
_encoder_from = torch.ops.bertkern.mobilebert_encoder_from.default
Slot = tuple[nn.Module, str]
# What bottlenecks there are before the attention: none; one, and queries, keys and values of the whole width; one, and
# another that queries and keys share; one for all.
NONE, INPUT, SHARED, ALL = range(4)
_NOTHING = torch.empty(0, device="cpu")


@dataclass(frozen=True)
class FeedForward:
    """One feed-forward network: norm(x + down(activation(up(x))))."""

    up: Slot
    activation: Slot
    down: Slot
    norm: Slot


@dataclass(frozen=True)
class MobileParts(LayerParts):
    """Where a layer keeps its parts; `ffn1` to `output_norm` of LayerParts are those of its last feed-forward.

    Attributes:
        bottleneck: NONE, INPUT, SHARED or ALL.
        narrowing: the linear of each bottleneck before the attention, and its norm.
        stacked: the feed-forwards before the last.
        widening: the linear after the last feed-forward and its norm; none without bottlenecks.
    """

    bottleneck: int
    narrowing: tuple[tuple[Slot, Slot], ...]
    stacked: tuple[FeedForward, ...]
    widening: tuple[Slot, Slot] | None

    def feed_forwards(self) -> tuple[FeedForward, ...]:
        """All of them, in order."""
        return (*self.stacked, FeedForward(self.ffn1, self.activation, self.ffn2, self.output_norm))

    def every_linear(self) -> list[Slot]:
        """In the order of mobilebert_encoder."""
        first = [linear for linear, _ in self.narrowing]
        ffns = [slot for ffn in self.feed_forwards() for slot in (ffn.up, ffn.down)]
        last = [self.widening[0]] if self.widening else []
        return [*first, self.query, self.key, self.value, self.out, *ffns, *last]

    def every_norm(self) -> list[Slot]:
        """In the order of mobilebert_encoder."""
        first = [norm for _, norm in self.narrowing]
        last = [self.widening[1]] if self.widening else []
        return [*first, self.attention_norm, *(ffn.norm for ffn in self.feed_forwards()), *last]


class MobileStack(Stack):
    """The arguments of mobilebert_encoder for some layers, and what they were made from.

    Raises:
        Unfit: the layers are not what the operator computes.
    """

    def __init__(self, layers: Sequence[nn.Module], parts: Sequence[MobileParts], watched: Sequence[nn.Module]) -> None:
        if not layers:
            raise Unfit("no layers")
        self.layers = list(layers)
        linears = [getattr(*slot) for part in parts for slot in part.every_linear()]
        norms = [getattr(*slot) for part in parts for slot in part.every_norm()]
        activations = [ffn.activation for part in parts for ffn in part.feed_forwards()]
        slots = [slot for part in parts for slot in (*part.every_linear(), *part.every_norm())] + activations
        leaves = [getattr(*slot) for slot in slots]
        for leaf in linears:
            if type(leaf) not in LEAVES or not leaf.packable():
                raise Unfit(f"a projection is {type(leaf).__name__}")
        self.bottleneck = _common("bottlenecks", [part.bottleneck for part in parts])
        _common("the number of feed-forwards", [len(part.stacked) for part in parts])
        eps = _common("norms", [[norm_eps(getattr(*slot)) for slot in part.every_norm()] for part in parts])
        if (None in eps) and any(value is not None for value in eps):
            raise Unfit("norms of two kinds")
        self.eps = None if None in eps else torch.tensor(eps, dtype=torch.float32)
        self.activation = _common("activation", [_activation(getattr(*slot)) for slot in activations])
        self.heads = [_heads_of(part) for part in parts]
        self.attentions, self.outs = [part.query[0] for part in parts], [getattr(*part.out) for part in parts]
        for leaf in linears:
            leaf.packed()
        # Read before the tensors: a change by another thread from here on is then noticed.
        self._epoch = Epoch.now
        self.linears = [leaf.packed() for leaf in linears]
        each = len(norms) // len(parts)
        with torch.no_grad():
            flat = [tensor.detach().float() for norm in norms for tensor in (norm.weight, norm.bias)]
            rows = [torch.cat(flat[2 * each * i : 2 * each * (i + 1)]) for i in range(len(parts))]
        _common("width", [len(row) for row in rows])
        # [layers, features]: weight and bias of each norm of the layer.
        self.norms = torch.stack(rows)
        # In the order of mobilebert_encoder_from: weight and bias of the layer's linears, then of its norms.
        self._made_from = list(_made_from(linears, norms, len(parts)))
        self._follow(slots, leaves, linears, norms, watched)

    def run(
        self,
        x: Tensor,
        mask: Tensor | None,
        position_bias: Tensor | None = None,
        keep_padding: bool = False,
        all_hidden_states: bool = False,
        empty_attends: bool = False,
        exact_attention: bool = False,
        head_mask: Tensor | None = None,
        packed: bool = False,
    ) -> Tensor:
        """The operator, with the arguments of `Stack.run`."""
        if position_bias is not None:
            raise Unfit("a position bias")
        flags = (keep_padding, all_hidden_states, empty_attends, exact_attention, head_mask, packed)
        options = (self.heads, self.bottleneck, self.activation, *flags)
        if needs_grad(x, head_mask, *self._made_from):
            return _encoder_from(x, mask, self.linears, self.norms, self.eps, self._made_from, *options)
        return _encoder(x, mask, self.linears, self.norms, self.eps, *options)


def norm_eps(norm: nn.Module) -> float | None:
    """The eps of a LayerNorm, None of a NoNorm; raises Unfit for any other norm."""
    if type(norm) is NoNorm or (type(norm).__name__ == "NoNorm" and type(norm).__module__.startswith("transformers.")):
        if norm.weight.dim() != 1 or norm.bias.shape != norm.weight.shape:
            raise Unfit("a norm is NoNorm without weight and bias of one dimension")
        return None
    return _norm_eps(norm)


def _made_from(linears: list[nn.Module], norms: list[nn.Module], layers: int) -> Iterator[Tensor]:
    """Weight and bias of a layer's linears, `_NOTHING` where they have no gradient, and of its norms."""
    for i in range(layers):
        for leaf in linears[i * len(linears) // layers : (i + 1) * len(linears) // layers]:
            for tensor in (leaf.weight, leaf.bias) if isinstance(leaf, PackedLinear) else (None, None):
                yield _NOTHING if tensor is None else tensor
        for norm in norms[i * len(norms) // layers : (i + 1) * len(norms) // layers]:
            yield from (norm.weight, norm.bias)


def _heads_of(part: MobileParts) -> int:
    """The number of heads, by the widths as they are: pruned layers have fewer than their config says."""
    query, key, value, out = (getattr(*slot) for slot in part.linears()[:4])
    wide, size, width = query.out_features, round(part.scaling**-2), out.out_features
    if abs(part.scaling * size**0.5 - 1) > 1e-6:
        raise Unfit("scores are not scaled by the root of the head size")
    narrowing = [getattr(*linear) for linear, _ in part.narrowing]
    widening = getattr(*part.widening[0]) if part.widening else None
    hidden = width if widening is None else widening.out_features
    ffns = [(getattr(*ffn.up), getattr(*ffn.down)) for ffn in part.feed_forwards()]
    from_all = hidden if part.bottleneck in (NONE, INPUT) else width
    fits = (
        wide > 0
        and wide % size == 0
        and key.out_features == value.out_features == out.in_features == wide
        and query.in_features == key.in_features == from_all
        and value.in_features == (width if part.bottleneck == ALL else hidden)
        and all((linear.in_features, linear.out_features) == (hidden, width) for linear in narrowing)
        and len(narrowing) == (0, 1, 2, 1)[part.bottleneck]
        and all(up.in_features == down.out_features == width for up, down in ffns)
        and all(up.out_features == down.in_features for up, down in ffns)
        and (widening is None or widening.in_features == width)
        and (widening is None) == (part.bottleneck == NONE)
    )
    norms = [width] * (len(narrowing) + 1 + len(ffns)) + [hidden] * (widening is not None)
    shapes = [len(getattr(*slot).weight) for slot in part.every_norm()]
    if not fits or shapes != norms:
        raise Unfit("projections whose shapes do not fit")
    return wide // size
