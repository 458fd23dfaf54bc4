"""MPNet: a relative position bias that all layers share, no token types, and results in tuples."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.mpnet import modeling_mpnet

from ..nn.encoder import LayerParts
from ..nn.packing import version
from ._attention import additive
from ._fused import FusedEmbeddings, FusedEncoder, FusedLayer


class MPNetSelfAttention(modeling_mpnet.MPNetSelfAttention):
    """Attention that has lost heads: it takes the bias of those that it kept from the bias of all."""

    def forward(self, hidden_states, attention_mask=None, position_bias=None, output_attentions=False, **kwargs):
        bias = _bias_of(self.kept_heads, position_bias)
        return super().forward(hidden_states, attention_mask, bias, output_attentions, **kwargs)


class MPNetLayer(FusedLayer, modeling_mpnet.MPNetLayer):
    """Runs as one operator."""

    def parts(self) -> LayerParts:
        attention = self.attention.attn
        return LayerParts(
            query=(attention, "q"),
            key=(attention, "k"),
            value=(attention, "v"),
            out=(attention, "o"),
            attention_norm=(self.attention, "LayerNorm"),
            ffn1=(self.intermediate, "dense"),
            activation=(self.intermediate, "intermediate_act_fn"),
            ffn2=(self.output, "dense"),
            output_norm=(self.output, "LayerNorm"),
            scaling=attention.attention_head_size**-0.5,
        )

    @classmethod
    def set_heads(cls, layer, kept, count):
        super().set_heads(layer, kept, count)
        attention = layer.attention.attn
        attention.__class__ = modeling_mpnet.MPNetSelfAttention if kept is None else MPNetSelfAttention

    def forward(self, hidden_states, attention_mask=None, position_bias=None, output_attentions=False, **kwargs):
        if not output_attentions:
            bias = _bias_of(_kept_heads(self), position_bias)
            y = self.fused(hidden_states, attention_mask, (), kwargs, bias=bias)
            if y is not None:
                return (y,)
        mask = additive(attention_mask, hidden_states.dtype)
        return self.unfused().forward(self, hidden_states, mask, position_bias, output_attentions, **kwargs)


class MPNetEncoder(FusedEncoder, modeling_mpnet.MPNetEncoder):
    """Runs as one operator."""

    # The bias of the last length: it depends on nothing else but its table.
    _bias: tuple[tuple[int, int], Tensor, Tensor] | None = None

    def unfuse(self) -> None:
        super().unfuse()
        self.__dict__.pop("_bias", None)

    def stale(self) -> None:
        super().stale()
        self._bias = None

    def train(self, mode: bool = True):
        self._bias = None
        return super().train(mode)

    def bias(self, x: Tensor) -> Tensor:
        """The position bias fp32 [1, heads, L, L], the same for every sequence."""
        table = self.relative_attention_bias.weight
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and table.requires_grad):
            return self.compute_position_bias(x[:1]).float()
        key, known = (x.shape[1], version(table)), self._bias
        if known is None or known[0] != key or known[1] is not table:
            known = self._bias = (key, table, self.compute_position_bias(x[:1]).float())
        return known[2]

    def _run_layers(self, x: Tensor, mask: Tensor | None, options: dict[str, Any], states: bool) -> Tensor | None:
        """The last hidden states [B, L, H], or all [layers, B, L, H], or None where the plain path has to run."""
        bias, kept = self.bias(x), [_kept_heads(layer) for layer in self.layer]
        if all(heads == kept[0] for heads in kept):
            return self.fused(x, mask, (), options, bias=_bias_of(kept[0] if kept else None, bias), states=states)
        # The operator takes one bias for all of its layers; these have lost different heads.
        if not all(isinstance(layer, MPNetLayer) for layer in self.layer):
            return None
        outputs = []
        for layer in self.layer:
            x = layer(x, mask, bias, **options)[0]
            outputs.append(x)
        return torch.stack(outputs) if states else x

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        return_dict: bool = False,
        **kwargs,
    ):
        if not output_attentions and not self.training:
            y = self._run_layers(hidden_states, attention_mask, kwargs, bool(output_hidden_states))
            if y is not None:
                states = (hidden_states, *y.unbind(0)) if output_hidden_states else None
                last = states[-1] if output_hidden_states else y
                if return_dict:
                    return BaseModelOutput(last_hidden_state=last, hidden_states=states)
                return (last, states) if output_hidden_states else (last,)
        mask = additive(attention_mask, hidden_states.dtype)
        return super().forward(hidden_states, mask, output_attentions, output_hidden_states, return_dict, **kwargs)


def _kept_heads(layer: nn.Module) -> tuple[int, ...] | None:
    """Which of its first heads a layer still has; None: all, or it is no such layer any more."""
    # Asked for every layer at every call: past nn.Module's slow attribute access.
    block = layer._modules.get("attention")
    attention = None if block is None else block._modules.get("attn")
    return None if attention is None else attention.__dict__.get("kept_heads")


def _bias_of(kept: tuple[int, ...] | None, bias: Tensor | None) -> Tensor | None:
    """The position bias [1 or B, kept heads, L, L] from that of all heads."""
    return bias if kept is None or bias is None else bias[:, list(kept)]


class MPNetEmbeddings(FusedEmbeddings, modeling_mpnet.MPNetEmbeddings):
    """Runs as one operator."""

    TABLES = ("word_embeddings", "position_embeddings")

    def forward(self, input_ids=None, position_ids=None, inputs_embeds=None, **kwargs) -> Tensor:
        if input_ids is not None:
            positions = position_ids
            if positions is None:
                positions = modeling_mpnet.create_position_ids_from_input_ids(input_ids, self.padding_idx)
            y = self.embed(input_ids, positions)
            if y is not None:
                return y
        return super().forward(input_ids, position_ids, inputs_embeds, **kwargs)


# Its models do not hand the keyword on to their encoder.
DROPS_HEAD_MASK = True

CLASSES = {
    modeling_mpnet.MPNetLayer: MPNetLayer,
    modeling_mpnet.MPNetEncoder: MPNetEncoder,
    modeling_mpnet.MPNetEmbeddings: MPNetEmbeddings,
}
