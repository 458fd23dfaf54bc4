"""MobileBERT: narrow layers between bottlenecks, several feed-forwards in each, and rows of three words' embeddings."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.mobilebert import modeling_mobilebert

from .. import gpu
from ..formats.groupwise import read_rows
from ..nn.encoder import LEAVES, Unfit
from ..nn.int8 import Int8Linear
from ..nn.linear import FLOATS, PackedLinear
from ..nn.mobilebert import ALL, INPUT, NONE, SHARED, FeedForward, MobileParts, MobileStack, norm_eps
from ..nn.packing import PackedCache, lean, needs_grad, plain
from ..nn.sparse import DENSE
from ._fused import ZERO, Fused, FusedEmbeddings, FusedEncoder, FusedLayer, follow_loading, unfollow_loading
from ._head_masks import for_layers

_embed = lean(torch.ops.bertkern.trigram_embed.default)
_embed_from = torch.ops.bertkern.trigram_embed_from.default
_linear = lean(torch.ops.bertkern.linear.default)
_linear_from = torch.ops.bertkern.linear_from.default
_NOTHING = torch.empty(0, device="cpu")


class MobileBertLayer(FusedLayer, modeling_mobilebert.MobileBertLayer):
    """Runs as one operator."""

    STACK, GPU_STACK = MobileStack, None

    def parts(self) -> MobileParts:
        attention, block = self.attention.self, self.attention.output
        bottleneck, narrowing, widening = NONE, [], None
        if self.use_bottleneck:
            before = self.bottleneck
            bottleneck, used = INPUT, [before.input]
            if before.use_bottleneck_attention:
                bottleneck = ALL
            elif before.key_query_shared_bottleneck:
                bottleneck, used = SHARED, [before.input, before.attention]
            narrowing = [((module, "dense"), (module, "LayerNorm")) for module in used]
            after = self.output.bottleneck
            widening = ((after, "dense"), (after, "LayerNorm"))
        stacked = self.ffn if self.num_feedforward_networks > 1 else ()
        return MobileParts(
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
            bottleneck=bottleneck,
            narrowing=tuple(narrowing),
            stacked=tuple(
                FeedForward(
                    up=(ffn.intermediate, "dense"),
                    activation=(ffn.intermediate, "intermediate_act_fn"),
                    down=(ffn.output, "dense"),
                    norm=(ffn.output, "LayerNorm"),
                )
                for ffn in stacked
            ),
            widening=widening,
        )


class MobileBertEncoder(FusedEncoder, modeling_mobilebert.MobileBertEncoder):
    """Runs as one operator."""

    STACK, GPU_STACK = MobileStack, None

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs) -> BaseModelOutput:
        kwargs = for_layers(self, kwargs) if "head_mask" in kwargs else kwargs
        y = self.fused(hidden_states, attention_mask, (), kwargs)
        if y is None:
            return super().forward(hidden_states, attention_mask, **kwargs)
        return BaseModelOutput(last_hidden_state=y)


class MobileBertEmbeddings(FusedEmbeddings, modeling_mobilebert.MobileBertEmbeddings):
    """Runs as one operator."""

    TABLES = ("word_embeddings", "position_embeddings", "token_type_embeddings")

    def fuse(self) -> None:
        self.tables()
        self.norm()
        self.transformation()

    def norm(self) -> tuple[nn.Module, float | None]:
        """The norm, and the eps of a LayerNorm."""
        norm = self._modules["LayerNorm"]
        return norm, norm_eps(norm)

    def transformation(self) -> nn.Module | None:
        """The linear over a word and its neighbours, or over the word alone; None: there is none."""
        if not self.trigram_input and self.embedding_size == self.hidden_size:
            return None
        linear = self._modules["embedding_transformation"]
        if type(linear) not in LEAVES or not linear.packable():
            raise Unfit(f"a projection is {type(linear).__name__}")
        return linear

    def _embed(self, ids: Tensor | None, *others: Tensor) -> Tensor:
        self.check(ids)
        if gpu.runs_on(ids.device):
            raise Unfit("another device or shape")
        tables, scales, padding = self.tables()
        norm, eps = self.norm()
        linear = self.transformation()
        packed = None if linear is None else linear.packed()
        own = (linear.weight, linear.bias) if isinstance(linear, PackedLinear) else (None, None)
        rows = self._read(self.rows(ids, *others), tables, padding)
        weight, bias = norm._parameters["weight"], norm._parameters["bias"]
        dtype = weight.dtype
        fp32 = (weight, bias) if dtype == torch.float32 else (weight.float(), bias.float())
        options = (*fp32, eps, self.trigram_input, dtype)
        try:
            if needs_grad(*tables, *own, weight, bias):
                made_from = [_NOTHING if tensor is None else tensor for tensor in own]
                packed = _NOTHING if packed is None else packed
                return _embed_from(rows, tables, scales, packed, made_from, *options, padding)
            return _embed(rows, tables, scales, packed, *options)
        except RuntimeError as error:
            raise self.named(error) from None

    def _read(self, ids: list[Tensor], tables: list[Tensor], padding: list[int]) -> list[Tensor]:
        """The ids; in place of low-bit tables, which the operator does not read, come the rows that ids ask for."""
        for i, table in enumerate(tables):
            if table.dtype == torch.uint8:
                module = self._modules[self.TABLES[i]]
                try:
                    found = read_rows(F.embedding(ids[i], table), module.embedding_dim)
                except IndexError:
                    count = module.num_embeddings
                    wrong = int(ids[i][(ids[i] < 0) | (ids[i] >= count)][0])
                    error = RuntimeError(f"trigram_embed: expected ids in [0, {count}) of table {i}. Got {wrong}.")
                    raise self.named(error) from None
                tables[i], padding[i] = found.flatten(0, 1), -1
                ids[i] = torch.arange(ids[i].numel()).view(ids[i].shape)
        return ids

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        if input_ids is not None and inputs_embeds is None:
            positions = self.position_ids[:, : input_ids.shape[1]] if position_ids is None else position_ids
            y = self.embed(input_ids, positions, ZERO if token_type_ids is None else token_type_ids)
            if y is not None:
                return y
        return super().forward(input_ids, token_type_ids, position_ids, inputs_embeds)


class MobileBertLMPredictionHead(Fused, PackedCache, modeling_mobilebert.MobileBertLMPredictionHead):
    """Logits as a product with the decoder and one with `dense`, whose weight [H - E, V] transformers takes as it is.

    The packed copy is that of the transposed weight of `dense`. Where it is int8, its scales belong to features of the
    input and are multiplied with that.
    """

    def fuse(self) -> None:
        self._expect_parts()
        if isinstance(self.dense, Int8Linear) and (float(self.dense.input_scale) or float(self.dense.output_scale)):
            raise Unfit("static ranges")
        self.refuse()
        follow_loading(self)

    def unfuse(self) -> None:
        super().unfuse()
        unfollow_loading(self)
        self.__dict__.pop("_packed", None)

    def packable(self) -> bool:
        dense = self.dense
        known = type(dense) is PackedLinear or (type(dense) is Int8Linear and dense.form == DENSE)
        return known and dense.packable()

    def _expect_parts(self) -> None:
        if not self.packable():
            raise Unfit(f"a projection is {type(self.dense).__name__}")
        if type(self.decoder) not in LEAVES:
            raise Unfit(f"a projection is {type(self.decoder).__name__}")

    def refuse(self) -> None:
        """Packs anew after a change."""
        # Nothing calls this module, so nothing needs a copy of its own.
        self.dense.__dict__.pop("_packed", None)
        self._repack()

    def _sources(self) -> tuple[Tensor | None, ...]:
        return self.dense._sources()[:2]

    def _pack(self) -> Tensor:
        weight = self._sources()[0].detach().t().contiguous()
        if weight.dtype == torch.int8:
            return torch.ops.bertkern.pack_qlinear.default(weight, torch.ones(1), None)
        return torch.ops.bertkern.pack_linear.default(weight.float() if weight.dtype == torch.float16 else weight, None)

    def train(self, mode: bool = True):
        super().train(mode)
        if mode:
            self.stale()
        else:
            self.refuse()
        return self

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.refuse()

    def _logits(self, hidden_states: Tensor) -> Tensor:
        dense, decoder = self.dense, self.decoder
        if self.training:
            raise Unfit("training mode")
        if not hidden_states.is_cpu or hidden_states.dtype not in FLOATS:
            raise Unfit("another device or dtype")
        if not torch.compiler.is_compiling() and (dense._forward_hooks or dense._forward_pre_hooks):
            raise Unfit("hooks on inner modules")
        self._expect_parts()
        x = self.transform(hidden_states)
        y, x = decoder(x[..., : decoder.in_features]), x[..., decoder.in_features :]
        weight, scale = (dense.weight, None) if isinstance(dense, PackedLinear) else (None, dense.weight_scale)
        if scale is not None:
            x = (x.float() * scale).to(x.dtype)
        if needs_grad(weight):
            return y + _linear_from(x, self.packed(), weight.t(), None)
        return y + _linear(x, self.packed(), dense.in_features)

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not plain():
            try:
                return self._logits(hidden_states)
            except Unfit as reason:
                self.fell_back(reason.args[0])
        return super().forward(hidden_states)


CLASSES = {
    modeling_mobilebert.MobileBertLayer: MobileBertLayer,
    modeling_mobilebert.MobileBertEncoder: MobileBertEncoder,
    modeling_mobilebert.MobileBertEmbeddings: MobileBertEmbeddings,
    modeling_mobilebert.MobileBertLMPredictionHead: MobileBertLMPredictionHead,
}
