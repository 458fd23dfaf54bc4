"""From training to the kernels: converted layers and models give what the simulated ones did, also under a Trainer."""

import pytest
import torch
from torch import Tensor, nn

import bertkern as bk
from bertkern.compress.groupwise import (
    FakeQuantGroupwiseEmbedding,
    FakeQuantGroupwiseLinear,
    convert,
    prepare_qat,
)
from bertkern.config import GroupwiseConfig
from bertkern.nn import GroupwiseEmbedding, GroupwiseLinear
from tests import reference
from tests.compress.test_groupwise_qat import CONFIGS
from tests.compress.test_q8bert_trainer import Majority
from tests.tiny_models import inputs, main_output, tiny


def trained(
    config: GroupwiseConfig, name: str = "BertForSequenceClassification", steps: int = 4, **options
) -> nn.Module:
    """A prepared model after some steps of training, in evaluation mode."""
    model = prepare_qat(tiny(name), config, **options).train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    for seed in range(steps):
        optimizer.zero_grad()
        main_output(model(**inputs(model, seed=seed))).square().mean().backward()
        optimizer.step()
    return model.eval()


def watched(model: nn.Module, batch: dict[str, Tensor]) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
    """Inputs and outputs of the simulated layers by name, and the model's output."""
    seen, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, (FakeQuantGroupwiseLinear, FakeQuantGroupwiseEmbedding)):

            def hook(_: nn.Module, args: tuple[Tensor], output: Tensor, name: str = name) -> None:
                seen[name] = args[0], output

            handles.append(module.register_forward_hook(hook))
    with torch.no_grad():
        expected = main_output(model(**batch))
    for handle in handles:
        handle.remove()
    return seen, expected


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("weight_decay", [None, 0.9])
def test_every_layer_within_a_code(config, weight_decay):
    model = trained(config, weight_decay=weight_decay)
    weights = {n: m.groupwise_weight() for n, m in model.named_modules() if isinstance(m, FakeQuantGroupwiseLinear)}
    batch = inputs(model, seed=40)
    seen, expected = watched(model, batch)
    assert convert(model, exact_attention=True) is model
    with torch.no_grad():
        for name, (x, y) in seen.items():
            layer = model.get_submodule(name)
            assert isinstance(layer, (GroupwiseLinear, GroupwiseEmbedding))
            got = layer(x)
            if isinstance(layer, GroupwiseEmbedding) or config.activation == "float":
                assert torch.allclose(got, y, atol=2e-5)
                continue
            assert torch.equal(layer.weight_codes, weights[name].codes)
            # One code of one input more or less, and the order of sums.
            low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
            step = (high - low) / 255
            if config.activation == "static":
                step = layer.input_scale
            bound = step * layer.dequantized_weight().abs().amax(1) + 1e-4
            assert bool(((got - y).abs() <= bound).all())
        assert reference.sqnr(expected, main_output(model(**batch))) > 35


@pytest.mark.parametrize("name", ["DistilBertModel", "MPNetModel", "AlbertModel", "RobertaForTokenClassification"])
def test_families(name):
    model = trained(GroupwiseConfig(bits=3, groups=8), name)
    batch = inputs(model, seed=40, padding=False)
    _, expected = watched(model, batch)
    with torch.no_grad():
        assert reference.sqnr(expected, main_output(convert(model, exact_attention=True)(**batch))) > 35
    assert not any(isinstance(m, (FakeQuantGroupwiseLinear, FakeQuantGroupwiseEmbedding)) for m in model.modules())


@pytest.mark.parametrize("head", [False, True])
def test_a_tied_decoder(head):
    model = trained(GroupwiseConfig(groups=8, head=head), "BertForMaskedLM")
    batch = inputs(model, seed=40, padding=False)
    _, expected = watched(model, batch)
    with torch.no_grad():
        got = main_output(convert(model, exact_attention=True)(**batch))
    assert model.cls.predictions.decoder.table[0] is model.bert.embeddings.word_embeddings
    assert reference.sqnr(expected, got) > 35


def test_a_converted_model_saves_and_loads(tmp_path):
    import transformers

    model = convert(trained(CONFIGS[4]))
    batch = inputs(model, seed=40)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(main_output(loaded(**batch)), main_output(model(**batch)))


