"""Static int8 models where users have them: calibrated on sentences, in a pipeline, in a SentenceTransformer."""

import pytest
import torch
import transformers

import bertkern as bk
from bertkern.nn import Int8Linear
from tests import reference
from tests.tiny_models import tiny

WORDS = (
    *("a", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "while"),
    *("some", "old", "cat", "sleeps", "under", "that", "warm", "green", "tree"),
)
SENTENCES = [" ".join(WORDS[start : start + length]) for start in range(8) for length in (3, 7, 11)]
CONFIGS = [
    bk.Int8Config(activation="static"),
    bk.Int8Config(activation="static", activation_unsigned=True),
    bk.Int8Config(activation="static", weight="per_tensor"),
]


@pytest.fixture
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


@pytest.mark.parametrize("config", CONFIGS)
def test_pipeline(config, tokenizer, tmp_path):
    model = tiny("BertForSequenceClassification", pad_token_id=0)
    exact = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None)(SENTENCES)
    bk.quantize_(model, config, calibration=SENTENCES, tokenizer=tokenizer, batch_size=5, progress=False)
    classify = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None)
    got = classify(SENTENCES)
    assert not bk.report(model).fallbacks
    for expected, scores in zip(exact, got, strict=True):
        named = {entry["label"]: entry["score"] for entry in scores}
        assert all(abs(entry["score"] - named[entry["label"]]) < 0.1 for entry in expected)
    assert classify(SENTENCES, batch_size=7) == got, "a result does not depend on the batch"
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert transformers.pipeline("text-classification", model=str(tmp_path), top_k=None)(SENTENCES) == got


@pytest.mark.parametrize("config", CONFIGS)
def test_sentence_transformer(config, tokenizer, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    import sentence_transformers.models as modules

    tiny("BertModel", pad_token_id=0).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    parts = [modules.Transformer(str(tmp_path / "bert"), max_seq_length=16), modules.Pooling(48), modules.Dense(48, 13)]
    model = sentence_transformers.SentenceTransformer(modules=parts, device="cpu")
    exact = torch.from_numpy(model.encode(SENTENCES))
    # It tokenizes by itself.
    bk.quantize_(model, config, calibration=SENTENCES, progress=False)
    layers = [module for module in model.modules() if isinstance(module, Int8Linear)]
    assert len(layers) == 13 and all(layer.input_scale > 0 for layer in layers)
    got = torch.from_numpy(model.encode(SENTENCES))
    assert reference.sqnr(exact, got) > 15 and not bk.report(model).fallbacks
    model.save_pretrained(str(tmp_path / "saved"))
    loaded = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    # The Dense behind the transformers model loads as torch's own.
    assert torch.equal(torch.from_numpy(bk.accelerate(loaded).encode(SENTENCES)), got)
