"""ELECTRA."""

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.electra import modeling_electra

from .bert import BertLikeEmbeddings, BertLikeEncoder, BertLikeLayer, BertLikeModel


class ElectraLayer(BertLikeLayer, modeling_electra.ElectraLayer):
    """Runs as one operator."""


class ElectraEncoder(BertLikeEncoder, modeling_electra.ElectraEncoder):
    """Runs as one operator."""


class ElectraEmbeddings(BertLikeEmbeddings, modeling_electra.ElectraEmbeddings):
    """Runs as one operator."""


class ElectraModel(BertLikeModel, modeling_electra.ElectraModel):
    """Calls its parts one after another; there is no pooler."""

    def result(self, y: Tensor, pooled: Tensor | None) -> BaseModelOutputWithPastAndCrossAttentions:
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=y)


CLASSES = {
    modeling_electra.ElectraLayer: ElectraLayer,
    modeling_electra.ElectraEncoder: ElectraEncoder,
    modeling_electra.ElectraEmbeddings: ElectraEmbeddings,
    modeling_electra.ElectraModel: ElectraModel,
}
