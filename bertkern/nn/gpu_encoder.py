"""The encoder of a model on a GPU: what `bertkern.nn.encoder` is on a CPU, over the package `bertkern.gpu`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..gpu.encoder import Layer, encode
from ..gpu.packing import in_place, packing_of
from ..gpu.rows import Norm
from ..ops.rowwise_triton import embed_cuda
from .encoder import LayerParts, Stack, Unfit, of_keys
from .linear import FLOATS
from .packing import Epoch, needs_grad


class GpuStack(Stack):
    """The weights of some layers as `bertkern.gpu.encoder` takes them, and what they were made from.

    Attributes:
        packs: the layers.
    """

    def _take(self, parts: Sequence[LayerParts], linears: Sequence[Any]) -> None:
        self._linears = list(linears)
        self._operands = [leaf.operand() for leaf in linears]
        # Read before the tensors: a change by another thread from here on is then noticed.
        self._epoch = Epoch.now
        of = {id(leaf): operand for leaf, operand in zip(linears, self._operands, strict=True)}
        made: dict[nn.Module, Layer] = {}
        for layer, part, heads in zip(self.layers, parts, self.heads, strict=True):
            if layer not in made:
                norms = [getattr(*slot) for slot in part.norms()]
                norms = [Norm(norm.weight.detach(), norm.bias.detach(), norm.eps) for norm in norms]
                made[layer] = Layer.of([of[id(getattr(*slot))] for slot in part.linears()], norms, heads)
        self.packs = [made[layer] for layer in self.layers]
        self.device = self.packs[0].output_norm.weight.device
        tensors = [tensor for leaf in linears for tensor in leaf.weights()]
        if any(tensor.device != self.device for tensor in tensors):
            raise Unfit("layers on several devices")

    def runs_as(self) -> str:
        """For reports: how the linear layers run, and that the rest is the GPU's operators."""
        kinds = {linear.name for pack in self.packs for linear in (*pack.projections, pack.out, pack.ffn1, pack.ffn2)}
        return f"operators on {self.device.type}, linear layers {' and '.join(sorted(kinds))}"

    def _unchanged(self) -> bool:
        epoch = Epoch.now
        if self._epoch != epoch:
            # Something was exchanged somewhere. Where it was elsewhere, all that was made of these still holds.
            if any(leaf.operand() is not operand for leaf, operand in zip(self._linears, self._operands, strict=True)):
                return False
            self._epoch = epoch
        return super()._unchanged()

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
        """As `Stack.run`, but a position_bias says all of which keys are hidden, and mask then what comes back.

        Raises:
            Unfit: gradients are recorded.
        """
        if needs_grad(x, position_bias, head_mask, *self._tensors):
            raise Unfit("gradients are recorded")
        if position_bias is not None:
            if packed:
                raise Unfit("packed hidden states beside a bias")
            packing = in_place(x, mask, keep_padding=keep_padding)
        else:
            packing = packing_of(mask, x, keep_padding=keep_padding, empty_attends=empty_attends, tokens_alone=packed)
        with torch.no_grad():
            states = encode(
                self.packs,
                self.activation,
                x,
                packing,
                bias=position_bias,
                head_mask=head_mask,
                exact_attention=exact_attention,
                every=all_hidden_states,
            )
            if packed:
                # Whoever asks for them without padding waits for their number.
                count = states[-1].shape[0] if packing.live is None else int(packing.live)
                states = [rows[:count] for rows in states]
            else:
                states = [packing.pad(rows) for rows in states]
        return torch.stack(states) if all_hidden_states else states[-1]


def unusable(x: Tensor) -> str | None:
    """Why the GPU's operators cannot take `x`, if they cannot."""
    if x.dtype not in FLOATS:
        return "another dtype"
    # Autocast wants what is fp32 computed in fewer bits.
    if torch.is_autocast_enabled(x.device.type) and x.dtype == torch.float32:
        return "autocast"
    return None


def asked_mask(
    mask: Tensor | None, bias: Tensor | None, x: Tensor, empty_attends: bool
) -> tuple[Tensor | None, Tensor | None, bool]:
    """The [B, L] mask of keys that `mask` amounts to, what is added to scores, and whether a sequence without keys
    attends evenly to all; as `key_mask`, but the data of a mask is never looked at.

    A mask [B or 1, 1, L or 1, L] is therefore added to the scores, whatever it says, but for a bool one of one row a
    sequence. So is one [B, L] where there is a bias: its rows keep their places.

    Args:
        bias: [1 or B, heads, L, L] to be added, too.

    Raises:
        Unfit: a mask of another shape or dtype.
    """
    batch, length = x.shape[:2]
    if mask is None:
        return None, bias, False
    if mask.device != x.device:
        raise Unfit("a mask on another device")
    if of_keys(mask, batch):
        mask, empty_attends = mask[:, 0, 0], False
    if mask.dim() == 2:
        if mask.dtype != torch.bool or mask.shape != (batch, length):
            raise Unfit("a mask of another shape or dtype")
        return mask, None if bias is None else _hiding(bias, mask, empty_attends), empty_attends
    fits = mask.dim() == 4 and mask.shape[0] in (1, batch) and mask.shape[1] == 1 and mask.shape[3] == length
    if not fits or mask.shape[2] not in (1, length) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise Unfit("a mask of another shape or dtype")
    if mask.dtype == torch.bool:
        added = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -torch.inf)
        seen = mask
    else:
        added, seen = mask.float(), mask > torch.finfo(mask.dtype).min
    added = added.expand(-1, -1, length, -1)
    # What no query sees comes back as zeros.
    keys = seen.any(2).expand(batch, 1, length)[:, 0]
    return keys, added if bias is None else bias.float() + added, False


def embed(ids: Sequence[Tensor], tables: Sequence[Tensor], scales: Sequence[Tensor], norm: nn.LayerNorm) -> Tensor:
    """LayerNorm of the sum of the tables' rows, [B, L, H] in the norm's dtype.

    Raises:
        Unfit: gradients are recorded.
    """
    weight, bias = norm._parameters["weight"], norm._parameters["bias"]
    if needs_grad(*tables, weight, bias):
        raise Unfit("gradients are recorded")
    if torch.is_autocast_enabled(weight.device.type) and weight.dtype == torch.float32:
        raise Unfit("autocast")
    return embed_cuda(ids, tables, scales, weight, bias, norm.eps, weight.dtype)


def constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[value] on `device`, made there once."""
    if device.type == "cuda" and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing():
        # Memory of the graph's, which is not filled before it runs, and may go with it.
        return torch.full((1,), value, dtype=dtype, device=device)
    return _kept(value, dtype, device)


@functools.lru_cache(maxsize=64)
def _kept(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((1,), value, dtype=dtype, device=device)


def _hiding(bias: Tensor, mask: Tensor, empty_attends: bool) -> Tensor:
    """The bias [1 or B, heads, L, L], and keys that a mask [B, L] hides."""
    # Beside the lowest value all scores of a row are equal; -inf everywhere gives zeros.
    lowest = torch.finfo(torch.float32).min if empty_attends else -torch.inf
    hidden = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, lowest)
    return bias.float() + hidden[:, None, None]
