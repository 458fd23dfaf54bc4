"""attn_implementation="bertkern": any model's attention by the compiled kernel, with transformers' own answers."""

import copy
from contextlib import contextmanager

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import bertkern as bk
from tests.families.test_padding import batch
from tests.families.zoo import FAMILIES, VOCAB, make, tensors

KINDS = ("none", "trailing", "left", "holes", "everything")
INTERFACE = tuple(family for family in FAMILIES if family != "MPNet")
IDS = torch.randint(5, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(9) < torch.tensor([[9], [5]])).long()
_BERT = {
    "vocab_size": VOCAB,
    "hidden_size": 52,
    "num_attention_heads": 2,
    "intermediate_size": 117,
    "num_hidden_layers": 2,
}
_T5 = {"vocab_size": VOCAB, "d_model": 52, "num_heads": 2, "d_kv": 13, "d_ff": 117, "num_layers": 2}
_SHORT = {"vocab_size": VOCAB, "d_model": 52, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2}
# Model, config, its sizes, a call, and how often the kernel runs in it: not for cross-attention of another length, nor
# where heads share keys.
MODELS = {
    "T5EncoderModel": (
        "T5Config",
        _T5,
        {"input_ids": IDS, "attention_mask": MASK},
        2,
    ),
    "T5ForConditionalGeneration": (
        "T5Config",
        _T5,
        {"input_ids": IDS, "attention_mask": MASK, "decoder_input_ids": IDS[:, :4]},
        4,
    ),
    "GPT2LMHeadModel": (
        "GPT2Config",
        {"vocab_size": VOCAB, "n_embd": 52, "n_head": 4, "n_layer": 3, "bos_token_id": 1, "eos_token_id": 2},
        {"input_ids": IDS, "attention_mask": MASK},
        3,
    ),
    "ViTModel": (
        "ViTConfig",
        {key: value for key, value in _BERT.items() if key != "vocab_size"} | {"image_size": 16, "patch_size": 4},
        {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))},
        2,
    ),
    "BartModel": (
        "BartConfig",
        _SHORT | {"decoder_attention_heads": 2, "encoder_ffn_dim": 60, "decoder_ffn_dim": 60, "pad_token_id": 1},
        {"input_ids": IDS, "attention_mask": MASK, "decoder_input_ids": IDS[:, :4]},
        4,
    ),
    "LlamaForCausalLM": (
        "LlamaConfig",
        _BERT | {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 12},
        {"input_ids": IDS, "attention_mask": MASK},
        2,
    ),
    "LlamaModel": (
        "LlamaConfig",
        _BERT | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12},
        {"input_ids": IDS, "attention_mask": MASK},
        0,
    ),
    "BertLMHeadModel": ("BertConfig", _BERT | {"is_decoder": True}, {"input_ids": IDS, "attention_mask": MASK}, 2),
    "AlbertModel": ("AlbertConfig", _BERT | {"embedding_size": 20}, {"input_ids": IDS, "attention_mask": MASK}, 2),
}


