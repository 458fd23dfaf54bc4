"""Sensitivity by the Hessian, beside the whole Hessian of small models, column by column in float64."""

import csv
import json
import statistics

import pytest
import torch
from torch import nn

import bertkern as bk
from bertkern.compress.groupwise import unlabelled_loss
from bertkern.compress.groupwise.eigen import lanczos, power
from bertkern.compress.groupwise.hessian import Search
from bertkern.compress.groupwise.places import outputs_of
from tests.families import zoo

SMALL = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
SIZES = {
    "DistilBert": {"dim": 8, "hidden_dim": 12, "n_layers": 2},
    "Albert": {**SMALL, "embedding_size": 6},
    "Electra": {**SMALL, "embedding_size": 6},
    "MobileBert": {**SMALL, "intra_bottleneck_size": 6, "embedding_size": 6, "num_feedforward_networks": 2},
}
# Of what a layer has beside its norms and biases.
NORMS = ("LayerNorm", "layer_norm", "full_layer_layer_norm")


def small(family: str = "Bert", head: str = "ForSequenceClassification") -> nn.Module:
    return zoo.make(family + head, **SIZES.get(family, SMALL)).double()


def labelled(model: nn.Module, count: int = 6, length: int = 7, seed: int = 0) -> dict[str, torch.Tensor]:
    made = zoo.inputs(model, count, length, seed)
    made["labels"] = torch.arange(count) % 2
    return made


def matrices(layer: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in layer.named_parameters() if p.dim() == 2 and name.split(".")[-2] not in NORMS}


