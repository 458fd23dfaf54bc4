"""BERT."""

from torch import Tensor
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    BaseModelOutputWithPoolingAndCrossAttentions,
)
from transformers.models.bert import modeling_bert

from ..nn.encoder import LayerParts, Unfit
from ._fused import ZERO, FusedEmbeddings, FusedEncoder, FusedLayer
from ._head_masks import for_layers
from ._model import FusedModel, FusedPooler


class BertLikeLayer(FusedLayer):
    """Where BERT and its descendants keep the parts of a layer."""

    def parts(self) -> LayerParts:
        if self.is_decoder:
            raise Unfit("a decoder")
        attention, block = self.attention.self, self.attention.output
        return LayerParts(
            query=(attention, "query"),
            key=(attention, "key"),
            value=(attention, "value"),
            out=(block, "dense"),
            attention_norm=(block, "LayerNorm"),
            ffn1=(self.intermediate, "dense"),
            activation=(self.intermediate, "intermediate_act_fn"),
            ffn2=(self.output, "dense"),
            output_norm=(self.output, "LayerNorm"),
            scaling=attention.scaling,
        )


class BertLikeEncoder(FusedEncoder):
    """The call that BERT and its descendants make of their encoder."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args, **kwargs):
        kwargs = for_layers(self, kwargs) if "head_mask" in kwargs else kwargs
        y = self.fused(hidden_states, attention_mask, args, kwargs)
        if y is None:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=y)


class BertLikeEmbeddings(FusedEmbeddings):
    """Word, token type and position rows, normalised."""

    def positions(self, input_ids: Tensor, offset: int) -> Tensor:
        """Position ids when none are given."""
        return self.position_ids[:, offset : offset + input_ids.shape[1]]

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *offset: int,
        **named_offset: int,
    ) -> Tensor:
        # How many tokens a cache holds: past_key_values_length before transformers 5.24, cache_length from there on.
        (cached,) = (*offset, *named_offset.values()) or (0,)
        if input_ids is not None:
            positions = self.positions(input_ids, cached) if position_ids is None else position_ids
            y = self.embed(input_ids, ZERO if token_type_ids is None else token_type_ids, positions)
            if y is not None:
                return y
        return super().forward(input_ids, token_type_ids, position_ids, inputs_embeds, cached)


class BertLikeModel(FusedModel):
    """The call of BERT and its descendants."""

    def direct(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        *others,
        **options,
    ):
        if not self.takes(input_ids, attention_mask, (inputs_embeds, *others), options):
            return None
        ids = {"token_type_ids": token_type_ids, "position_ids": position_ids}
        made = self.parts_of(self._modules["encoder"], input_ids, attention_mask, ids)
        return None if made is None else self.result(*made)

    def result(self, y: Tensor, pooled: Tensor | None):
        """What the model returns, from its last hidden states and the pooled ones."""
        return BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=y, pooler_output=pooled)


class BertPooler(FusedPooler, modeling_bert.BertPooler):
    """Runs as one operator."""


class BertModel(BertLikeModel, modeling_bert.BertModel):
    """Calls its parts one after another."""


class BertLayer(BertLikeLayer, modeling_bert.BertLayer):
    """Runs as one operator."""


class BertEncoder(BertLikeEncoder, modeling_bert.BertEncoder):
    """Runs as one operator."""


class BertEmbeddings(BertLikeEmbeddings, modeling_bert.BertEmbeddings):
    """Runs as one operator."""


CLASSES = {
    modeling_bert.BertLayer: BertLayer,
    modeling_bert.BertEncoder: BertEncoder,
    modeling_bert.BertEmbeddings: BertEmbeddings,
    modeling_bert.BertPooler: BertPooler,
    modeling_bert.BertModel: BertModel,
}