class _Count(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func is torch.ops.bertkern.attention.default
        return func(*args, **(kwargs or {}))


@contextmanager
def runs_of_the_kernel(expected):
    """That the attention operator runs so often within."""
    with _Count() as count:
        yield
    assert count.calls == expected


def by(model, name):
    """A copy of `model` with this attention implementation."""
    twin = copy.deepcopy(model)
    twin.set_attn_implementation(name)
    return twin


def made(name, **options):
    config, sizes, call, runs = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**sizes, **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and not name.startswith("T5"):  # whose weights are large as they are
                parameter.mul_(4)
    return model, call, runs


def same(got, expected, call, tolerance=2e-5):
    """That all tensors of the outputs are equal at the real tokens of those that count them."""
    expected, got = tensors(expected), tensors(got)
    assert expected
    for name, value in expected.items():
        ours, mask = got[name], call.get("attention_mask")
        if mask is not None and value.shape[:2] == mask.shape and not name.startswith("encoder"):
            ours, value = ours[mask.bool()], value[mask.bool()]
        torch.testing.assert_close(
            ours, value, atol=tolerance, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("name", ["MPNetModel", "BloomModel", "MegatronBertModel"])
@pytest.mark.parametrize("kind", ("none", "trailing", "left", "holes"))
def test_models_whose_attention_is_not_looked_up_by_name(name, kind, tmp_path):
    """transformers takes the name for these, too; they stay what they are."""
    if name == "MPNetModel":
        model = make(name)
    else:
        config = getattr(transformers, name.replace("Model", "Config"))
        torch.manual_seed(0)
        sizes = {**_BERT, "n_head": 2, "n_layer": 2, "pad_token_id": 1, "max_position_embeddings": 40}
        model = getattr(transformers, name)(config(**sizes)).eval()
    call = batch(kind)
    model.save_pretrained(tmp_path)
    named = transformers.AutoModel.from_pretrained(tmp_path, attn_implementation="bertkern")
    real = call["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**call).last_hidden_state[real]
        torch.testing.assert_close(named(**call).last_hidden_state[real], expected, atol=2e-5, rtol=1e-4)
        got = bk.accelerate(named)(**call).last_hidden_state[real]
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", INTERFACE)
def test_encoders_that_nobody_swapped(family, kind):
    """At every position, padding too."""
    model, call = make(family + "Model"), batch(kind)
    with torch.no_grad():
        expected = by(model, "sdpa")(**call).last_hidden_state
        for mask in (call["attention_mask"], call["attention_mask"].bool(), call["attention_mask"].float()):
            with runs_of_the_kernel(3):
                got = by(model, "bertkern")(**{**call, "attention_mask": mask}).last_hidden_state
            torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
    with torch.no_grad(), runs_of_the_kernel(3):
        got = by(model, "bertkern")(call["input_ids"]).last_hidden_state
    if kind == "none":
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_other_models(name):
    model, call, runs = made(name)
    with torch.no_grad():
        expected = by(model, "sdpa")(**call)
        with runs_of_the_kernel(runs):
            got = by(model, "bertkern")(**call)
        same(got, expected, call)
        call = {key: value for key, value in call.items() if key != "attention_mask"}
        same(by(model, "bertkern")(**call), by(model, "sdpa")(**call), call)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "ViTModel"])
def test_left_padding_and_holes(name):
    model, call, _ = made(name)
    for row in ([0, 0, 0, 1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 0, 1, 1, 0]):
        mask = torch.tensor([[1] * 9, row])
        with torch.no_grad():
            expected, got = (by(model, how)(**{**call, "attention_mask": mask}) for how in ("sdpa", "bertkern"))
        same(got, expected, {"attention_mask": mask})


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "T5ForConditionalGeneration", "BartModel", "LlamaForCausalLM"])
def test_weights_are_asked_for(name):
    """Causal layers, shared keys and position biases: as transformers' own eager attention."""
    model, call, _ = made(name)
    with torch.no_grad():
        expected = by(model, "eager")(**call, output_attentions=True)
        for how in ("bertkern", "bertkern_eager"):
            with runs_of_the_kernel(0):
                got = by(model, how)(**call, output_attentions=True)
            same(got, expected, call)
            for field in ("attentions", "decoder_attentions", "encoder_attentions", "cross_attentions"):
                for a, b in zip(got.get(field) or (), expected.get(field) or (), strict=True):
                    real = call["attention_mask"].bool() if b.shape[2] == 9 else torch.ones(2, 4, dtype=torch.bool)
                    torch.testing.assert_close(a.transpose(1, 2)[real], b.transpose(1, 2)[real], atol=1e-5, rtol=1e-4)
    assert any(expected.get(field) for field in ("attentions", "encoder_attentions"))


def test_shared_keys_and_weights():
    model, call, _ = made("LlamaModel")
    with torch.no_grad():
        expected, got = (by(model, how)(**call, output_attentions=True) for how in ("eager", "bertkern"))
    same(got, expected, call)
    assert len(got.attentions) == 2


