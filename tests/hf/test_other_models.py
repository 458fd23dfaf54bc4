"""Models of families that bertkern does not fuse get their linear layers swapped, and save and load all the same."""

import copy

import pytest
import torch
import transformers

import bertkern as bk

IDS = torch.randint(5, 97, (2, 9), generator=torch.Generator().manual_seed(0))
BERT = {"vocab_size": 97, "hidden_size": 52, "num_attention_heads": 2, "intermediate_size": 117, "num_hidden_layers": 2}
T5 = {"vocab_size": 97, "d_model": 52, "num_heads": 2, "d_kv": 26, "d_ff": 117, "num_layers": 2}
VIT = {**BERT, "image_size": 16, "patch_size": 4}
del VIT["vocab_size"]
CASES = {
    "AlbertModel": ("AlbertConfig", {**BERT, "embedding_size": 20}, {"input_ids": IDS}),
    "DebertaV2Model": (
        "DebertaV2Config",
        {**BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
        {"input_ids": IDS},
    ),
    "T5ForConditionalGeneration": ("T5Config", T5, {"input_ids": IDS, "decoder_input_ids": IDS}),
    "ViTModel": ("ViTConfig", VIT, {"pixel_values": torch.ones(2, 3, 16, 16)}),
    "LlamaForCausalLM": ("LlamaConfig", BERT, {"input_ids": IDS}),
    "BertLMHeadModel": ("BertConfig", {**BERT, "is_decoder": True}, {"input_ids": IDS}),
}


@pytest.mark.parametrize("name", CASES)
def test_linear_level(name, tmp_path):
    config, sizes, call = CASES[name]
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**sizes)).eval()
    with torch.no_grad():
        expected = model(**call)[0]
        fast = bk.accelerate(copy.deepcopy(model))
        torch.testing.assert_close(fast(**call)[0], expected, atol=1e-5, rtol=1e-4)
        assert torch.equal(bk.restore(fast)(**call)[0], expected)
        bk.quantize_(model)
        got = model(**call)[0]
        assert 10 * torch.log10(expected.square().sum() / (expected - got).square().sum()) > 25
        model.save_pretrained(tmp_path)
        loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert torch.equal(loaded(**call)[0], got)


def test_generation():
    config = transformers.BertConfig(**BERT, is_decoder=True)
    model = bk.quantize_(transformers.BertLMHeadModel(config).eval())
    assert model.generate(IDS, max_new_tokens=4, do_sample=False).shape == (2, 13)
