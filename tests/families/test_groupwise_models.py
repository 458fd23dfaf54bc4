"""quantize_ with a GroupwiseConfig: every family computes what its codes say, alone as in a batch, and comes back."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

import bertkern as bk
from bertkern.formats.groupwise import quantize_groupwise
from bertkern.nn import GroupwiseEmbedding, GroupwiseLinear

from ..reference import quantize_ranges
from .test_int8 import sqnr
from .zoo import FAMILIES, inputs, make, padded, real, tensors

SCHEMES = {
    "n": bk.GroupwiseConfig(groups=8),
    "k": bk.GroupwiseConfig(bits=3, group_size=16, axis="k", method="mse", pooler=True, head=True),
    "float": bk.GroupwiseConfig(bits=5, groups=4, axis="k", shared=True, symmetric=True, activation="float"),
    "mixed": bk.GroupwiseConfig(
        bits=2,
        groups=128,
        method="percentile",
        whole_zero=False,
        layer_bits={"embeddings": 4, "query": 8, "value": (2, 3, 4, 5) * 13},
        embedding_bits=6,
        pooler=True,
    ),
}
RUNS = (
    ("n", "Model"),
    ("n", "ForMaskedLM"),
    ("k", "ForMaskedLM"),
    ("float", "ForMaskedLM"),
    ("mixed", "ForSequenceClassification"),
)


def config_for(scheme, family):
    config = SCHEMES[scheme]
    # Of MobileBERT's shared bottlenecks too, 52 rows are 52 groups; DistilBERT has other names.
    names = {"DistilBert": {"query": "q_lin", "value": "v_lin"}, "MPNet": {"query": "q", "value": "v"}}.get(family, {})
    return replace(config, layer_bits={names.get(name, name): bits for name, bits in config.layer_bits})


class Simulated(nn.Module):
    """A GroupwiseLinear in float64, its activations rounded as it rounds them."""

    def __init__(self, layer: GroupwiseLinear) -> None:
        super().__init__()
        self.rounds, self.weight, self.bias = layer.activation == "dynamic", layer.dequantized_weight(), layer.bias

    def forward(self, x):
        values = x.double().reshape(-1, x.shape[-1])
        if self.rounds:
            codes, scale, zero = (part.double() for part in quantize_ranges(values.float()))
            values = (codes - zero[:, None]) * scale[:, None]
        y = values @ self.weight.double().T
        return (y if self.bias is None else y + self.bias.double()).to(x.dtype).view(*x.shape[:-1], -1)


def simulate(model):
    """The model with its low-bit layers in plain PyTorch and nothing fused."""
    model = copy.deepcopy(model)
    bk.swap.unfuse(model)
    made = {n: m for n, m in model.named_modules() if isinstance(m, (GroupwiseLinear, GroupwiseEmbedding))}
    for name, module in made.items():
        parent, _, leaf = name.rpartition(".")
        new = Simulated(module) if isinstance(module, GroupwiseLinear) else module.dequantize()
        setattr(model.get_submodule(parent), leaf, new)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme, head", RUNS)
def test_every_family_computes_what_its_codes_say(family, head, scheme):
    model, config = make(family + head), config_for(scheme, family)
    batch = padded(model, "trailing")
    mask = batch["attention_mask"]
    bk.quantize_(model, config, exact_attention=True)
    with torch.no_grad():
        expected, got = tensors(simulate(model)(**batch)), tensors(model(**batch))
    for key, value in expected.items():
        value, mine = real(key, value, mask), real(key, got[key], mask)
        if config.activation == "float":
            torch.testing.assert_close(mine, value, atol=1e-4, rtol=1e-4)
        else:
            # A rounding that falls the other way moves a value by a code, so closeness is in decibels.
            assert sqnr(value, mine) > 30, key
    # MobileBERT's operator does not read the low-bit weight that its masked-language head takes as it is.
    if (family, head) != ("MobileBert", "ForMaskedLM"):
        assert not bk.report(model).fallbacks
        assert not [row for row in bk.report(model).rows if row.runs.startswith("torch")]


@pytest.mark.parametrize("bits", [3, 8])
def test_mobilebert_reads_low_bit_tables(bits):
    model = bk.quantize_(make("MobileBertModel"), bk.GroupwiseConfig(embedding_bits=bits))
    ids = inputs(model, batch=2, length=9)["input_ids"]
    with torch.no_grad():
        expected, got = simulate(model).embeddings(ids), model.embeddings(ids)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(model.embeddings(ids[1:, :]), got[1:])
        assert not bk.report(model).fallbacks
        count = model.config.vocab_size
        for wrong in (-1, count):
            with pytest.raises(RuntimeError, match=rf"expected ids in \[0, {count}\) of table 0. Got {wrong}. Table 0"):
                model(torch.tensor([[1, wrong]]))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", ["n", "float"])
def test_bits_do_not_depend_on_company(family, scheme):
    model = bk.quantize_(make(family + "ForTokenClassification"), config_for(scheme, family))
    lengths = (11, 7, 1, 16)
    ids = inputs(model, batch=4, length=16)["input_ids"]
    mask = (torch.arange(16)[None] < torch.tensor(lengths)[:, None]).long()
    ids = torch.where(mask == 0, 1, ids)
    with torch.no_grad():
        together = model(input_ids=ids, attention_mask=mask).logits
        for row, length in enumerate(lengths):
            for width in (length, min(16, length + 3)):
                part = slice(row, row + 1), slice(0, width)
                alone = model(input_ids=ids[part], attention_mask=mask[part]).logits
                assert torch.equal(alone[0, :length], together[row, :length])


@pytest.mark.parametrize("family", FAMILIES)
def test_tied_decoders_share_the_codes_of_the_table(family, tmp_path):
    model = make(family + "ForMaskedLM")
    bk.quantize_(model, config_for("n", family))
    decoder, table = model.get_output_embeddings(), model.get_input_embeddings()
    assert decoder.table[0] is table and decoder.activation == "float"
    assert decoder.weight.equal(table.weight)
    batch = padded(model, "trailing")
    modules = bk.plan.quantized_modules(model)
    assert sum(key.endswith("weight_codes") for key in model.state_dict()) == len(modules) - 1
    with torch.no_grad():
        expected = model(**batch).logits
        other = bk.quantize_(make(family + "ForMaskedLM"), config_for("n", family))
        for name, tensor in other.state_dict().items():
            if name.endswith("weight_scale"):
                tensor.mul_(1.5)
        state = {**other.state_dict()}
        model.load_state_dict(state)
        assert not torch.equal(model(**batch).logits, expected)
        assert torch.equal(model(**batch).logits, other(**batch).logits)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert twin.get_output_embeddings().table[0] is twin.get_input_embeddings()
            assert torch.equal(twin(**batch).logits, model(**batch).logits)
        bk.dequantize(model)
    assert model.get_output_embeddings().weight.equal(model.get_input_embeddings().weight)
    kept = bk.quantize_(
        make(family + "ForMaskedLM"),
        replace(config_for("n", family), skip=("decoder", "lm_head.decoder", "vocab_projector", "generator_lm_head")),
    )
    assert isinstance(kept.get_output_embeddings(), nn.Linear)


@pytest.mark.parametrize("family", FAMILIES)
def test_restore_and_dequantize(family):
    model = make(family + "ForMaskedLM")
    batch = inputs(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        expected = model(**batch).logits
        bk.quantize_(model, bk.GroupwiseConfig(bits=8, groups=52, keep_original=True))
        quantized = model(**batch).logits
        assert not torch.equal(quantized, expected) and sqnr(expected, quantized) > 20
        copied = bk.dequantize(copy.deepcopy(model))
        assert sqnr(quantized, copied(**batch).logits) > 20
        bk.restore(model)
        assert torch.equal(model(**batch).logits, expected)
    assert all(parameters[n] is p for n, p in model.named_parameters(remove_duplicate=False))
    assert not getattr(model, "is_quantized", False) and not hasattr(model.config, "quantization_config")
    with pytest.raises(RuntimeError, match="keep_original=True"):
        bk.restore(bk.quantize_(model, bk.GroupwiseConfig()))


@pytest.mark.parametrize("family", FAMILIES)
def test_training_mode_and_gradients(family):
    model = bk.quantize_(make(family + "ForSequenceClassification"), config_for("n", family))
    batch = {**inputs(model), "labels": torch.tensor([0, 1, 1])}
    for training in (True, False):
        model.train(training)
        model.zero_grad()
        model(**batch).loss.backward()
        norms = [p for n, p in model.named_parameters() if "layer_norm" in n.lower() or "LayerNorm" in n]
        assert norms and all(p.grad is not None and p.grad.isfinite().all() for p in norms)
    plain = bk.dequantize(copy.deepcopy(model))
    model.train()
    plain.train()
    for each in (model, plain):
        each.zero_grad()
        torch.manual_seed(0)
        each(**batch).loss.backward()
    for (name, ours), theirs in zip(
        model.named_parameters(), [dict(plain.named_parameters())[n] for n, _ in model.named_parameters()], strict=True
    ):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-3, msg=name)


def test_casts_keep_codes_and_scales():
    model = bk.quantize_(make("BertForSequenceClassification"), replace(SCHEMES["n"], pooler=True))
    parent = nn.ModuleDict({"inner": model})
    kept = {n: b.clone() for n, b in model.state_dict().items() if "weight_" in n or "input_" in n}
    batch = inputs(model)
    for cast, dtype in (
        (lambda: parent.to(torch.bfloat16), torch.bfloat16),
        (lambda: model.half(), torch.float16),
        (lambda: model.float(), torch.float32),
        (lambda: model.bfloat16(), torch.bfloat16),
        (lambda: parent.float(), torch.float32),
    ):
        cast()
        state = model.state_dict()
        assert all(torch.equal(state[n], b) and state[n].dtype == b.dtype for n, b in kept.items())
        with torch.no_grad():
            out = model(**batch, output_hidden_states=True)
        assert {h.dtype for h in out.hidden_states} == {out.logits.dtype} == {dtype}
    assert not bk.report(model).fallbacks


@pytest.mark.parametrize("unsigned", [False, True])
def test_static_activations(unsigned):
    model = make("BertForSequenceClassification")
    batches = [inputs(model, seed=seed) for seed in range(4)]
    config = bk.GroupwiseConfig(bits=8, groups=13, activation="static", activation_unsigned=unsigned, pooler=True)
    found = bk.calibrate(model, batches, config, progress=False)
    assert "classifier" not in found.ranges and "bert.pooler.dense" in found.ranges
    other = copy.deepcopy(model)
    with torch.no_grad():
        expected = model(**batches[0]).logits
        bk.quantize_(model, config, calibration=found)
        bk.quantize_(other, config, calibration=batches, progress=False)
        assert torch.equal(model(**batches[0]).logits, other(**batches[0]).logits)
        assert sqnr(expected, model(**batches[0]).logits) > 15
    layer = model.bert.encoder.layer[0].attention.self.query
    assert float(layer.input_scale) > 0 and bool(int(layer.input_zero_point)) == unsigned
    assert "int8 n/13 static" in str(bk.report(model))


def test_weights_from_elsewhere():
    name, batch = "bert.encoder.layer.1.intermediate.dense", inputs(make("BertForSequenceClassification"))
    model = make("BertForSequenceClassification")
    given = {
        name: quantize_groupwise(model.get_submodule(name).weight, [2, 8, 3, 4], 16, "k"),
        "classifier": quantize_groupwise(model.classifier.weight, 6, 1),
        "bert.embeddings.word_embeddings": quantize_groupwise(model.get_input_embeddings().weight, 5, 10),
    }
    bk.quantize_(model, bk.GroupwiseConfig(skip=("layer.1",)), weights=given)
    for path, weight in given.items():
        assert torch.equal(model.get_submodule(path).weight, weight.dequantize())
    assert type(model.bert.encoder.layer[1].output.dense).__name__ == "PackedLinear"
    with torch.no_grad():
        assert sqnr(simulate(model)(**batch).logits, model(**batch).logits) > 30
    assert "int2/3/4/8 k/4" in str(bk.report(model))
    only = bk.quantize_(make("BertModel"), bk.GroupwiseConfig(skip=("*",)), weights={name[5:]: given[name]})
    assert set(bk.plan.quantized_modules(only)) == {name[5:]}


def wrong(model, change):
    name = "bert.encoder.layer.0.output.dense"
    weight = quantize_groupwise(model.get_submodule(name).weight, 4, 13)
    return change(name, weight)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda n, w: {n + "r": w}, "expected weights of linear layers and tables.*denser"),
        (lambda n, w: {"bert.encoder": w}, "expected weights of linear layers"),
        (
            lambda n, w: {n: quantize_groupwise(torch.ones(52, 52), 4)},
            r"of shape \[N, K\] = \[52, 117\]. Got \[52, 52\]",
        ),
        (lambda n, w: {n: replace(w, scale=w.scale * float("nan"))}, "finite scale"),
        (lambda n, w: {n: replace(w, scale=w.scale * 0)}, "scales above 0"),
        (lambda n, w: {n: replace(w, codes=w.codes[:-1])}, r"expected codes uint8 of shape \[3068\]"),
    ],
)
def test_wrong_weights_change_nothing(change, message):
    model = make("BertForSequenceClassification")
    before = {name: (type(module), id(module)) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        bk.quantize_(model, bk.GroupwiseConfig(), weights=wrong(model, change))
    with pytest.raises(TypeError, match="Got Tensor"):
        bk.quantize_(model, bk.GroupwiseConfig(), weights={"classifier": torch.ones(3)})
    with pytest.raises(ValueError, match="expected no weights with Int8Config"):
        bk.quantize_(model, weights=wrong(model, lambda n, w: {n: w}))
    assert {name: (type(module), id(module)) for name, module in model.named_modules()} == before


@pytest.mark.parametrize(
    "options, change, message",
    [
        ({}, lambda m: m.classifier.weight.data.fill_(float("nan")), None),
        (
            {},
            lambda m: m.bert.encoder.layer[2].output.dense.bias.data[5].fill_(float("inf")),
            "dense.bias to be finite",
        ),
        ({}, lambda m: m.bert.embeddings.position_embeddings.weight.data[3].fill_(float("inf")), "position_embeddings"),
        ({}, lambda m: bk.quantize_(m, bk.GroupwiseConfig()), "low-bit already"),
        ({}, lambda m: bk.quantize_(m), "int8 already"),
        ({}, lambda m: m.to("meta"), "on meta"),
        ({"layer_bits": {"layer.7": 2}}, lambda m: None, "layer_bits to name modules .* Got 'layer.7'"),
        ({"layer_bits": {"layer.1": (2, 4)}}, lambda m: None, "expected bits of 52 groups. Got 2"),
        ({"layer_bits": {"word_embeddings": (2, 4)}}, lambda m: None, "one number of bits for the table"),
        ({"activation": "static"}, lambda m: None, "expected calibration with activation"),
    ],
)
def test_nothing_is_half_changed(options, change, message):
    model = make("BertForSequenceClassification")
    change(model)
    before = {name: (type(module), id(module)) for name, module in model.named_modules()}
    if message is None:
        # The config leaves the head, so nothing is wrong with it.
        bk.quantize_(model, bk.GroupwiseConfig(**options))
        return
    with pytest.raises(ValueError, match=message):
        bk.quantize_(model, bk.GroupwiseConfig(**options))
    assert {name: (type(module), id(module)) for name, module in model.named_modules()} == before


def test_what_the_config_chooses():
    def names(**options):
        made = bk.quantize_(make("BertForSequenceClassification"), bk.GroupwiseConfig(**options))
        return set(bk.plan.quantized_modules(made))

    body = names()
    assert len(body) == 3 * 6 + 3
    assert names(pooler=True, head=True) - body == {"bert.pooler.dense", "classifier"}
    assert {name.split(".")[-1] for name in body - names(embedding_bits=None)} == {
        f"{table}_embeddings" for table in ("word", "position", "token_type")
    }
    assert len(body - names(skip=("layer.1", "*.0.*.key"))) == 7
    model = bk.quantize_(make("BertModel"), bk.GroupwiseConfig(bits=3, layer_bits={"layer.1": 2, "layer.1.output": 7}))
    layers = [layer.output.dense for layer in model.encoder.layer]
    assert [int(layer.weight_bits[0]) for layer in layers] == [3, 7, 3]
    assert int(model.encoder.layer[1].attention.self.key.weight_bits[0]) == 2


def test_pruned_models_lose_their_dead_heads_first():
    model = make("BertModel")
    attention = model.encoder.layer[1].attention
    with torch.no_grad():
        attention.output.dense.weight[:, 26:] = 0
        batch = inputs(model)
        expected = model(**batch).last_hidden_state
        got = bk.quantize_(model, bk.GroupwiseConfig(bits=8, groups=52))(**batch).last_hidden_state
    assert attention.self.query.out_features == 26 and sqnr(expected, got) > 20


def test_a_model_of_two_schemes_is_refused():
    model = bk.quantize_(make("BertModel"), bk.GroupwiseConfig())
    model.pooler.dense = bk.nn.Int8Linear.from_linear(nn.Linear(52, 52))
    with pytest.raises(ValueError, match="accelerate: expected quantized modules of one kind"):
        bk.accelerate(model)


def test_other_modules():
    model = nn.Sequential(nn.Linear(13, 24), nn.ReLU(), nn.Linear(24, 7)).eval()
    x = torch.randn(5, 13)
    with torch.no_grad():
        expected = model(x)
        bk.quantize_(model, bk.GroupwiseConfig(bits=8))
        assert sqnr(expected, model(x)) > 25
    with pytest.raises(ValueError, match="use GroupwiseLinear"):
        bk.quantize_(nn.Linear(3, 4), bk.GroupwiseConfig())
