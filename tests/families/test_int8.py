"""quantize_ computes what its codes say: against a simulation in plain PyTorch, for every family and head."""

import copy
import pickle

import pytest
import torch
from torch import nn

import bertkern as bk
from bertkern.nn import Int8Linear

from ..reference import quantize_ranges
from .zoo import FAMILIES, MODELS, answer, inputs, make, padded, real, tensors


class Simulated(nn.Module):
    """An Int8Linear in float64: codes of a row by its own range, exact sums."""

    def __init__(self, layer: Int8Linear) -> None:
        super().__init__()
        self.layer = layer
        # Heads ask their decoder for it.
        self.weight, self.bias = layer.dequantized_weight(), layer.bias

    def forward(self, x):
        codes, scale, zero = (part.double() for part in quantize_ranges(x.reshape(-1, x.shape[-1])))
        values = ((codes - zero[:, None]) * scale[:, None]).view(x.shape)
        weight = self.layer.weight_codes.double() * self.layer.weight_scale.double().reshape(-1, 1)
        y = values @ weight.T
        return (y if self.bias is None else y + self.bias.double()).to(x.dtype)


def simulate(model):
    """The quantized model with its int8 layers simulated and nothing fused."""
    model = copy.deepcopy(model)
    bk.swap.unfuse(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, Int8Linear):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, Simulated(module))
    return model


def sqnr(expected, got):
    return 10 * torch.log10(expected.double().square().sum() / (expected.double() - got.double()).square().sum())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("weight", ["per_channel", "per_tensor"])
def test_every_head_computes_what_its_codes_say(name, weight):
    model = make(name)
    batch = padded(model, "trailing")
    mask = batch["attention_mask"]
    answer(model, **batch)
    bk.quantize_(model, bk.Int8Config(weight=weight), exact_attention=True)
    with torch.no_grad():
        expected, got = tensors(simulate(model)(**batch)), tensors(model(**batch))
    assert expected.keys() == got.keys()
    for key, value in expected.items():
        # A rounding that falls the other way moves a value by a code, so closeness is in decibels. MobileBERT rounds
        # rows of tables as they are: halves of the largest code, where scales are common, lie between two codes.
        least = 30 if name.startswith("MobileBert") and weight == "per_tensor" else 35
        assert sqnr(real(key, value, mask), real(key, got[key], mask)) > least, key
    assert not bk.report(model).fallbacks
    left = [row for row in bk.report(model).rows if row.runs.startswith("torch")]
    assert not left


@pytest.mark.parametrize("family", FAMILIES)
def test_it_stays_near_the_float_model(family):
    model = make(family + "Model")
    batch = padded(model, "trailing")
    with torch.no_grad():
        expected = model(**batch).last_hidden_state
        got = bk.quantize_(model)(**batch).last_hidden_state
    mask = batch["attention_mask"].bool()
    assert sqnr(expected[mask], got[mask]) > 20


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_attention_costs_no_accuracy(family):
    """What it rounds is small beside what int8 rounds: as near to the float model, within half a decibel."""
    float_model, distances = make(family + "Model"), []
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 90, (64, 12), generator=generator)
    for exact in (True, False):
        model = bk.quantize_(copy.deepcopy(float_model), exact_attention=exact)
        with torch.no_grad():
            distances.append(sqnr(float_model(ids).last_hidden_state, model(ids).last_hidden_state))
    assert distances[1] > distances[0] - 0.5


def test_config_chooses_what_becomes_int8():
    def names(model):
        return set(bk.plan.quantized_modules(model))

    name = "BertForSequenceClassification"
    everything = names(bk.quantize_(make(name)))
    assert len(everything) == 3 * 6 + 3 + 2
    assert everything - names(bk.quantize_(make(name), bk.Int8Config(embeddings=False))) == {
        f"bert.embeddings.{table}_embeddings" for table in ("word", "position", "token_type")
    }
    assert everything - names(bk.quantize_(make(name), bk.Int8Config(pooler=False))) == {"bert.pooler.dense"}
    assert everything - names(bk.quantize_(make(name), bk.Int8Config(head=False))) == {"classifier"}
    skipped = bk.quantize_(make(name), bk.Int8Config(skip=("layer.1", "word_embeddings", "*.0.*.key")))
    assert len(everything - names(skipped)) == 6 + 1 + 1
    batch = inputs(skipped)
    with torch.no_grad():
        skipped(**batch)
    assert not bk.report(skipped).fallbacks
    assert "skipped by the config" in str(bk.report(skipped))


