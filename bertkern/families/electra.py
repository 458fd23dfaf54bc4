"""ELECTRA."""

from transformers.models.electra import modeling_electra

from .bert import BertLikeEmbeddings, BertLikeEncoder, BertLikeLayer


class ElectraLayer(BertLikeLayer, modeling_electra.ElectraLayer):
    """Runs as one operator."""


class ElectraEncoder(BertLikeEncoder, modeling_electra.ElectraEncoder):
    """Runs as one operator."""


class ElectraEmbeddings(BertLikeEmbeddings, modeling_electra.ElectraEmbeddings):
    """Runs as one operator."""


CLASSES = {
    modeling_electra.ElectraLayer: ElectraLayer,
    modeling_electra.ElectraEncoder: ElectraEncoder,
    modeling_electra.ElectraEmbeddings: ElectraEmbeddings,
}
