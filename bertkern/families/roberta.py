"""RoBERTa."""

from torch import Tensor
from transformers.models.roberta import modeling_roberta

from ._model import FusedPooler
from .bert import BertLikeEmbeddings, BertLikeEncoder, BertLikeLayer, BertLikeModel


class RobertaLayer(BertLikeLayer, modeling_roberta.RobertaLayer):
    """Runs as one operator."""


class RobertaEncoder(BertLikeEncoder, modeling_roberta.RobertaEncoder):
    """Runs as one operator."""


class RobertaLikeEmbeddings(BertLikeEmbeddings):
    """Positions count from padding_idx + 1; padding stays at padding_idx."""

    def positions(self, input_ids: Tensor, offset: int) -> Tensor:
        return self.create_position_ids_from_input_ids(input_ids, self.padding_idx, offset)


class RobertaEmbeddings(RobertaLikeEmbeddings, modeling_roberta.RobertaEmbeddings):
    """Runs as one operator."""


class RobertaPooler(FusedPooler, modeling_roberta.RobertaPooler):
    """Runs as one operator."""


class RobertaModel(BertLikeModel, modeling_roberta.RobertaModel):
    """Calls its parts one after another."""


CLASSES = {
    modeling_roberta.RobertaLayer: RobertaLayer,
    modeling_roberta.RobertaEncoder: RobertaEncoder,
    modeling_roberta.RobertaEmbeddings: RobertaEmbeddings,
    modeling_roberta.RobertaPooler: RobertaPooler,
    modeling_roberta.RobertaModel: RobertaModel,
}