@pytest.mark.parametrize("config", [bk.Int8Config, bk.GroupwiseConfig])
def test_a_name_to_skip_that_no_module_has_is_told(config):
    with pytest.warns(UserWarning, match="quantize_: skip names no module of this model.*'classifer'") as told:
        model = bk.quantize_(
            make("BertForSequenceClassification"), config(head=True, skip=("classifer", "layer.0", "*.key"))
        )
    assert len(told) == 1 and "classifier" in bk.plan.quantized_modules(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_attentions(family):
    model = bk.quantize_(make(family + "Model"), exact_attention=True)
    batch = padded(model, "trailing")
    with torch.no_grad():
        bare = model(**batch).last_hidden_state
        got = model(**batch, output_hidden_states=True)
        assert torch.equal(got.last_hidden_state, bare)
        assert len(got.hidden_states) == 4
        got = model(**batch, output_attentions=True)
    assert len(got.attentions) == 3
    mask = batch["attention_mask"].bool()
    assert sqnr(bare[mask], got.last_hidden_state[mask]) > 35


@pytest.mark.parametrize("family", FAMILIES)
def test_training_mode_and_gradients(family):
    model = bk.quantize_(make(family + "ForSequenceClassification"))
    batch = {**inputs(model), "labels": torch.tensor([0, 1, 1])}
    for training in (True, False):
        model.train(training)
        model.zero_grad()
        model(**batch).loss.backward()
        norms = [p for n, p in model.named_parameters() if "layer_norm" in n.lower() or "LayerNorm" in n]
        assert norms and all(p.grad is not None and p.grad.isfinite().all() for p in norms)


@pytest.mark.parametrize("family", FAMILIES)
def test_copies(family):
    model = bk.quantize_(make(family + "ForMaskedLM"))
    batch = padded(model, "trailing")
    with torch.no_grad():
        expected = model(**batch).logits
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(**batch).logits, expected)
            assert not bk.report(twin).fallbacks


@pytest.mark.parametrize("family", FAMILIES)
def test_tied_decoders_share_the_codes_of_the_table(family):
    model = make(family + "ForMaskedLM")
    decoder = model.get_output_embeddings()
    assert decoder.weight is model.get_input_embeddings().weight
    bk.quantize_(model)
    decoder, table = model.get_output_embeddings(), model.get_input_embeddings()
    assert decoder.weight_codes is table.weight_codes
    assert sum(key.endswith("weight_codes") for key in model.state_dict()) == len(bk.plan.quantized_modules(model)) - 1
    with torch.no_grad():
        bk.dequantize(model)
    assert model.get_output_embeddings().weight.equal(model.get_input_embeddings().weight)