@pytest.mark.parametrize("family", INTERFACE)
def test_attentions_of_encoders(family):
    model, call = make(family + "Model"), batch("everything")
    with torch.no_grad():
        expected = by(model, "eager")(**call, output_attentions=True).attentions
        got = by(model, "bertkern")(**call, output_attentions=True).attentions
    some = call["attention_mask"].bool().any(1)  # sdpa has no answer for a row without tokens
    assert len(got) == len(expected) == 3
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a[some], b[some], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "name", ["GPT2LMHeadModel", "T5ForConditionalGeneration", "LlamaForCausalLM", "BertLMHeadModel"]
)
def test_generation_uses_a_cache(name):
    model = made(name)[0]
    ids = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    model.generation_config.decoder_start_token_id = 0
    kernel = by(model, "bertkern")
    made_tokens = [m.generate(**ids, max_new_tokens=6, do_sample=False) for m in (by(model, "sdpa"), kernel)]
    assert torch.equal(*made_tokens)


def encoder_decoder():
    """transformers gives its encoder a config of its own, at which the encoder's layers do not look."""
    torch.manual_seed(0)
    encoder = transformers.BertModel(transformers.BertConfig(**_BERT))
    config = transformers.BertConfig(**_BERT, is_decoder=True, add_cross_attention=True)
    model = transformers.EncoderDecoderModel(encoder=encoder, decoder=transformers.BertLMHeadModel(config)).eval()
    return model, {"input_ids": IDS, "attention_mask": MASK, "decoder_input_ids": IDS[:, :4]}


@pytest.mark.parametrize("name", ["bertkern", {"encoder": "bertkern", "decoder": "bertkern"}], ids=["all", "each"])
def test_layers_that_look_at_another_config_than_their_model(name):
    model, call = encoder_decoder()
    with torch.no_grad():
        expected = model(**call)
        same(by(model, name)(**call), expected, call)
        same(bk.accelerate(by(model, name))(**call), expected, call)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_swapped_layers_that_look_at_another_config_than_their_model(attention):
    model, call = encoder_decoder()
    model.set_attn_implementation(attention)
    inside = [module.config for module in model.encoder.modules() if hasattr(module, "config")]
    before = [config._attn_implementation for config in inside]
    with torch.no_grad():
        expected = model(**call).logits
        bk.accelerate(model.encoder)
        torch.testing.assert_close(model(**call).logits, expected, atol=2e-5, rtol=1e-4)
        attentions = model(**call, output_attentions=True).encoder_attentions
        assert len(attentions) == 2 and not attentions[0][1, ..., 5:].any()
        model.encoder.encoder.layer[1].intermediate.register_forward_hook(lambda *_: None)
        torch.testing.assert_close(model(**call).logits, expected, atol=2e-5, rtol=1e-4)
    bk.restore(model.encoder)
    assert [config._attn_implementation for config in inside] == before


def four_dimensional(seed=3):
    """Masks [B, 1 or heads, L, L] of every kind, by name."""
    generator = torch.Generator().manual_seed(seed)
    keys = batch("everything")["attention_mask"].bool()[:, None, None]
    free = torch.rand(6, 1, 11, 11, generator=generator) < 0.6
    free[2, :, 4] = False
    lowest = torch.finfo(torch.float32).min
    weights = torch.randn(6, 1, 11, 11, generator=generator)
    return {
        "keys": keys.expand(-1, -1, 11, -1),
        "keys, written out": keys.expand(-1, -1, 11, -1).contiguous(),
        "free": free,
        "of each head": torch.rand(6, 2, 11, 11, generator=generator) < 0.6,
        "one for all": torch.rand(1, 1, 11, 11, generator=generator) < 0.6,
        "causal": torch.ones(11, 11, dtype=torch.bool).tril().expand(6, 1, 11, 11),
        "weights": weights,
        "weights of each head": torch.randn(6, 2, 11, 11, generator=generator),
        "lowest": torch.zeros(keys.shape).masked_fill(~keys, lowest).expand(-1, -1, 11, -1),
        "lowest and weights": weights.masked_fill(~free, lowest),
        "infinite": weights.masked_fill(~free, -torch.inf),
        "infinite, rows": torch.zeros(keys.shape).masked_fill(~keys, -torch.inf),
    }


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("name", four_dimensional())
def test_masks_of_four_dimensions(name, swapped):
    model, call = (
        make("BertModel"),
        {"input_ids": batch("none")["input_ids"], "attention_mask": four_dimensional()[name]},
    )
    kernel = by(model, "bertkern")
    if swapped:
        bk.accelerate(kernel)
    with torch.no_grad():
        expected = by(model, "sdpa")(**call).last_hidden_state
        got = kernel(**call).last_hidden_state
        if not swapped:
            with runs_of_the_kernel(3):
                kernel(**call)
    computed = got.abs().sum(-1) > 0
    assert computed.all() or (swapped and name.split(",")[0] in ("keys", "lowest", "infinite"))
    torch.testing.assert_close(got[computed], expected[computed], atol=2e-5, rtol=1e-4, equal_nan=True)


