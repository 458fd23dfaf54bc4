"""MPNet: a relative position bias that all layers share, no token types, and results in tuples."""

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.mpnet import modeling_mpnet

from ..nn.encoder import LayerParts
from ..nn.packing import version
from ._attention import additive
from ._fused import FusedEmbeddings, FusedEncoder, FusedLayer


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

    def forward(self, hidden_states, attention_mask=None, position_bias=None, output_attentions=False, **kwargs):
        if not output_attentions:
            y = self.fused(hidden_states, attention_mask, (), kwargs, bias=position_bias)
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
            bias = self.bias(hidden_states)
            y = self.fused(hidden_states, attention_mask, (), kwargs, bias=bias, states=bool(output_hidden_states))
            if y is not None:
                states = (hidden_states, *y.unbind(0)) if output_hidden_states else None
                last = states[-1] if output_hidden_states else y
                if return_dict:
                    return BaseModelOutput(last_hidden_state=last, hidden_states=states)
                return (last, states) if output_hidden_states else (last,)
        mask = additive(attention_mask, hidden_states.dtype)
        return super().forward(hidden_states, mask, output_attentions, output_hidden_states, return_dict, **kwargs)


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


CLASSES = {
    modeling_mpnet.MPNetLayer: MPNetLayer,
    modeling_mpnet.MPNetEncoder: MPNetEncoder,
    modeling_mpnet.MPNetEmbeddings: MPNetEmbeddings,
}