@pytest.mark.parametrize("family", FAMILIES)
def test_restore_needs_the_originals(family):
    model = make(family + "ForMaskedLM")
    batch = inputs(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    ties = dict(model.all_tied_weights_keys)
    with torch.no_grad():
        expected = model(**batch).logits
        bk.quantize_(model, bk.Int8Config(keep_original=True))
        assert not torch.equal(model(**batch).logits, expected)
        bk.restore(model)
        assert torch.equal(model(**batch).logits, expected)
    assert all(parameters[n] is p for n, p in model.named_parameters(remove_duplicate=False))
    assert model.all_tied_weights_keys == ties
    assert not getattr(model, "is_quantized", False) and not hasattr(model.config, "quantization_config")
    bk.quantize_(model)
    with pytest.raises(RuntimeError, match="keep_original=True"):
        bk.restore(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_dequantize_gives_the_nearest_float_model(family):
    model = make(family + "ForSequenceClassification")
    batch = inputs(model)
    weights = {name: value.clone() for name, value in model.named_parameters()}
    with torch.no_grad():
        quantized = bk.quantize_(model)(**batch).logits
        bk.dequantize(model)
        got = model(**batch).logits
    assert set(weights) == {name for name, _ in model.named_parameters()}
    for name, value in model.named_parameters():
        step = weights[name].abs().max() / 127
        assert (value - weights[name]).abs().max() <= step / 2 + 1e-7
    assert sqnr(got, quantized) > 20
    with torch.no_grad():
        assert torch.equal(bk.quantize_(model)(**batch).logits.isfinite(), torch.ones_like(got, dtype=torch.bool))


def test_casts_keep_scales_in_fp32():
    model = bk.quantize_(make("BertForSequenceClassification"))
    parent = nn.ModuleDict({"inner": model})
    scales = {n: b.clone() for n, b in model.named_buffers() if "scale" in n or n.endswith("bias")}
    batch = inputs(model)
    for cast, dtype in (
        (lambda: parent.to(torch.bfloat16), torch.bfloat16),
        (lambda: parent.half(), torch.float16),
        (lambda: parent.float(), torch.float32),
        (lambda: model.half(), torch.float16),
        (lambda: model.float(), torch.float32),
        (lambda: model.bfloat16(), torch.bfloat16),
        (lambda: model.to(torch.float32), torch.float32),
    ):
        cast()
        assert all(torch.equal(buffer, scales[name]) for name, buffer in model.named_buffers() if name in scales)
        assert all(b.dtype == torch.int8 for n, b in model.named_buffers() if n.endswith("codes"))
        with torch.no_grad():
            out = model(**batch, output_hidden_states=True)
        assert {h.dtype for h in out.hidden_states} == {out.logits.dtype} == {dtype}
    assert not bk.report(model).fallbacks


def test_other_modules_get_their_linears_swapped():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(13, 7)
            self.b = self.a
            self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(7, 11, bias=False), nn.ReLU()) for _ in range(2)])
            self.attention = nn.MultiheadAttention(11, 1, batch_first=True)
            self.layer = nn.TransformerEncoderLayer(11, 1, 5, batch_first=True)

        def forward(self, x):
            x = self.blocks[0](self.b(x)) + self.blocks[1](self.a(x))
            return self.layer(self.attention(x, x, x)[0])

    torch.manual_seed(0)
    model, x = Odd().eval(), torch.randn(2, 3, 13)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(bk.accelerate(model)(x), expected, atol=1e-5, rtol=1e-4)
        bk.quantize_(model)
        assert isinstance(model.a, Int8Linear) and model.b is model.a
        assert type(model.layer.linear1) is nn.Linear
        assert sqnr(expected, model(x)) > 20
    assert "reads its weight" in str(bk.report(model)) and "not batch-invariant" in str(bk.report(model))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m.classifier.weight.data.fill_(float("nan")), "classifier.weight to be finite"),
        (lambda m: m.bert.embeddings.position_embeddings.weight.data[3].fill_(float("inf")), "position_embeddings"),
        (lambda m: m.bert.encoder.layer[2].output.dense.bias.data[5].fill_(float("inf")), "dense.bias to be finite"),
        (lambda m: bk.quantize_(m), "int8 already"),
        (lambda m: m.to("meta"), "on meta"),
    ],
)
def test_nothing_is_half_changed(change, message):
    model = make("BertForSequenceClassification")
    change(model)
    before = {name: (type(module), id(module)) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        bk.quantize_(model)
    assert {name: (type(module), id(module)) for name, module in model.named_modules()} == before


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module. Got dict"):
        bk.quantize_({})
    with pytest.raises(TypeError, match="Got dict"):
        bk.quantize_(make("BertModel"), {"weight": "per_tensor"})
    with pytest.raises(ValueError, match=r"expected calibration with activation"):
        bk.quantize_(make("BertModel"), bk.Int8Config(activation="static"))
    with pytest.raises(ValueError, match="at least one linear"):
        bk.quantize_(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match="from_linear"):
        bk.quantize_(nn.Linear(3, 4))
