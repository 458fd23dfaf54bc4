"""The report says what was swapped and why not; inspect says what is there."""

import json

import torch
from torch import nn

import bertkern as bk

from .families.zoo import inputs, make


def test_report_as_table_and_data():
    model = make("BertForSequenceClassification")
    assert {row.runs for row in bk.report(model).rows} == {"torch"}
    bk.quantize_(model, bk.Int8Config(skip=("layer.1.output",), head=False))
    text = str(bk.report(model))
    lines = [line.split() for line in text.splitlines()]
    assert ["bert.encoder.layer.*.attention.self.query", "3", "52", "x", "52", "int8"] in lines
    assert any(line[0] == "bert.encoder.layer.0,2.output.dense" and line[1] == "2" for line in lines)
    assert "skipped by the config" in text and "the config leaves the head" in text
    data = bk.report(model).to_dict()
    assert json.loads(json.dumps(data)) == data
    assert {row["runs"] for row in data["rows"]} == {"int8", "fp32", "one operator", "its parts, one by one"}
    with torch.no_grad():
        model(**inputs(model), output_attentions=True)
    assert "plain path taken 1x: bert.encoder: output_attentions was given" in str(bk.report(model))


def test_inspect_changes_nothing():
    model = make("BertModel")
    dense = model.encoder.layer[1].output.dense
    with torch.no_grad():
        dense.weight[:, ::2] = 0
        dense.weight[3] = 0
    rows = {row.name: row for row in bk.inspect(model).rows}
    row = rows["encoder.layer.1.output.dense"]
    assert (row.dead_rows, row.dead_columns, row.runs) == (1, 59, "int8") and 0.5 < row.zeros < 0.52
    assert rows["pooler.dense"].zeros == 0
    assert type(dense) is nn.Linear
    assert "51%" in str(bk.inspect(model))
    assert bk.inspect(bk.quantize_(model)).rows[0].runs == "int8 already"


def test_what_stays_with_torch_is_named():
    model = nn.ModuleDict(
        {"a": nn.Linear(3, 4).double(), "b": nn.utils.weight_norm(nn.Linear(3, 4)), "c": nn.Linear(2, 2)}
    )
    bk.quantize_(model)
    rows = {row.name: row for row in bk.report(model).rows}
    assert rows["a"].why == "no kernel for float64"
    assert rows["b"].why == "its weight is computed by a hook"
    assert rows["c"].runs == "int8"
    assert "not batch-invariant" in str(bk.report(model))
