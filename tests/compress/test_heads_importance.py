"""Scores of heads against the formulas, example by example, on transformers 4's own attention in float64."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import bertkern as bk
from bertkern import shrink
from bertkern.head_masks import places
from tests.families import zoo
from tests.transformers4 import FAMILIES, HEADS, LAYERS, Transformers4, make, rows_of

SIZE = 13


def batches(model: nn.Module, sizes: tuple[int, ...] = (3, 2)) -> list[dict[str, torch.Tensor]]:
    """Batches of several sizes and lengths, with trailing padding and labels."""
    generator, made = torch.Generator().manual_seed(4), []
    for number, size in enumerate(sizes):
        length = 9 + number
        ids = torch.randint(5, zoo.VOCAB, (size, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, length // 2 :] = 0
        labels = torch.randint(0, 2, (size,), generator=generator)
        made.append({"input_ids": torch.where(mask > 0, ids, 1), "attention_mask": mask, "labels": labels})
    return made


def examples(data: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    return [
        {key: value[i : i + 1] for key, value in batch.items()} for batch in data for i in range(len(batch["labels"]))
    ]


def paper(model: nn.Module, data: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """The mean over examples of the absolute gradient of the loss with respect to the mask."""
    mask = torch.ones(rows_of(model), HEADS, dtype=torch.float64, requires_grad=True)
    total = torch.zeros_like(mask)
    reference = Transformers4(model, mask)
    for example in examples(data):
        total += torch.autograd.grad(reference(**example).loss, mask, retain_graph=True)[0].abs()
    return (total / len(examples(data))).detach()


def released(model: nn.Module, data: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """As the authors' code: absolute values by token; sums over the tokens' number, in the last layer the examples'."""
    reference = Transformers4(model, torch.ones(HEADS))
    scores, tokens, count = torch.zeros(rows_of(model), HEADS, dtype=torch.float64), 0, 0
    for batch in data:
        reference(**batch).loss.sum().backward()
        for row, context in enumerate(reference.contexts()):
            scores[row] += torch.einsum("bhli,bhli->bhl", context.grad, context.detach()).abs().sum(-1).sum(0)
        tokens += int(batch["attention_mask"].sum())
        count += len(batch["labels"])
    scores[:-1] /= tokens
    scores[-1] /= count
    return scores


def normalized(scores: torch.Tensor) -> torch.Tensor:
    return scores / scores.square().sum(1, keepdim=True).sqrt()


