"""shrink removes what adds nothing, answers stay, and everything comes back bit for bit."""

import copy
import pickle

import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrize, prune

import bertkern as bk
from bertkern import dead, shrink
from bertkern.families import layers_of

from .families.zoo import FAMILIES, OWN_WEIGHTS, inputs, make, padded, real, tensors

HEADS, SIZE, UNITS = 4, 13, 117  # an odd head size and an odd width
PADDINGS = ("none", "trailing", "left", "holes", "empty")


def model_of(family: str, head: str = "Model", **options) -> nn.Module:
    heads = "n_heads" if family == "DistilBert" else "num_attention_heads"
    return make(family + head, **{heads: HEADS}, **OWN_WEIGHTS.get(family, {}), **options)


def parts_of(model: nn.Module) -> list:
    return [family.parts(layer) for _, layer, family in layers_of(model)]


def names_of(model: nn.Module) -> list[str]:
    return [name for name, _, _ in layers_of(model)]


@torch.no_grad()
def zero(parts, slot: str, indices, dim: int = 0, bias: bool = True) -> None:
    """Zeros rows (dim 0, with their biases) or columns of one of the layer's linears."""
    linear = getattr(*getattr(parts, slot))
    linear.weight.index_fill_(dim, torch.tensor(indices), 0.0)
    if dim == 0 and bias and linear.bias is not None:
        linear.bias[indices] = 0


def head(*numbers: int) -> list[int]:
    return [number * SIZE + i for number in numbers for i in range(SIZE)]


def prune_some(model: nn.Module) -> nn.Module:
    """Layer 0 loses heads 1 (no output) and 2 (no value); layer 1 head 0 and units; a head without Q stays."""
    first, second, _ = parts_of(model)
    zero(first, "out", head(1), dim=1)
    zero(first, "value", head(2))
    zero(first, "query", head(0))
    zero(second, "out", head(0), dim=1)
    zero(second, "ffn2", range(5, 15), dim=1)  # 10 to 14 are constant as well: dead comes first
    zero(second, "ffn1", range(10, 25), bias=False)
    return model


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(model_or_state, expected: dict[str, torch.Tensor]) -> None:
    state = model_or_state.state_dict() if isinstance(model_or_state, nn.Module) else model_or_state
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name


