"""XLM-RoBERTa."""

from transformers.models.xlm_roberta import modeling_xlm_roberta

from .bert import BertLikeEncoder, BertLikeLayer
from .roberta import RobertaLikeEmbeddings


class XLMRobertaLayer(BertLikeLayer, modeling_xlm_roberta.XLMRobertaLayer):
    """Runs as one operator."""


class XLMRobertaEncoder(BertLikeEncoder, modeling_xlm_roberta.XLMRobertaEncoder):
    """Runs as one operator."""


class XLMRobertaEmbeddings(RobertaLikeEmbeddings, modeling_xlm_roberta.XLMRobertaEmbeddings):
    """Runs as one operator."""


CLASSES = {
    modeling_xlm_roberta.XLMRobertaLayer: XLMRobertaLayer,
    modeling_xlm_roberta.XLMRobertaEncoder: XLMRobertaEncoder,
    modeling_xlm_roberta.XLMRobertaEmbeddings: XLMRobertaEmbeddings,
}