def agree(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert got.dtype == torch.float64 and got.shape == expected.shape
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()
    assert got.min() > 0 and not got.requires_grad


@pytest.mark.parametrize("how", ["plain", "accelerated"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("formula", [paper, released])
def test_formulas(formula, family, how):
    model = make(f"{family}ForSequenceClassification")
    data = batches(model)
    expected = formula(model, data)
    if how == "accelerated":
        bk.accelerate(model)
    method = formula.__name__
    agree(bk.head_importance(model, data, method=method, normalize=False, progress=False), expected)
    agree(bk.head_importance(model, data, method=method, progress=False), normalized(expected))
    assert not bk.report(model).fallbacks


def test_methods_differ():
    model = make("BertForSequenceClassification")
    data = batches(model)
    one, other = (bk.head_importance(model, data, method=name, progress=False) for name in ("paper", "released"))
    assert (one - other).abs().max() > 1e-2


def test_int8_model_gives_nearly_the_same():
    model = make("BertForSequenceClassification")
    data = batches(model)
    expected = paper(model, data)
    got = bk.head_importance(bk.quantize_(model), data, normalize=False, progress=False)
    assert torch.nn.functional.cosine_similarity(got.flatten(), expected.flatten(), 0) > 0.99


def test_bf16_model():
    model = make("BertForSequenceClassification")
    data = batches(model)
    expected = paper(model, data)
    got = bk.head_importance(model.bfloat16(), data, normalize=False, progress=False)
    assert torch.nn.functional.cosine_similarity(got.flatten(), expected.flatten(), 0) > 0.98


def test_the_model_is_left_as_it_was():
    model = make("BertForSequenceClassification").train()
    model.bert.embeddings.requires_grad_(False)
    model.bert.pooler.eval()
    model.classifier.weight.grad = torch.ones_like(model.classifier.weight)
    before = {name: (p.requires_grad, p.clone()) for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    seen = []

    def loss(model, batch):
        seen.append([p.requires_grad for p in model.parameters()] + [module.training for module in model.modules()])
        return model(**batch).loss

    with torch.no_grad(), torch.inference_mode():
        scores = bk.head_importance(model, batches(model), loss=loss, progress=False)
    agree(scores, bk.head_importance(model.eval(), batches(model), progress=False), 1e-6)
    # Neither gradients of weights, which cost as much again, nor dropout.
    assert len(seen) == 2 and not any(map(any, seen))
    model.train()
    model.bert.pooler.eval()
    for module in model.bert.pooler.modules():
        module.eval()
    assert {name: module.training for name, module in model.named_modules()} == modes
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == before[name][0] and torch.equal(parameter, before[name][1]), name
        assert parameter.grad is None or (name == "classifier.weight" and bool((parameter.grad == 1).all()))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_model_is_left_as_it_was_after_an_error():
    model = make("BertForSequenceClassification").train()

    def loss(model, batch):
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        bk.head_importance(model, batches(model), loss=loss, progress=False)
    assert all(p.requires_grad for p in model.parameters()) and all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_losses_of_the_users_own():
    model = make("BertForSequenceClassification")
    data = batches(model)
    expected = bk.head_importance(model, data, normalize=False, progress=False)

    def each(model, batch):
        labels = batch["labels"]
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return nn.functional.cross_entropy(logits, labels, reduction="none")

    agree(bk.head_importance(model, data, loss=each, normalize=False, progress=False), expected)
    mean = bk.head_importance(model, data, loss=lambda *x: each(*x).mean(), normalize=False, progress=False)
    agree(mean, expected)
    tuples = [tuple(batch.values()) for batch in data]

    def of_tuples(model, batch):
        return each(model, dict(zip(data[0], batch, strict=True))).mean()

    agree(bk.head_importance(model, tuples, loss=of_tuples, normalize=False, progress=False), expected)
    objects = [SimpleNamespace(batch=batch) for batch in data]
    got = bk.head_importance(model, objects, loss=lambda m, b: each(m, b.batch).mean(), normalize=False, progress=False)
    agree(got, expected)


def test_one_batch_and_iterators():
    model = make("BertForSequenceClassification")
    data = batches(model)
    agree(
        bk.head_importance(model, data[0], progress=False),
        bk.head_importance(model, iter(data[:1]), progress=False),
        1e-9,
    )


def test_a_loss_on_pairs():
    """The model runs twice, on sentences of other lengths; an example is the pair."""
    model = make("BertModel")
    first, second = batches(model, (3, 3))
    calls = [{key: value for key, value in side.items() if key != "labels"} for side in (first, second)]

    def loss(model, batch):
        ours = [model(**side).last_hidden_state[:, 0] for side in batch]
        return (ours[0] * ours[1]).sum(-1)

    mask = torch.ones(LAYERS, 3, HEADS, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(Transformers4(model, mask), calls).sum(), mask)
    agree(bk.head_importance(model, [calls], loss=loss, normalize=False, progress=False), gradient.abs().mean(1))
    calls[1] = {key: value[:2] for key, value in calls[1].items()}
    with pytest.raises(ValueError, match=r"to have 3 sequences\. Got 2"):
        bk.head_importance(model, [calls], loss=lambda m, b: sum(m(**x).pooler_output.sum() for x in b), progress=False)


def test_choices_are_one_example():
    model = make("BertForMultipleChoice")
    batch = {**zoo.inputs(model), "labels": torch.tensor([0, 1, 0])}
    mask = torch.ones(LAYERS, 6, HEADS, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(Transformers4(model, mask)(**batch).loss, mask)
    expected = (gradient.view(LAYERS, 3, 2, HEADS).sum(2) * 3).abs().mean(1)
    agree(bk.head_importance(model, batch, normalize=False, progress=False), expected)


def test_under_a_mask():
    """Heads that are masked count for nothing, the others count as in the masked model."""
    model = make("BertForSequenceClassification")
    data = batches(model)
    mask = torch.ones(LAYERS, HEADS)
    mask[1, 2] = mask[0, 0] = 0
    gates = mask.double().requires_grad_()
    reference, expected = Transformers4(model, gates), torch.zeros(LAYERS, HEADS, dtype=torch.float64)
    for example in examples(data):
        expected += torch.autograd.grad(reference(**example).loss, gates, retain_graph=True)[0].abs() / 5
    with bk.head_mask(model, mask):
        got = bk.head_importance(model, data, normalize=False, progress=False)
    assert got[1, 2] == got[0, 0] == 0
    torch.testing.assert_close(got, expected * mask, rtol=1e-3, atol=1e-8)


def test_magnitude():
    model = make("BertForSequenceClassification")
    expected = torch.zeros(LAYERS, HEADS, dtype=torch.float64)
    for row, layer in enumerate(model.bert.encoder.layer):
        attention = layer.attention
        for head in range(HEADS):
            of = range(SIZE * head, SIZE * (head + 1))
            for projection in (attention.self.query, attention.self.key, attention.self.value):
                expected[row, head] += projection.weight[list(of)].double().abs().sum()
            expected[row, head] += attention.output.dense.weight[:, list(of)].double().abs().sum()
    agree(bk.head_importance(model, method="magnitude"), expected, 1e-12)
    agree(bk.head_importance(model, method="magnitude", normalize=True), normalized(expected), 1e-12)
    bk.accelerate(model)
    agree(bk.head_importance(model, method="magnitude"), expected, 1e-12)
    bk.quantize_(model)
    agree(bk.head_importance(model, method="magnitude"), expected, 2e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_magnitude_in_every_family(family):
    model = make(f"{family}Model")
    scores = bk.head_importance(model, method="magnitude")
    place = places(model).layers[0]
    with torch.no_grad():
        for projection in place.projections[:3]:
            projection.weight[2 * SIZE : 3 * SIZE] = 0
        place.out.weight[:, 2 * SIZE : 3 * SIZE] = 0
    after = bk.head_importance(model, method="magnitude")
    changed = (scores != after).nonzero().tolist()
    assert changed == [[row, 2] for row in place.rows] and all(after[row, 2] == 0 for row in place.rows)


def test_magnitude_under_a_pruning_mask():
    model = make("BertModel")
    query = model.encoder.layer[0].attention.self.query
    before = bk.head_importance(model, method="magnitude")
    mask = torch.ones_like(query.weight)
    mask[:SIZE] = 0
    torch.nn.utils.prune.custom_from_mask(query, "weight", mask)
    after = bk.head_importance(model, method="magnitude")
    lost = query.weight_orig[:SIZE].detach().double().abs().sum()
    assert float(before[0, 0] - after[0, 0]) == pytest.approx(float(lost))


@pytest.mark.parametrize("method", ["paper", "released", "magnitude"])
def test_ragged_models_count_heads_as_built(method):
    whole = make("BertForSequenceClassification")
    left = [(0, 2), (0, 1, 2, 3), (3,)]
    model, mask = copy.deepcopy(whole), torch.zeros(LAYERS, HEADS)
    for place, row, kept in zip(places(model).layers, mask, left, strict=True):
        row[list(kept)] = 1
        with torch.no_grad():
            place.out.weight.mul_(row.repeat_interleave(SIZE))
    shrink.shrink(model)
    data = batches(model)
    got = bk.head_importance(model, data, method=method, normalize=False, progress=False)
    with bk.head_mask(whole, mask):
        expected = bk.head_importance(whole, data, method=method, normalize=False, progress=False)
    torch.testing.assert_close(got, expected * mask, rtol=1e-3, atol=1e-8)


def test_progress(capsys):
    model = make("BertForSequenceClassification")
    bk.head_importance(model, batches(model))
    assert "head importance: 100%" in capsys.readouterr().err
    bk.head_importance(model, batches(model), progress=False)
    assert not capsys.readouterr().err


def test_what_it_refuses():
    model = make("BertForSequenceClassification")
    data = batches(model)
    unlabelled = [{key: value for key, value in batch.items() if key != "labels"} for batch in data]

    def refused(error, message, *arguments, **options):
        with pytest.raises(error, match=message):
            bk.head_importance(*(arguments or (model, data)), progress=False, **options)

    refused(ValueError, r"expected method to be one of .* Got 'random'", method="random")
    refused(ValueError, r"expected normalize to be True, False or None\. Got 1", normalize=1)
    refused(TypeError, r"expected a torch\.nn\.Module\. Got str", "bert", data)
    refused(ValueError, r"head_importance: .* Got one with 0", nn.Linear(2, 2), data)
    refused(TypeError, r"expected dataloader to be an iterable of batches\. Got NoneType", model)
    refused(TypeError, r"expected dataloader to be an iterable of batches\. Got str", model, "data")
    refused(TypeError, r"expected dataloader to be an iterable of batches\. Got Tensor", model, data[0]["input_ids"])
    refused(ValueError, r"expected at least one batch\. Got none", model, [])
    empty = {name: tensor[:0] for name, tensor in data[0].items()}
    refused(ValueError, r"expected batches of at least one example\. Got an empty one", model, [data[0], empty])
    refused(TypeError, r"expected batches to be mappings, or a loss function\. Got list", model, [[1, 2]])
    refused(ValueError, r"Got none: batches need labels, or pass loss=", model, unlabelled)
    refused(ValueError, r"Got none: batches need labels", loss=lambda model, batch: None)
    refused(ValueError, r"expected a loss of shape \[\] or \[B\]\. Got \[3, 2\]", loss=lambda m, b: m(**b).logits)
    refused(ValueError, r"expected a loss of shape \[\] or \[B\]\. Got float", loss=lambda m, b: 1.0)
    refused(ValueError, r"expected a finite loss\. Got NaN", loss=lambda m, b: m(**b).loss * float("nan"))
    refused(ValueError, r"expected a loss that depends on the model's heads", loss=lambda m, b: torch.zeros(()))
    outside = torch.zeros((), requires_grad=True)
    refused(ValueError, r"expected a loss that depends on the model's heads", loss=lambda m, b: outside * 2)

    def unused(model, batch):
        return model(**batch).loss.detach() + outside

    refused(ValueError, r"expected a loss that depends on the model's heads", loss=unused)
    with torch.no_grad():
        model.bert.encoder.layer[1].attention.self.key.weight[0, 0] = float("nan")
    refused(ValueError, r"expected finite weights\. Got NaN or Inf", method="magnitude")