def assert_close(expected, got, mask, atol=1e-5):
    expected, got = tensors(expected), tensors(got)
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        torch.testing.assert_close(real(name, got[name], mask), real(name, value, mask), atol=atol, rtol=1e-5, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_and_undone_bit_for_bit(family):
    model = prune_some(model_of(family)).double()
    before, batch = state_of(model), padded(model, "trailing")
    with torch.no_grad():
        expected = model(**batch)
        record = shrink.shrink(model)
        got = model(**batch)
    # Sums of the same terms, in fp64: nothing but the last bits may differ.
    assert_close(expected, got, batch["attention_mask"], atol=1e-12)
    first, second = names_of(model)[:2]
    assert not record.left and record.widths() == {
        first: {"heads": [0, 3], "units": UNITS},
        second: {"heads": [1, 2, 3], "units": UNITS - 20},
    }
    assert record.layers[second].kept.folded == tuple(range(15, 25))
    shapes = [[tuple(getattr(*slot).weight.shape) for slot in parts.linears()] for parts in parts_of(model)]
    hidden = model.config.hidden_size  # what values are made of
    assert shapes[0] == [(26, 52)] * 2 + [(26, hidden), (52, 26), (117, 52), (52, 117)]
    assert shapes[1] == [(39, 52)] * 2 + [(39, hidden), (52, 39), (97, 52), (52, 97)]
    assert shapes[2] == [(52, 52)] * 2 + [(52, hidden), (52, 52), (117, 52), (52, 117)]
    for parts in parts_of(model):
        for linear in (getattr(*slot) for slot in parts.linears()):
            assert (linear.out_features, linear.in_features) == linear.weight.shape
    removed = 3 * SIZE * (52 * 3 + hidden + 3) + 20 * (52 * 2 + 1)
    assert record.nbytes == removed * 8
    assert_same_bits(shrink.full_state_dict(model, record), before)
    assert shrink.unshrink(model, record) is model
    assert_same_bits(model, before)
    with torch.no_grad():
        assert torch.equal(model(**batch).last_hidden_state, expected.last_hidden_state)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding", PADDINGS)
def test_with_accelerate_and_restore(family, padding):
    model = prune_some(model_of(family))
    before, batch = state_of(model), padded(model, padding)
    with torch.no_grad():
        expected = model(**batch)
        record = shrink.shrink(model)
        plain = model(**batch)
        bk.accelerate(model)
        got = model(**batch)
        states = model(**batch, output_hidden_states=True).hidden_states
    assert_close(expected, plain, batch["attention_mask"])
    assert_close(expected, got, batch["attention_mask"], atol=2e-5)
    assert torch.equal(states[-1], got.last_hidden_state) and len(states) == 4
    assert not bk.report(model).fallbacks
    assert_same_bits(shrink.full_state_dict(model, record), before)
    shrink.unshrink(bk.restore(model), record)
    assert_same_bits(model, before)
    assert all(type(getattr(*slot)) is nn.Linear for parts in parts_of(model) for slot in parts.linears())
    with torch.no_grad():
        assert torch.equal(model(**batch).last_hidden_state, expected.last_hidden_state)


@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_model_that_is_accelerated_already(family):
    model = prune_some(model_of(family))
    before, batch = state_of(model), padded(model, "trailing")
    with torch.no_grad():
        expected = bk.accelerate(model)(**batch)
        record = shrink.shrink(model)
        assert_close(expected, model(**batch), batch["attention_mask"])
        shrink.unshrink(model, record)
        assert torch.equal(model(**batch).last_hidden_state, expected.last_hidden_state)
    assert not bk.report(model).fallbacks
    assert_same_bits(bk.restore(model), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_heads_in_every_layer(family):
    model = model_of(family)
    for parts in parts_of(model):
        zero(parts, "out", head(0, 2), dim=1)
    batch = padded(model, "trailing")
    with torch.no_grad():
        expected = model(**batch)
        record = shrink.shrink(model)
        assert [layer["heads"] for layer in record.widths().values()] == [[1, 3]] * 3
        assert_close(expected, model(**batch), batch["attention_mask"])
        assert_close(expected, bk.accelerate(model)(**batch), batch["attention_mask"], atol=2e-5)
    assert not bk.report(model).fallbacks


@pytest.mark.parametrize("family", ["Bert", "MPNet"])
def test_compiled(family):
    model = prune_some(model_of(family))
    record = shrink.shrink(model)
    bk.accelerate(model)
    batch = padded(model, "trailing")
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert_close(model(**batch), compiled(**batch), batch["attention_mask"])
    assert record and not bk.report(model).fallbacks


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_weights_hooks_and_gradients_of_a_shrunk_model(family):
    model = prune_some(model_of(family))
    if family != "MPNet":
        model.set_attn_implementation("eager")
    batch = padded(model, "trailing")
    expected = model(**batch, output_attentions=True)
    shrink.shrink(model)
    got = model(**batch, output_attentions=True)
    kept = [[0, 3], [1, 2, 3], [0, 1, 2, 3]]
    for theirs, ours, heads in zip(expected.attentions, got.attentions, kept, strict=True):
        torch.testing.assert_close(ours, theirs[:, heads], atol=1e-5, rtol=1e-4)

    if family == "MPNet":
        twin = bk.accelerate(copy.deepcopy(model))
        with torch.no_grad():
            for theirs, ours in zip(got.attentions, twin(**batch, output_attentions=True).attentions, strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)

    reference = [p.grad.clone() for p in backward(model, batch)]
    bk.accelerate(model, sparse=False)
    for ours, theirs in zip((p.grad for p in backward(model, batch)), reference, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)
    assert not bk.report(model).fallbacks
    seen = []
    getattr(*parts_of(model)[0].ffn1).register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        assert_close(expected, {**model(**batch), "attentions": None}, batch["attention_mask"], atol=2e-5)
    assert seen and bk.report(model).fallbacks


def backward(model, batch):
    model.zero_grad()
    model(**batch).last_hidden_state[batch["attention_mask"].bool()].square().sum().backward()
    return [p for slots in parts_of(model) for slot in slots.linears() for p in getattr(*slot).parameters()]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_must_stay_stays(family):
    model = model_of(family)
    first, second, third = parts_of(model)
    zero(first, "query", head(0))  # attends evenly
    zero(first, "key", head(1))
    zero(first, "value", head(2), bias=False)  # adds its bias
    zero(first, "out", [SIZE + 1], dim=1)  # a column of many
    zero(second, "value", [i for i in head(3) if i != 3 * SIZE + 7])
    zero(second, "ffn1", [4], bias=True)  # constant, and act(0) = 0 folds as nothing
    with torch.no_grad():
        for slot in ("out", "ffn2"):
            getattr(*getattr(third, slot)).weight[:] = -0.0
        getattr(*third.out).weight[5, head(2)[-1]] = float("nan")
        getattr(*third.out).weight[5, head(1)[0]] = float("inf")
        getattr(*third.ffn2).weight[0, 7] = float("nan")
        getattr(*third.ffn1).weight[8, 3] = float("nan")  # 0 x NaN is the answer's NaN
        getattr(*third.ffn1).bias[9] = float("inf")
        getattr(*third.value).weight[3 * SIZE, 3] = float("nan")
    found, left = dead.find(model)
    name = names_of(model)
    assert not left and [found[n].dead_heads for n in name] == [(), (), (0,)]
    assert (found[name[1]].dead_units, found[name[1]].foldable_units) == ((), (4,))
    assert found[name[2]].dead_units == tuple(u for u in range(UNITS) if u not in (7, 8, 9))
    batch = inputs(model)
    with torch.no_grad():
        expected = model(**batch).last_hidden_state
        record = shrink.shrink(model)
        assert torch.isnan(expected).any() and torch.equal(
            torch.isnan(model(**batch).last_hidden_state), expected.isnan()
        )
    assert record.widths() == {
        name[1]: {"heads": [0, 1, 2, 3], "units": UNITS - 1},
        name[2]: {"heads": [1, 2, 3], "units": 3},
    }
    assert record.layers[name[1]].fold is None


@pytest.mark.parametrize("family", FAMILIES)
def test_one_head_and_one_unit_are_kept(family):
    model = model_of(family)
    first, second, _ = parts_of(model)
    zero(first, "out", range(52), dim=1)
    zero(first, "ffn2", range(UNITS), dim=1)
    zero(second, "value", range(52))
    zero(second, "ffn1", range(UNITS), bias=False)
    before, batch = state_of(model), padded(model, "trailing")
    with torch.no_grad():
        expected = model(**batch)
        record = shrink.shrink(model)
        assert [(layer["heads"], layer["units"]) for layer in record.widths().values()] == [([0], 1)] * 2
        assert_close(expected, model(**batch), batch["attention_mask"])
        assert_close(expected, bk.accelerate(model)(**batch), batch["attention_mask"], atol=2e-5)
    assert not bk.report(model).fallbacks
    assert_same_bits(shrink.unshrink(bk.restore(model), record), before)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("activation", ["gelu", "relu", "sigmoid"])
def test_without_biases(family, activation):
    name = "activation" if family == "DistilBert" else "hidden_act"
    model = model_of(family, **({} if activation == "sigmoid" else {name: activation}))
    for parts in parts_of(model):
        for slot in parts.linears():
            getattr(*slot).bias = None
        if activation == "sigmoid":
            setattr(*parts.activation, nn.Sigmoid())
    first, second, _ = parts_of(model)
    zero(first, "value", head(3))
    zero(second, "ffn1", range(30))
    before, batch = state_of(model), padded(model, "trailing")
    with torch.no_grad():
        expected = model(**batch)
        record = shrink.shrink(model)
        assert_close(expected, model(**batch), batch["attention_mask"])
    # act(0) = 0 needs no bias, sigmoid(0) does.
    assert (getattr(*second.ffn2).bias is None) == (activation != "sigmoid")
    widths = record.widths()
    assert widths[names_of(model)[1]].get("bias", False) == (activation == "sigmoid")
    assert [(w["heads"], w["units"]) for w in widths.values()] == [([0, 1, 2], UNITS), ([0, 1, 2, 3], UNITS - 30)]
    assert_same_bits(shrink.full_state_dict(model, record), before)

    fresh = model_of(family, **({} if activation == "sigmoid" else {name: activation}))
    for parts in parts_of(fresh):
        for slot in parts.linears():
            getattr(*slot).bias = None
        if activation == "sigmoid":
            setattr(*parts.activation, nn.Sigmoid())
    shrink.narrow(fresh, widths)
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(**batch).last_hidden_state, model(**batch).last_hidden_state)
    assert_same_bits(shrink.unshrink(model, record), before)


@pytest.mark.parametrize("family", ["Bert", "DistilBert", "MPNet"])
def test_units_stay_where_the_activation_mixes_them(family):
    model = prune_some(model_of(family))
    second = parts_of(model)[1]
    setattr(*second.activation, nn.Softmax(-1))
    found = dead.find(model)[0][names_of(model)[1]]
    assert found.dead_units == found.foldable_units == () and found.dead_heads == (0,)


@pytest.mark.parametrize("family", FAMILIES)
def test_under_torch_prune(family):
    model = model_of(family)
    first, second, _ = parts_of(model)
    for parts, slot, indices, dim in (
        (first, "out", head(1, 3), 1),
        (second, "ffn2", range(40), 1),
        (second, "ffn1", range(30, 60), 0),
    ):
        linear = getattr(*getattr(parts, slot))
        mask = torch.ones_like(linear.weight).index_fill_(dim, torch.tensor(indices), 0)
        prune.l1_unstructured(linear, "weight", 0.2)
        prune.custom_from_mask(linear, "weight", mask)
    value = getattr(*second.value)
    rows = torch.ones_like(value.bias)
    rows[head(2)] = 0
    prune.custom_from_mask(value, "weight", rows[:, None].expand_as(value.weight).clone())
    prune.custom_from_mask(value, "bias", rows)
    before, batch = state_of(model), padded(model, "trailing")
    with torch.no_grad():
        expected = model(**batch)
        record = shrink.shrink(model)
        assert_close(expected, model(**batch), batch["attention_mask"])
    assert [(w["heads"], w["units"]) for w in record.widths().values()] == [([0, 2], UNITS), ([0, 1, 3], UNITS - 60)]
    assert value.weight.shape == value.weight_mask.shape == value.weight_orig.shape == (39, model.config.hidden_size)
    assert value.bias_mask.shape == value.bias.shape == (39,)
    assert_same_bits(shrink.full_state_dict(model, record), before)
    shrink.unshrink(model, record)
    assert_same_bits(model, before)
    with torch.no_grad():
        assert torch.equal(model(**batch).last_hidden_state, expected.last_hidden_state)
    prune.remove(value, "weight")
    assert value.weight.shape == (52, model.config.hidden_size) and bool((value.weight[head(2)] == 0).all())


def test_masks_made_since_the_last_forward_pass_count():
    model = model_of("Bert")
    out = getattr(*parts_of(model)[0].out)
    prune.identity(out, "weight")
    model(**inputs(model))
    out.weight_mask[:, head(2)] = 0  # as an optimizer or a loaded checkpoint would: the attribute is stale
    assert dead.find(model)[0]["encoder.layer.0"].dead_heads == (2,)
    with torch.no_grad():
        out.weight_orig[0, head(2)[0]] = float("nan")
    assert dead.find(model)[0]["encoder.layer.0"].dead_heads == ()


def test_a_masked_bias_takes_no_constants_up():
    model = prune_some(model_of("Bert"))
    ffn2 = getattr(*parts_of(model)[1].ffn2)
    prune.random_unstructured(ffn2, "bias", 0.5)
    record = shrink.shrink(model)
    assert list(record.layers) == ["encoder.layer.0"] and "mask" in record.left["encoder.layer.1"]


def test_what_is_shared_computed_or_hooked_is_left():
    def left(change):
        model = model_of("Bert")
        for parts in parts_of(model):
            zero(parts, "out", head(1), dim=1)
        change(model, parts_of(model))
        before = state_of(model)
        record = shrink.shrink(model)
        for name in record.left:
            for key, tensor in model.state_dict().items():
                assert not key.startswith(name) or torch.equal(tensor, before[key])
        return record.left

    def tie_parameters(model, parts):
        getattr(*parts[1].query).weight = getattr(*parts[0].query).weight

    def tie_modules(model, parts):
        parts[1].query[0].query = getattr(*parts[0].query)

    def tie_blocks(model, parts):
        model.encoder.layer[2].attention = model.encoder.layer[0].attention

    def hook(model, parts):
        getattr(*parts[2].key).register_forward_hook(lambda *_: None)

    def compute(model, parts):
        parametrize.register_parametrization(getattr(*parts[0].key), "weight", nn.Identity())

    class Mine(nn.Linear):
        pass

    def replace(model, parts):
        setattr(*parts[0].key, Mine(52, 52))

    first, second, third = (f"encoder.layer.{i}" for i in range(3))
    assert left(tie_parameters) == {first: "its weights are shared", second: "its weights are shared"}
    assert left(tie_modules) == {first: "its projections are shared", second: "its projections are shared"}
    assert left(tie_blocks) == {first: "its projections are shared", third: "its projections are shared"}
    assert left(hook) == {third: "a projection has hooks"}
    assert left(compute) == {first: "a projection is ParametrizedLinear"}
    assert left(replace) == {first: "a projection is Mine"}
    assert left(lambda model, parts: bk.quantize_(model, bk.Int8Config(skip=("layer.0", "layer.1")))) == {
        third: "a projection is Int8Linear"
    }


def test_a_layer_that_stands_in_several_places_is_cut_once():
    model = prune_some(model_of("Bert"))
    model.encoder.layer[2] = model.encoder.layer[0]
    before, batch = state_of(model), inputs(model)
    with torch.no_grad():
        expected = model(**batch).last_hidden_state
        record = shrink.shrink(model)
        torch.testing.assert_close(model(**batch).last_hidden_state, expected, atol=1e-5, rtol=1e-5)
    assert list(record.layers) == ["encoder.layer.0", "encoder.layer.1"]
    assert_same_bits(shrink.unshrink(model, record), before)


def test_decoders_and_other_modules_are_left():
    decoder = transformers.BertLMHeadModel(transformers.BertConfig(**_TINY, is_decoder=True)).eval()
    record = shrink.shrink(decoder)
    assert not record and record.left == {"bert.encoder.layer.0": "a decoder"}
    albert = transformers.AlbertModel(transformers.AlbertConfig(**_TINY, embedding_size=8))
    assert not shrink.shrink(albert).left and not shrink.shrink(nn.Sequential(nn.Linear(3, 3)))


_TINY = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "vocab_size": 30,
    "max_position_embeddings": 16,
}


