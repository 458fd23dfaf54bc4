"""DistilBERT: no token types, and the encoder is called `transformer`."""

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.distilbert import modeling_distilbert

from ..nn.encoder import LayerParts
from ._fused import FusedEmbeddings, FusedEncoder, FusedLayer
from ._head_masks import for_layers
from ._model import FusedModel


class TransformerBlock(FusedLayer, modeling_distilbert.TransformerBlock):
    """Runs as one operator."""

    def parts(self) -> LayerParts:
        return LayerParts(
            query=(self.attention, "q_lin"),
            key=(self.attention, "k_lin"),
            value=(self.attention, "v_lin"),
            out=(self.attention, "out_lin"),
            attention_norm=(self, "sa_layer_norm"),
            ffn1=(self.ffn, "lin1"),
            activation=(self.ffn, "activation"),
            ffn2=(self.ffn, "lin2"),
            output_norm=(self, "output_layer_norm"),
            scaling=self.attention.scaling,
        )


class Transformer(FusedEncoder, modeling_distilbert.Transformer):
    """Runs as one operator."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs) -> BaseModelOutput:
        kwargs = for_layers(self, kwargs) if "head_mask" in kwargs else kwargs
        y = self.fused(hidden_states, attention_mask, (), kwargs)
        if y is None:
            return super().forward(hidden_states, attention_mask, **kwargs)
        return BaseModelOutput(last_hidden_state=y)


class Embeddings(FusedEmbeddings, modeling_distilbert.Embeddings):
    """Runs as one operator."""

    TABLES = ("word_embeddings", "position_embeddings")

    def forward(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        if input_ids is not None:
            y = self.embed(
                input_ids, self.position_ids[:, : input_ids.shape[1]] if position_ids is None else position_ids
            )
            if y is not None:
                return y
        return super().forward(input_ids, inputs_embeds, position_ids)


class DistilBertModel(FusedModel, modeling_distilbert.DistilBertModel):
    """Calls its parts one after another."""

    def direct(self, input_ids=None, attention_mask=None, inputs_embeds=None, position_ids=None, *others, **options):
        if not self.takes(input_ids, attention_mask, (inputs_embeds, *others), options):
            return None
        ids = {"position_ids": position_ids}
        made = self.parts_of(self._modules["transformer"], input_ids, attention_mask, ids)
        return None if made is None else BaseModelOutput(last_hidden_state=made[0])


CLASSES = {
    modeling_distilbert.TransformerBlock: TransformerBlock,
    modeling_distilbert.Transformer: Transformer,
    modeling_distilbert.Embeddings: Embeddings,
    modeling_distilbert.DistilBertModel: DistilBertModel,
}
