"""A sequence has the same bits alone, in any batch, with any trailing padding, with one thread and with two."""

import pytest
import torch

import bertkern as bk

from .zoo import FAMILIES, inputs, make

LENGTHS = (11, 7, 1, 4, 16, 11)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("swap", [bk.accelerate, bk.quantize_])
@pytest.mark.parametrize(
    "name",
    [
        f"{family}{head}"
        for family in FAMILIES
        for head in ("Model", "ForSequenceClassification", "ForTokenClassification")
    ],
)
def test_bits_do_not_depend_on_company(name, swap, threads):
    model = swap(make(name))
    ids = inputs(model, batch=len(LENGTHS), length=16)["input_ids"]
    mask = (torch.arange(16)[None] < torch.tensor(LENGTHS)[:, None]).long()
    ids = torch.where(mask == 0, 1, ids)
    seen: dict[int, list[dict]] = {index: [] for index in range(len(LENGTHS))}

    def keep(index, output, row):
        parts = {}
        for key, value in output.items():
            value = value[row]
            parts[key] = value[: LENGTHS[index]] if key in ("last_hidden_state",) or "Token" in name else value
        seen[index].append(parts)

    with torch.no_grad():
        for count in (1, 2):
            threads(count)
            together = model(input_ids=ids, attention_mask=mask)
            for index, length in enumerate(LENGTHS):
                keep(index, together, index)
                alone = ids[index : index + 1, :length]
                keep(index, model(input_ids=alone, attention_mask=torch.ones_like(alone)), 0)
                keep(index, model(input_ids=alone), 0)
                padded = slice(0, length + 3)
                keep(
                    index,
                    model(input_ids=ids[index : index + 1, padded], attention_mask=mask[index : index + 1, padded]),
                    0,
                )
            pair = model(input_ids=ids[[5, 1], :11], attention_mask=mask[[5, 1], :11])
            keep(5, pair, 0)
            keep(1, pair, 1)
    for index, results in seen.items():
        for other in results[1:]:
            for key, value in results[0].items():
                assert torch.equal(value, other[key]), (index, key)
    assert not bk.report(model).fallbacks
