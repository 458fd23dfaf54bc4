"""XLM-RoBERTa."""

from transformers.models.xlm_roberta import modeling_xlm_roberta

from ._model import FusedPooler
from .bert import BertLikeEncoder, BertLikeLayer, BertLikeModel
from .roberta import RobertaLikeEmbeddings


class XLMRobertaLayer(BertLikeLayer, modeling_xlm_roberta.XLMRobertaLayer):
    """Runs as one operator."""


class XLMRobertaEncoder(BertLikeEncoder, modeling_xlm_roberta.XLMRobertaEncoder):
    """Runs as one operator."""


class XLMRobertaEmbeddings(RobertaLikeEmbeddings, modeling_xlm_roberta.XLMRobertaEmbeddings):
    """Runs as one operator."""


class XLMRobertaPooler(FusedPooler, modeling_xlm_roberta.XLMRobertaPooler):
    """Runs as one operator."""


class XLMRobertaModel(BertLikeModel, modeling_xlm_roberta.XLMRobertaModel):
    """Calls its parts one after another."""


CLASSES = {
    modeling_xlm_roberta.XLMRobertaLayer: XLMRobertaLayer,
    modeling_xlm_roberta.XLMRobertaEncoder: XLMRobertaEncoder,
    modeling_xlm_roberta.XLMRobertaEmbeddings: XLMRobertaEmbeddings,
    modeling_xlm_roberta.XLMRobertaPooler: XLMRobertaPooler,
    modeling_xlm_roberta.XLMRobertaModel: XLMRobertaModel,
}