def exact(model: nn.Module, name: str, batch: dict[str, torch.Tensor], loss=lambda model, batch: model(**batch).loss):
    """All eigenvalues of a layer's Hessian, the largest in magnitude first; nothing here is bertkern's."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    layer = model.base_model.get_submodule(name)
    weights = list(matrices(layer).values())
    gradients = torch.autograd.grad(loss(model, batch).mean(), weights, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradients])
    rows = []
    for element in flat:
        row = torch.autograd.grad(element, weights, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([part.reshape(-1) for part in row]))
    model.set_attn_implementation(before)
    hessian = torch.stack(rows)
    torch.testing.assert_close(hessian, hessian.T, rtol=1e-6, atol=1e-9)
    values = torch.linalg.eigvalsh(hessian)
    return values[values.abs().argsort(descending=True)]


def measure(model, batches, **options):
    return bk.hessian_sensitivity(model, batches, **{"samples": 1, "fraction": 1.0, "progress": False, **options})


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_families(family):
    model = small(family)
    data = labelled(model)
    name = {"DistilBert": "transformer.layer.1", "Albert": "encoder.albert_layer_groups.0.albert_layers.0"}.get(
        family, "encoder.layer.1"
    )
    found = measure(model, data, layers=[name])
    value = float(exact(model, name, data)[0])
    assert found.layers == (name,)
    assert found.weights == (sum(p.numel() for p in matrices(model.base_model.get_submodule(name)).values()),)
    assert found.eigenvalues[0][0] == pytest.approx(value, rel=0.02)
    assert found.errors[0][0] <= 0.05


@pytest.mark.parametrize("method", ["lanczos", "power"])
@pytest.mark.parametrize("batch_size", [None, 4])
def test_every_layer_whole_and_in_chunks(method, batch_size):
    model = small()
    data = labelled(model)
    more = {"iterations": 500, "tolerance": 0.02} if method == "power" else {}
    found = measure(model, data, method=method, batch_size=batch_size, **more)
    assert found.layers == ("encoder.layer.0", "encoder.layer.1")
    for name, (value,) in zip(found.layers, found.eigenvalues, strict=True):
        assert value == pytest.approx(float(exact(model, name, data)[0]), rel=0.02)
    assert found.sensitivity == {
        name: abs(value) for name, (value,) in zip(found.layers, found.eigenvalues, strict=True)
    }


def test_chunks_hold_more_tokens_of_smaller_models():
    def chunks(family: str, **sizes: int) -> int:
        model = zoo.make(family + "ForSequenceClassification", **{**SIZES.get(family, SMALL), **sizes})
        batch = {"input_ids": torch.ones(256, 64, dtype=torch.long), "attention_mask": torch.ones(256, 64)}
        search = Search(model, [batch], None, 1.0, 0.05, 0, None, None, "test")
        return len(search.examples.chunks(range(256), None, outputs_of(model, "test")))

    wide = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 12}
    assert chunks("Bert") == 2  # 8192 tokens at most
    assert chunks("Bert", **wide, num_hidden_layers=6) == 4  # 4096, as many outputs as 1024 of BERT-base
    assert chunks("Albert", **wide, num_hidden_layers=12) == 8  # one layer's weights, a graph of twelve


def test_negative_eigenvalues_keep_their_sign():
    model = small()
    data = labelled(model)
    plain = measure(model, data, tolerance=1e-6, iterations=100)
    turned = measure(model, data, tolerance=1e-6, iterations=100, loss=lambda model, batch: -model(**batch).loss)
    for (value,), (negative,) in zip(plain.eigenvalues, turned.eigenvalues, strict=True):
        assert value != 0 and negative == pytest.approx(-value, rel=1e-5)


def test_a_saddle_whose_negative_side_the_gradient_hardly_shows():
    values = torch.cat([torch.tensor([-9.0, 5.0]), torch.linspace(-0.5, 0.5, 500)]).double()
    start = torch.full_like(values, 1e-3)
    start[1] = 1.0
    found = lanczos(lambda v: values * v, start, 20, 0.01, least=6)
    assert found.values[0] == pytest.approx(-9.0, rel=0.01) and abs(found.vectors[0][0]) > 0.99
    pair = lanczos(lambda v: values * v, start, 30, 0.001, count=2)
    assert pair.values == pytest.approx([-9.0, 5.0], rel=1e-3) and abs(pair.vectors[1][1]) > 0.99
    assert power(lambda v: values * v, start, 100, 1e-6).values[0] == pytest.approx(-9.0, rel=1e-3)


@pytest.mark.parametrize("solve", [lanczos, power])
def test_the_end_of_what_a_start_spans(solve):
    values = torch.tensor([3.0, -2.0, 1.0, 0.0]).double()
    found = solve(lambda v: values * v, torch.ones(4).double(), 100, 1e-9)
    assert found.values[0] == pytest.approx(3.0) and abs(found.vectors[0][0]) == pytest.approx(1.0, abs=1e-3)
    nothing = solve(torch.zeros_like, torch.ones(4).double(), 100, 1e-9)
    assert nothing.values == [0.0] and nothing.products == 1
    few = solve(lambda v: values * v, torch.ones(4).double(), 2, 1e-9)
    assert few.products == 2 and few.errors[0] > 1e-9


def test_samples():
    model = small()
    data = labelled(model, 8)
    seen = []

    def loss(model, batch):
        seen.append(batch)
        return model(**batch).loss

    found = measure(model, data, loss=loss, samples=3, fraction=0.5, seed=3)
    assert found.samples == len(seen) == 3 and found.examples == 4
    assert len({tuple(batch["input_ids"].flatten().tolist()) for batch in seen}) == 3
    for name, values in zip(found.layers, found.eigenvalues, strict=True):
        for value, batch in zip(values, seen, strict=True):
            assert len(batch["input_ids"].unique(dim=0)) == 4
            assert value == pytest.approx(float(exact(model, name, batch)[0]), rel=0.02)
    for values, mean, spread, total in zip(
        found.eigenvalues, found.mean, found.spread, found.sensitivity.values(), strict=True
    ):
        assert mean == pytest.approx(sum(values) / 3)
        assert spread == pytest.approx((sum((value - mean) ** 2 for value in values) / 3) ** 0.5)
        assert total == pytest.approx(abs(mean) + spread)
    again = measure(model, data, loss=loss, samples=3, fraction=0.5, seed=3)
    assert again == found
    assert measure(model, data, samples=3, fraction=0.5, seed=4).eigenvalues != found.eigenvalues


def test_accelerated_and_float32():
    model = small().float()
    data = labelled(model)
    expected = measure(model, data)
    bk.accelerate(model)
    got = measure(model, data)
    assert not bk.report(model).fallbacks
    for (value,), (other,) in zip(expected.eigenvalues, got.eigenvalues, strict=True):
        assert other == pytest.approx(value, rel=1e-3)
    assert model.config._attn_implementation == "bertkern"
    model(**data)
    assert not bk.report(model).fallbacks


def state(model: nn.Module) -> list:
    made = [(name, module.training, type(module)) for name, module in model.named_modules()]
    made += [(name, p.requires_grad, p.data_ptr(), p.detach().clone(), p.grad) for name, p in model.named_parameters()]
    made += [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    return [*made, model.config._attn_implementation, model.config.to_dict(), torch.get_rng_state()]


def same(first: list, second: list) -> bool:
    return all(
        a.equal(b) if isinstance(a, torch.Tensor) else same(a, b) if isinstance(a, tuple) else a == b
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("how", ["plain", "accelerated"])
def test_the_model_is_left_as_it_was(how):
    model = small().float()
    if how == "accelerated":
        bk.accelerate(model)
    model.train()
    model.bert.embeddings.requires_grad_(False)
    model.bert.pooler.eval()
    model.classifier.weight.grad = torch.ones_like(model.classifier.weight)
    data = labelled(model)
    model(**data)  # transformers itself then notes in the config what the labels are
    before = state(model)
    trained = []

    def loss(model, batch):
        trained.append(any(module.training for module in model.modules() if isinstance(module, nn.Dropout)))
        return model(**batch).loss

    with torch.no_grad(), torch.inference_mode():
        measure(model, data, loss=loss)
        bk.loss_landscape(model, data, "encoder.layer.0", points=3, fraction=1.0, progress=False)
    assert trained == [False] and same(before, state(model))

    def fails(model, batch):
        raise RuntimeError("on purpose")

    for call in (measure, lambda *x, **o: bk.loss_landscape(*x, "encoder.layer.0", progress=False, **o)):
        with pytest.raises(RuntimeError, match="on purpose"):
            call(model, data, loss=fails)
        assert same(before, state(model))


def test_losses_of_the_users_own():
    model = small()
    data = labelled(model)
    expected = measure(model, data)

    def each(model, batch):
        ids, mask, labels = batch
        logits = model(input_ids=ids, attention_mask=mask).logits
        return nn.functional.cross_entropy(logits, labels, reduction="none")

    for batches in ([tuple(data.values())], [list(data.values())]):
        got = measure(model, batches, loss=each)
        assert got.eigenvalues == expected.eigenvalues
    whole = [{"first": data, "second": data}]
    got = measure(model, whole, loss=lambda model, batch: model(**batch["first"]).loss)
    assert got.examples == 1
    for (value,), (other,) in zip(expected.eigenvalues, got.eigenvalues, strict=True):
        assert other == pytest.approx(value, rel=0.02)


def test_without_labels():
    model = small("Bert", "Model")
    data = labelled(model)
    del data["labels"]
    found = measure(model, data, loss=unlabelled_loss)
    for name, (value,) in zip(found.layers, found.eigenvalues, strict=True):
        all_values = exact(model, name, data, unlabelled_loss)
        assert all_values.min() > -1e-6 * all_values[0], "a minimum"
        assert value == pytest.approx(float(all_values[0]), rel=0.02)


@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"])
def test_unlabelled_losses_of_heads_are_at_their_minimum(head):
    model = small("Bert", head)
    data = {**zoo.padded(model, "trailing"), "labels": torch.zeros(3)}
    value = unlabelled_loss(model, data)
    assert value.shape == (3,) and float(value.detach().abs().max()) < 1e-12
    gradient = torch.autograd.grad(value.sum(), model.bert.encoder.layer[0].output.dense.weight)[0]
    assert float(gradient.abs().max()) < 1e-12
    assert measure(model, data, loss=unlabelled_loss).eigenvalues[0][0] > 1e-6


def test_examples_of_batches_of_several_lengths():
    model = small("Roberta", "ForTokenClassification")
    data = [zoo.inputs(model, 2, length, length) for length in (9, 4)]
    for batch in data:
        batch["labels"] = batch["input_ids"] % 2
    found = measure(model, data, tolerance=0.005, iterations=100)
    together = {
        key: torch.cat([data[0][key], nn.functional.pad(data[1][key], (0, 5), value=fill)])
        for key, fill in (("input_ids", 1), ("attention_mask", 0), ("labels", -100))
    }
    assert found.examples == 4
    for name, (value,) in zip(found.layers, found.eigenvalues, strict=True):
        # The two ends of these spectra are nearly alike.
        assert abs(value) == pytest.approx(abs(float(exact(model, name, together)[0])), rel=0.02)
    # Without a mask nothing can be padded, so lengths run by themselves.
    for batch in data:
        del batch["attention_mask"]
    sizes = []

    def loss(model, batch):
        sizes.append(list(batch["input_ids"].shape))
        return model(**batch).loss

    measure(model, data, loss=loss, layers="encoder.layer.1")
    assert sizes[:2] == [[2, 9], [2, 4]]


def test_sentences():
    model = small("Bert", "Model")

    def tokenizer(texts, truncation, max_length, return_tensors):
        assert truncation and max_length == 512 and return_tensors == "pt"
        ids = torch.tensor([[5 + len(word) for word in texts[0].split()]])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    texts = ["a bb", "ccc", "dddd eeeee f"]
    found = measure(model, texts, loss=unlabelled_loss, tokenizer=tokenizer)
    assert measure(model, [texts[:1], texts[1:]], loss=unlabelled_loss, tokenizer=tokenizer) == found
    ids = torch.tensor([[6, 7, 0], [8, 0, 0], [9, 10, 6]])
    data = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    value = float(exact(model, "encoder.layer.0", data, unlabelled_loss)[0])
    assert found.examples == 3 and found.eigenvalues[0][0] == pytest.approx(value, rel=0.02)
    with pytest.raises(TypeError, match="expected a tokenizer with batches of strings"):
        measure(model, texts, loss=unlabelled_loss)


def test_under_a_pruning_mask():
    model = small()
    linear = model.bert.encoder.layer[0].intermediate.dense
    torch.nn.utils.prune.random_unstructured(linear, "weight", 0.5)
    data = labelled(model)
    found = measure(model, data, layers="encoder.layer.0")
    assert found.eigenvalues[0][0] == pytest.approx(float(exact(model, "encoder.layer.0", data)[0]), rel=0.02)


def test_a_loss_that_is_linear_in_a_layer():
    model = small()
    data = labelled(model)

    def loss(model, batch):
        return model.bert.encoder.layer[0].output.dense.weight.sum() + 0 * model(**batch).loss.detach()

    found = measure(model, data, loss=loss, layers="encoder.layer.0")
    assert found.eigenvalues == ((0.0,),)
    with pytest.raises(ValueError, match=r"depends on the weights of encoder\.layer\.1\. Got one that does not"):
        measure(model, data, loss=loss)
    with pytest.raises(ValueError, match=r"expected a loss that bends in two directions"):
        bk.loss_landscape(model, data, "encoder.layer.0", loss=loss, progress=False)


def test_progress(capsys):
    model = small()
    measure(model, labelled(model), progress=True)
    assert "hessian: 100%" in capsys.readouterr().err
    measure(model, labelled(model))
    assert not capsys.readouterr().err


def test_what_it_refuses():
    model = small()
    data = labelled(model)
    unlabelled = {key: value for key, value in data.items() if key != "labels"}

    def refused(error, message, *arguments, **options):
        with pytest.raises(error, match=message):
            measure(*(arguments or (model, data)), **options)

    refused(TypeError, r"hessian_sensitivity: expected a torch\.nn\.Module\. Got str", "bert", data)
    refused(ValueError, r"one transformers model\. Got one with 0", nn.Linear(2, 2), data)
    refused(TypeError, r"expected batches to be an iterable of batches\. Got NoneType", model, None)
    refused(TypeError, r"expected batches to be an iterable of batches\. Got str", model, "data")
    refused(TypeError, r"expected batches to be an iterable of batches\. Got Tensor", model, data["input_ids"])
    refused(ValueError, r"expected at least one batch\. Got none", model, [])
    refused(TypeError, r"expected batches to be mappings, or a loss function\. Got tuple", model, [(1, 2)])
    refused(ValueError, r"Got none: batches need labels, or pass loss=", model, unlabelled)
    refused(ValueError, r"Got none: batches need labels", loss=lambda m, b: None)
    refused(ValueError, r"expected a loss of shape \[\] or \[B\]\. Got \[6, 2\]", loss=lambda m, b: m(**b).logits)
    refused(ValueError, r"expected a finite loss\. Got NaN", loss=lambda m, b: m(**b).loss * float("nan"))
    refused(ValueError, r"depends on the weights of encoder\.layer\.0", loss=lambda m, b: torch.zeros(()))

    def infinite(model, batch):
        value = model(**batch).loss
        return (value - value.detach()).abs() ** 1.5

    refused(ValueError, r"expected finite second derivatives of the loss\. Got NaN or Inf", loss=infinite)
    refused(ValueError, r"expected layers among .* Got 'encoder\.layer\.2'", layers=["encoder.layer.2"])
    refused(ValueError, r"expected at least one layer\. Got none", layers=[])
    refused(ValueError, r"expected method to be one of .* Got 'qr'", method="qr")
    for name in ("samples", "iterations", "batch_size"):
        for value in (0, 1.5, True):
            refused(ValueError, rf"expected {name} to be a whole number of at least 1\. Got {value}", **{name: value})
    for name in ("fraction", "tolerance"):
        for value in (0, 1.1, "all", float("nan")):
            refused(ValueError, rf"expected {name} to be a number above 0 and up to 1\. Got", **{name: value})
    refused(ValueError, r"expected weights of float32 or float64\. Got bfloat16", small().bfloat16(), data)
    quantized = bk.quantize_(small().float())
    refused(ValueError, r"weight as a parameter\. Got Int8Linear without", quantized, data)


# --- records --------------------------------------------------------------------------------------------------------


def test_record_table_and_csv(tmp_path):
    found = bk.Sensitivity(
        layers=("encoder.layer.0", "encoder.layer.1"),
        weights=(10, 20),
        eigenvalues=((1.0, 3.0), (-8.0, -6.0)),
        errors=((0.0, 0.01), (0.002, 0.0)),
        examples=4,
        products=12,
    )
    assert bk.Sensitivity.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert found.mean == (2.0, -7.0) and found.spread == (1.0, 1.0)
    assert found.sensitivity == {"encoder.layer.0": 3.0, "encoder.layer.1": 8.0}
    lines = str(found).splitlines()
    assert lines[0].endswith("2 samples of 4 examples, 12 Hessian-vector products")
    assert lines[-1].split() == ["encoder.layer.1", "8", "-7", "1", "-8", "-6", "0.2%"]
    found.save_csv(tmp_path / "found.csv")
    with open(tmp_path / "found.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["layer"] for row in rows] == list(found.layers)
    assert [float(row["sample 1"]) for row in rows] == [3.0, -6.0]
    assert float(rows[1]["sensitivity"]) == abs(statistics.fmean([-8, -6])) + statistics.pstdev([-8, -6])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"version": 2}, "expected version 1. Got 2"),
        ({"kind": "int8"}, "expected kind"),
        ({"more": 1}, "expected fields among"),
        ({"layers": ["a"]}, "expected weights to be a list, one for each layer"),
        ({"layers": ["a", "a"]}, "expected layers to be different names"),
        ({"weights": [1, 0]}, "expected weights to be whole numbers above 0"),
        ({"eigenvalues": [[1.0, 2.0], [1.0]]}, "expected eigenvalues to be finite numbers, one a sample"),
        ({"eigenvalues": [1.0, 2.0]}, "expected eigenvalues to be finite numbers, one a sample"),
        ({"errors": [[0.0, 0.0], [0.0, float("nan")]]}, "expected errors to be finite numbers, one a sample"),
        ({"examples": 0}, "expected examples to be a whole number of at least 1"),
        ({"method": "qr"}, "expected method to be one of"),
    ],
)
def test_records_that_are_refused(change, message):
    record = {
        "kind": "hessian_sensitivity",
        "layers": ["a", "b"],
        "weights": [1, 2],
        "eigenvalues": [[1.0, 2.0], [3.0, 4.0]],
        "errors": [[0.0, 0.0], [0.0, 0.0]],
        "examples": 1,
        "products": 2,
    }
    bk.Sensitivity.from_dict(record)
    with pytest.raises(ValueError, match=message):
        bk.Sensitivity.from_dict({**record, **change})


# --- landscapes -----------------------------------------------------------------------------------------------------


def test_landscape():
    model = small()
    data = labelled(model)
    found = bk.loss_landscape(
        model,
        data,
        "encoder.layer.1",
        fraction=1.0,
        radius=1e-2,
        points=5,
        tolerance=1e-3,
        iterations=100,
        progress=False,
    )
    values = exact(model, "encoder.layer.1", data)[:2]
    assert found.eigenvalues == pytest.approx(values.tolist(), rel=1e-3) and found.examples == 6
    assert found.offsets == pytest.approx([-1e-2, -5e-3, 0, 5e-3, 1e-2]) and found.offsets[2] == 0
    losses, step = torch.tensor(found.losses, dtype=torch.float64), 5e-3
    assert float(losses[2, 2]) == pytest.approx(model(**data).loss.item(), rel=1e-12)
    # The second differences along the directions are the eigenvalues, the mixed one is 0.
    for line, value in zip((losses[:, 2], losses[2]), values, strict=True):
        assert float(line[1] - 2 * line[2] + line[3]) / step**2 == pytest.approx(float(value), rel=1e-2)
    mixed = (losses[3, 3] - losses[3, 1] - losses[1, 3] + losses[1, 1]) / (4 * step**2)
    assert abs(float(mixed)) < 1e-2 * abs(float(values[1]))


def test_landscape_in_chunks_and_progress(capsys):
    model = small()
    data = labelled(model)
    options = {"fraction": 1.0, "points": 3, "tolerance": 1e-3, "iterations": 100}
    whole = bk.loss_landscape(model, data, "encoder.layer.0", progress=False, **options)
    assert not capsys.readouterr().err
    parts = bk.loss_landscape(model, data, "encoder.layer.0", batch_size=4, **options)
    assert "loss landscape: 100%" in capsys.readouterr().err
    assert parts.eigenvalues == pytest.approx(whole.eigenvalues, rel=1e-3)
    # An eigenvector's sign is its own.
    assert any(
        torch.allclose(torch.tensor(parts.losses).flip(flips), torch.tensor(whole.losses), rtol=1e-2)
        for flips in ((), (0,), (1,), (0, 1))
    )


def test_landscape_record_csv_and_plot(tmp_path):
    found = bk.Landscape(
        layer="encoder.layer.0",
        eigenvalues=(3.0, -1.0),
        errors=(0.0, 0.01),
        offsets=(-0.5, 0.0, 0.5),
        losses=((3.0, 2.0, 1.0), (2.0, 0.5, 2.0), (4.0, 5.0, 6.0)),
        examples=2,
    )
    assert bk.Landscape.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    text = str(found)
    assert "encoder.layer.0 over 2 examples" in text and text.splitlines()[-1].split() == ["0.5", "4", "5", "6"]
    found.save_csv(tmp_path / "found.csv")
    lines = (tmp_path / "found.csv").read_text().splitlines()
    assert lines[:2] == ["first,second,loss", "-0.5,-0.5,3.0"] and len(lines) == 10
    for change, message in (
        ({"offsets": [0.5, 0.0, -0.5]}, "expected offsets to be ascending numbers"),
        ({"losses": [[1.0]]}, "expected losses to be 3 rows of 3 numbers"),
        ({"eigenvalues": [1.0]}, "expected eigenvalues to be two numbers"),
        ({"version": 0}, "expected version 1"),
    ):
        with pytest.raises(ValueError, match=message):
            bk.Landscape.from_dict({**found.to_dict(), **change})
    pytest.importorskip("matplotlib")
    for losses in (found.losses, ((1.0, 1.0, float("inf")), *found.losses[1:]), ((1.0,) * 3,) * 3):
        figure = bk.Landscape.from_dict({**found.to_dict(), "losses": losses}).plot(tmp_path / "found.png")
        assert (tmp_path / "found.png").read_bytes()[:4] == b"\x89PNG"
        assert "eigenvalue 3" in figure.axes[1].get_xlabel()
        (tmp_path / "found.png").unlink()


def test_landscapes_that_are_refused():
    model = small()
    data = labelled(model)
    for options, message in (
        ({"layer": "encoder.layer.7"}, "expected layers among"),
        ({"radius": 0}, "expected radius to be a number above 0"),
        ({"points": 4}, "expected points to be an odd number of at least 3"),
        ({"iterations": 1}, "expected iterations to be a whole number of at least 2"),
        ({"fraction": 0}, "loss_landscape: expected fraction"),
        ({"loss": lambda m, b: m(**b).loss / 0}, "loss_landscape: expected a finite loss"),
    ):
        with pytest.raises(ValueError, match=message):
            bk.loss_landscape(model, data, **{"layer": "encoder.layer.0", "progress": False, **options})