@pytest.mark.parametrize("swap", [bk.accelerate, bk.quantize_])
def test_swapped_models_use_it_where_they_do_not_run_fused(swap):
    model, call = swap(make("BertModel")), batch("everything")
    with torch.no_grad():
        expected = model(**call).last_hidden_state
        handle = model.encoder.layer[1].intermediate.register_forward_hook(lambda *_: None)
        with runs_of_the_kernel(1):  # the other layers stay operators
            got = model(**call).last_hidden_state
        handle.remove()
        with runs_of_the_kernel(0):
            model(**call)
    real = call["attention_mask"].bool()
    torch.testing.assert_close(got[real], expected[real], atol=2e-5 if swap is bk.accelerate else 0.1, rtol=1e-4)


@pytest.mark.parametrize("kind", ["trailing", "everything"])
@pytest.mark.parametrize("family", ["Bert", "DistilBert"])
def test_gradients(family, kind):
    model, call = make(family + "ForTokenClassification"), batch(kind)
    real = call["attention_mask"].bool()
    found = []
    for how, runs in (("sdpa", 0), ("bertkern", 3)):
        twin = by(model, how)
        with runs_of_the_kernel(runs):
            logits = twin(**call).logits
        logits[real].square().sum().backward()
        found.append({name: p.grad for name, p in twin.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        scale = max(float(expected.abs().max()), 1e-3)
        torch.testing.assert_close(found[1][name], expected, atol=1e-4 * scale, rtol=1e-3, msg=name)


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "T5EncoderModel"])
def test_gradients_of_causal_layers_and_position_biases(name):
    model, call, _ = made(name, **({"resid_pdrop": 0.0} if name.startswith("GPT") else {}))
    found = []
    for how in ("sdpa", "bertkern"):
        twin = by(model, how)
        output = twin(**call)[0]
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(7)) * MASK[..., None]
        (output * weights).sum().backward()
        found.append({name: p.grad for name, p in twin.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        scale = max(float(expected.abs().max()), 1e-3)
        torch.testing.assert_close(found[1][name], expected, atol=2e-4 * scale, rtol=1e-3, msg=name)


def test_dropout_in_training_stays_with_torch():
    call = batch("trailing")
    model = by(make("BertModel", attention_probs_dropout_prob=0.3, hidden_dropout_prob=0.0), "bertkern").train()
    with runs_of_the_kernel(0):
        torch.manual_seed(1)
        got = model(**call).last_hidden_state
    torch.manual_seed(1)
    torch.testing.assert_close(got, by(model, "sdpa")(**call).last_hidden_state)
    with runs_of_the_kernel(3):
        model.eval()(**call)
    model = by(make("BertModel", attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0), "bertkern").train()
    with runs_of_the_kernel(3):
        loss = model(**call).last_hidden_state.sum()
    loss.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    model, call = make("BertModel").to(dtype), batch("holes")
    with torch.no_grad():
        expected = make("BertModel").double()(**call).last_hidden_state
        theirs = by(model, "sdpa")(**call).last_hidden_state
        with runs_of_the_kernel(0 if dtype == torch.float64 else 3):
            ours = by(model, "bertkern")(**call).last_hidden_state
    assert ours.dtype == dtype
    errors = [(x.double() - expected).abs().max() for x in (ours, theirs)]
    assert errors[0] <= 1.5 * errors[1] + 1e-9


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend):
    torch._dynamo.reset()
    model = by(make("BertModel"), "bertkern")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for kind in KINDS:
        call = batch(kind)
        with torch.no_grad():
            torch.testing.assert_close(
                compiled(**call).last_hidden_state, model(**call).last_hidden_state, atol=1e-5, rtol=1e-4
            )
    compiled(**batch("everything")).last_hidden_state.sum().backward()


def test_exported():
    model = by(make("BertModel"), "bertkern")
    sizes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", max=32)}
    call = batch("trailing")
    with torch.no_grad():
        program = torch.export.export(model, (), call, dynamic_shapes=dict.fromkeys(call, sizes))
        assert str(program.graph).count("torch.ops.bertkern.attention") == 3
        for kind in KINDS:
            got, expected = (run(**batch(kind)).last_hidden_state for run in (program.module(), model))
            torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


def test_a_row_does_not_depend_on_the_others():
    """In attention; linear layers are torch's own here, whose bits may."""
    attend = transformers.AttentionInterface()["bertkern"]
    module, mask = torch.nn.Module(), batch("everything")["attention_mask"].bool()
    module.is_causal = False
    q, k, v = torch.randn(3, 6, 2, 11, 26, generator=torch.Generator().manual_seed(0)).unbind()
    together = attend(module, q, k, v, mask)[0]
    for row in range(6):
        part = [x[row : row + 1] for x in (q, k, v, mask)]
        assert torch.equal(attend(module, *part)[0][0], together[row])
    short = attend(module, q[:1, :, :4], k[:1, :, :4], v[:1, :, :4], None)[0]
    assert torch.equal(short[0], together[0, :4])
    poisoned = v.masked_fill(~mask[:, None, :, None], torch.nan)
    assert torch.equal(attend(module, q, k, poisoned, mask)[0], together)


@pytest.mark.parametrize("shape", [(0, 2, 11, 26), (3, 2, 0, 26), (3, 2, 1, 26)])
def test_batches_without_rows_and_single_tokens(shape):
    attend = transformers.AttentionInterface()["bertkern"]
    q, k, v = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)).unbind()
    for mask in (None, torch.ones(shape[0], shape[2], dtype=torch.bool)):
        with runs_of_the_kernel(1):
            got = attend(torch.nn.Module(), q, k, v, mask)[0]
        torch.testing.assert_close(got, v.transpose(1, 2))  # one key, if any