def test_twice_and_back():
    for family in ("Bert", "MPNet"):
        model = prune_some(model_of(family))
        start, batch = state_of(model), padded(model, "trailing")
        first = shrink.shrink(model)
        parts = parts_of(model)
        zero(parts[0], "out", head(0), dim=1)  # the first of the two heads that are left: number 3 stays
        zero(parts[1], "ffn2", [0], dim=1)
        between = state_of(model)
        with torch.no_grad():
            expected = model(**batch)
            second = shrink.shrink(model)
            assert_close(expected, model(**batch), batch["attention_mask"])
        name = names_of(model)
        assert second.widths() == {
            name[0]: {"heads": [3], "units": UNITS},
            name[1]: {"heads": [1, 2, 3], "units": UNITS - 21},
        }
        assert_same_bits(shrink.unshrink(model, second), between)
        with torch.no_grad():
            assert_close(expected, model(**batch), batch["attention_mask"])
        shrink.unshrink(model, first)
        changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, start[key])}
        assert len(changed) == 2  # the two matrices that were zeroed in between


def test_changes_since_are_kept():
    model = prune_some(model_of("Bert"))
    before, batch = state_of(model), inputs(model)
    record = shrink.shrink(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model(**batch).last_hidden_state.square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        expected = model(**batch).last_hidden_state
        model.double()
        shrink.unshrink(model, record).float()
        torch.testing.assert_close(model(**batch).last_hidden_state, expected, atol=1e-5, rtol=1e-5)
    out = getattr(*parts_of(model)[0].out).weight
    assert torch.equal(out[:, head(1)], torch.zeros(52, SIZE)) and out.requires_grad
    query = "encoder.layer.0.attention.self.query.weight"
    state = model.state_dict()
    assert torch.equal(state[query][head(1)], before[query][head(1)])
    assert not torch.equal(state[query][head(3)], before[query][head(3)])


def test_frozen_parameters_stay_frozen():
    model = prune_some(model_of("Bert"))
    frozen = getattr(*parts_of(model)[0].query).requires_grad_(False)
    record = shrink.shrink(model)
    assert not frozen.weight.requires_grad and not frozen.bias.requires_grad
    assert getattr(*parts_of(model)[0].key).weight.requires_grad
    shrink.unshrink(model, record)
    assert not frozen.weight.requires_grad and frozen.weight.shape == (52, 52)


def test_a_record_that_does_not_fit_changes_nothing():
    model = prune_some(model_of("Bert"))
    record = shrink.shrink(model)
    full = model_of("Bert")
    before = state_of(full)
    with pytest.raises(
        RuntimeError, match=r"expected encoder\.layer\.0\.attention\.self\.query\.weight of shape \[26, 52\]"
    ):
        shrink.unshrink(full, record)
    with pytest.raises(RuntimeError, match="Got none"):
        shrink.unshrink(model_of("DistilBert"), record)
    assert_same_bits(full, before)
    quantized = bk.quantize_(model)
    with pytest.raises(RuntimeError, match="Got none"):
        shrink.full_state_dict(quantized, record)


@pytest.mark.parametrize("family", FAMILIES)
def test_int8_of_a_shrunk_model_and_back(family):
    model = prune_some(model_of(family, "ForSequenceClassification"))
    before, batch = state_of(model), padded(model, "trailing")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        record = shrink.shrink(model)
        got = bk.quantize_(model, bk.Int8Config(keep_original=True))(**batch).logits
        full = bk.quantize_(twin, bk.Int8Config())(**batch).logits
    assert not bk.report(model).fallbacks
    torch.testing.assert_close(got, full, atol=0.2, rtol=0.1)
    assert_same_bits(shrink.unshrink(bk.restore(model), record), before)


def test_copies_and_pickles_take_record_and_model_along():
    for family in ("Bert", "MPNet"):
        model = prune_some(model_of(family))
        before, batch = state_of(model), padded(model, "trailing")
        record = shrink.shrink(model)
        with torch.no_grad():
            expected = model(**batch).last_hidden_state
            for twin, its in (copy.deepcopy((model, record)), pickle.loads(pickle.dumps((model, record)))):
                assert torch.equal(twin(**batch).last_hidden_state, expected)
                assert_same_bits(shrink.unshrink(twin, its), before)
            assert torch.equal(model(**batch).last_hidden_state, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_as_the_plain_dense_checkpoint(family, tmp_path):
    model = prune_some(model_of(family, "ForTokenClassification"))
    before = state_of(model)
    record = shrink.shrink(model)
    model.save_pretrained(tmp_path, state_dict=shrink.full_state_dict(model, record))
    assert_same_bits(type(model).from_pretrained(tmp_path), before)
    # Of a part of the model, by the names that it has there.
    prefix = model.base_model_prefix
    inner = shrink.full_tensors(model, record, prefix)
    assert inner.keys() == {key.removeprefix(prefix + ".") for key in shrink.full_tensors(model, record)}
    assert inner.keys() < model.base_model.state_dict().keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_narrow_makes_room_for_a_ragged_checkpoint(family):
    model = prune_some(model_of(family))
    batch = padded(model, "trailing")
    record = shrink.shrink(model)
    with torch.device("meta"):
        fresh = type(model)(copy.deepcopy(model.config)).eval()
    narrowed = shrink.narrow(fresh, record.widths())
    assert narrowed.widths() == record.widths()
    fresh.to_empty(device="cpu")
    fresh.load_state_dict(model.state_dict())
    for ours, theirs in zip(fresh.buffers(), model.buffers(), strict=True):
        ours.copy_(theirs)
    with torch.no_grad():
        assert torch.equal(fresh(**batch).last_hidden_state, model(**batch).last_hidden_state)


@pytest.mark.parametrize(
    "widths",
    [
        {"encoder.layer.9": {"heads": [0], "units": 3}},
        {"pooler": {"heads": [0], "units": 3}},
        *(
            {"encoder.layer.0": {"heads": heads, "units": 3}}
            for heads in ([4], [-1], [1, 0], [1, 1], [True], "01", None)
        ),
        *({"encoder.layer.0": {"heads": [0], "units": units}} for units in (0, UNITS + 1, -1, 2.0, True, None)),
        {"encoder.layer.0": {"heads": [0], "units": 3}, "encoder.layer.1": {"heads": [7]}},
    ],
)
def test_narrow_refuses_what_the_model_does_not_have(widths):
    model = model_of("Bert")
    before = state_of(model)
    with pytest.raises(ValueError, match="narrow: expected"):
        shrink.narrow(model, widths)
    assert_same_bits(model, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_narrow_to_no_heads_and_to_all_units(family):
    model = model_of(family).double()
    first, second, third = names_of(model)
    record = shrink.narrow(model, {first: {"heads": []}, second: {"units": 5}, third: {}})
    assert record.widths() == shrink.ragged(model)
    assert record.widths() == {first: {"heads": [], "units": UNITS}, second: {"heads": [0, 1, 2, 3], "units": 5}}
    attention = parts_of(model)[0].query[0]
    assert attention.headless and attention.kept_heads == (0,) and shrink.numbers(parts_of(model)[0]) == ()
    again = shrink.shrink(model)
    assert not again and shrink.unshrink(model, record) is model
    assert not shrink.ragged(model) and shrink.numbers(parts_of(model)[0]) == (0, 1, 2, 3)
