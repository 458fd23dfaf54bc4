"""ALBERT: a few layers run again and again, and narrow embeddings are widened before them."""

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.albert import modeling_albert

from ..nn.encoder import LayerParts
from ._fused import ZERO, FusedEmbeddings, FusedEncoder, FusedLayer


class AlbertLayer(FusedLayer, modeling_albert.AlbertLayer):
    """Runs as one operator."""

    def parts(self) -> LayerParts:
        attention = self.attention
        return LayerParts(
            query=(attention, "query"),
            key=(attention, "key"),
            value=(attention, "value"),
            out=(attention, "dense"),
            attention_norm=(attention, "LayerNorm"),
            ffn1=(self, "ffn"),
            activation=(self, "activation"),
            ffn2=(self, "ffn_output"),
            output_norm=(self, "full_layer_layer_norm"),
            scaling=attention.scaling,
        )


class AlbertTransformer(FusedEncoder, modeling_albert.AlbertTransformer):
    """Every run of every layer as one operator; the operator takes a layer's packed weights as often as it runs."""

    def runs(self) -> list[nn.Module]:
        """The group of layers of each run."""
        count, groups = self.config.num_hidden_layers, self.albert_layer_groups
        # transformers' own division.
        return [groups[int(run / (count / self.config.num_hidden_groups))] for run in range(count)]

    def layers(self) -> list[nn.Module]:
        return [layer for group in self.runs() for layer in group.albert_layers]

    def watched(self) -> list[nn.Module]:
        return list(self.albert_layer_groups.modules())

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs) -> BaseModelOutput:
        x = self.embedding_hidden_mapping_in(hidden_states)
        y = self.fused(x, attention_mask, (), kwargs)
        if y is None:
            for group in self.runs():
                x = group(x, attention_mask, **kwargs)
            y = x
        return BaseModelOutput(last_hidden_state=y)


class AlbertEmbeddings(FusedEmbeddings, modeling_albert.AlbertEmbeddings):
    """Runs as one operator."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        if input_ids is not None:
            positions = self.position_ids[:, : input_ids.shape[1]] if position_ids is None else position_ids
            y = self.embed(input_ids, ZERO if token_type_ids is None else token_type_ids, positions)
            if y is not None:
                return y
        return super().forward(input_ids, token_type_ids, position_ids, inputs_embeds)


CLASSES = {
    modeling_albert.AlbertLayer: AlbertLayer,
    modeling_albert.AlbertTransformer: AlbertTransformer,
    modeling_albert.AlbertEmbeddings: AlbertEmbeddings,
}