def test_masked_heads_are_skipped():
    """By the keyword: NaN that a masked head computes reaches nobody."""
    model, call = by(make("BertModel"), "bertkern"), batch("holes")
    mask = torch.ones(3, 2)
    mask[1, 1] = 0
    with torch.no_grad():
        expected = model(**call, head_mask=mask).last_hidden_state
        model.encoder.layer[1].attention.self.value.weight[26:] = torch.nan
        with runs_of_the_kernel(3):
            assert torch.equal(model(**call, head_mask=mask).last_hidden_state, expected)
        assert model(**call).last_hidden_state.isnan().any()


def test_a_second_derivative_is_refused():
    model = by(make("BertModel"), "bertkern")
    embeds = torch.randn(2, 5, 52, requires_grad=True)
    hidden = model(inputs_embeds=embeds).last_hidden_state
    with pytest.raises(RuntimeError, match=r"attention: expected one backward pass. Got a second derivative"):
        torch.autograd.grad(hidden.square().sum(), embeds, create_graph=True)


def test_masks_that_do_not_fit_fail_as_in_transformers():
    model = make("BertModel")
    for mask in (torch.ones(2, 1, 9, 8, dtype=torch.bool), torch.ones(3, 1, 9, 9), torch.ones(2, 3, 9, 9)):
        for how in ("sdpa", "bertkern"):
            with pytest.raises(RuntimeError, match=r"size|shape|expand"):
                by(model, how)(IDS, attention_mask=mask)


def test_importing_bertkern_registers_it(run_python, tmp_path):
    make("BertModel").save_pretrained(tmp_path)
    code = f"""
import bertkern, torch, transformers
for name in ("bertkern", "sdpa"):
    model = transformers.AutoModel.from_pretrained({str(tmp_path)!r}, attn_implementation=name).eval()
    assert model.config._attn_implementation == name
    with torch.no_grad(), torch.profiler.profile() as profile:
        print(model(torch.arange(5, 12)[None]).last_hidden_state.sum().item())
    counts = {{event.key: event.count for event in profile.key_averages()}}
    assert counts.get("bertkern::attention", 0) == (3 if name == "bertkern" else 0), counts
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr[-2000:]
    ours, theirs = map(float, result.stdout.split())
    assert ours == pytest.approx(theirs, abs=1e-3)