def test_pruned_weights_are_masked_first():
    from torch.nn.utils import prune

    model = tiny("BertModel")
    prepare_qat(model, GroupwiseConfig(bits=8, groups=8, symmetric=True))
    layer = model.encoder.layer[0].output.dense
    prune.random_unstructured(layer, "weight", 0.5)
    mask = layer.weight_mask.clone()
    with torch.no_grad():
        layer.weight_orig.add_(0.5)
    convert(model)
    assert bool((model.encoder.layer[0].output.dense.dequantized_weight()[mask == 0] == 0).all())


def test_refusals_leave_the_model_prepared():
    with pytest.raises(ValueError, match=r"expected a model prepared by prepare_qat"):
        convert(tiny("BertModel"))
    untrained = prepare_qat(tiny("BertModel"), GroupwiseConfig(groups=8, activation="static"))
    with pytest.raises(ValueError, match=r"to have a range of its inputs: train past start_step"):
        convert(untrained)
    model = trained(GroupwiseConfig(groups=8, activation="static"), weight_decay=0.5)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(TypeError):
        convert(model, unknown=1)
    model.bert.pooler.dense.weight.data[0, 0] = 0.25
    assert list(model.state_dict()) == list(state)
    assert isinstance(model.bert.encoder.layer[0].output.dense, FakeQuantGroupwiseLinear)
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"expected bert.encoder.layer.0.output.dense.weight to be finite"):
        convert(model)
    assert isinstance(model.bert.encoder.layer[0].output.dense, FakeQuantGroupwiseLinear)


# --- the Trainer ----------------------------------------------------------------------------------------------------


def trainer(folder, callback, **options):
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    from transformers import Trainer, TrainingArguments

    settings = {"max_steps": 60, "save_strategy": "no", **options}
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=16,
        per_device_eval_batch_size=64,
        learning_rate=1e-3,
        logging_steps=10,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
        **settings,
    )
    model = tiny("BertForSequenceClassification", num_labels=2, initializer_range=0.05)
    return Trainer(model, arguments, train_dataset=Majority(512, 0), eval_dataset=Majority(256, 1), callbacks=callback)


def test_callback_prepares_trains_and_converts(tmp_path):
    config = GroupwiseConfig(bits=3, groups=8, activation="static")
    run = trainer(tmp_path, [bk.GroupwiseQatCallback(config, start_step=3, weight_decay=0.9, convert=True)])
    layer = run.model.bert.encoder.layer[0].output.dense
    assert isinstance(layer, FakeQuantGroupwiseLinear) and layer.settings.start_step == 3
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    assert isinstance(run.model.bert.encoder.layer[0].output.dense, GroupwiseLinear)
    assert run.evaluate()["eval_loss"] < 0.5 * losses[0]


def test_training_resumes_with_its_ranges(tmp_path):
    config = GroupwiseConfig(bits=3, groups=8, activation="static")
    first = trainer(
        tmp_path, [bk.GroupwiseQatCallback(config, start_step=2)], max_steps=6, save_strategy="steps", save_steps=6
    )
    first.train()
    kept = first.model.bert.encoder.layer[1].output.dense
    second = trainer(tmp_path, [bk.GroupwiseQatCallback(config, start_step=2)], max_steps=7)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    resumed = second.model.bert.encoder.layer[1].output.dense
    assert kept._step == 6 and resumed._step == 7
    assert resumed.input_range() == pytest.approx(kept.input_range(), rel=0.2)


def test_callback_added_later_and_accumulation(tmp_path):
    run = trainer(tmp_path, None, max_steps=2, gradient_accumulation_steps=2)
    run.add_callback(bk.GroupwiseQatCallback(GroupwiseConfig(groups=8), start_step=5))
    run.train()
    layer = run.model.bert.encoder.layer[0].output.dense
    assert layer.settings.start_step == 10 and layer._step == 4
    with pytest.raises(TypeError, match=r"expected a GroupwiseConfig. Got Int8Config"):
        bk.GroupwiseQatCallback(bk.Int8Config())
