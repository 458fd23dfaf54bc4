"""The benchmark of attention, and the command line of all. Nothing here judges a speed."""

from __future__ import annotations

import argparse

import pytest
import torch

from benchmarks import attention, encoder, engines, opening
from tests import reference

from .shown_runs import show

# --- attention ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bertkern-fp32", "bertkern-bf16", "torch-fp32", "torch-bf16", "torch-eager-bf16"])
@pytest.mark.parametrize("shape", ["1x16", "3x17:0.4"])
@pytest.mark.parametrize("kept", ["", "2", "mask3"])
def test_providers_of_attention_agree_with_the_reference(name, shape, kept):
    case = encoder.Case.parse(shape)
    layer = {"lengths": case.lengths().tolist(), "tokens": case.tokens, "heads": 4, "head_dim": 26}
    number, masked = attention.kept_heads(kept, 4)
    expected, engine = (engines.create(f"attention/{key}", threads=1) for key in ("reference", name))
    expected.prepare(**layer, kept=number, masked=False)
    if masked and not name.startswith("bertkern"):
        with pytest.raises(ValueError, match="has no head masks"):
            engine.prepare(**layer, kept=number, masked=True)
        return
    engine.prepare(**layer, kept=number, masked=masked)
    got = engine.outputs()
    assert opening.check(name, engines.agreement(expected.outputs(), got))["sqnr_db"] > (100 if "fp32" in name else 35)
    assert not got["context"][..., number * 26 :].any(), "heads that do not count are zero"
    assert got["mask_context"].sum() == case.lengths().sum()
    engine.run()


def test_the_reference_of_attention_is_that_of_the_tests():
    from benchmarks.engines import attention_engine

    q, k, v = attention_engine.draw([9, 4], 9, 3, 8)
    engine = engines.create("attention/reference", threads=1)
    engine.prepare([9, 4], 9, 3, 8, kept=3, masked=False)
    packed = [torch.cat([part[0].transpose(0, 1), part[1, :, :4].transpose(0, 1)]) for part in (q, k, v)]
    expected = reference.packed_attention(*packed, [0, 9, 13]).flatten(1)
    got = torch.from_numpy(engine.outputs()["context"])
    torch.testing.assert_close(torch.cat([got[0], got[1, :4]]), expected.float())
    one = [part[1, 0, :4, None] for part in (q, k, v)]
    torch.testing.assert_close(
        attention_engine._in_float64(*one, [0, 4]), reference.packed_attention(*one, [0, 4]), rtol=1e-12, atol=1e-12
    )


def test_heads_left_are_read_and_bounded():
    assert attention.kept_heads("", 12) == (12, False)
    assert attention.kept_heads("6", 12) == (6, False)
    assert attention.kept_heads("mask1", 12) == (1, True)
    for text in ("0", "13", "mask13", "six", "mask"):
        with pytest.raises(ValueError, match=f"kept: expected heads from 1 to 12, like 6 or mask6. Got '{text}'"):
            attention.kept_heads(text, 12)


def test_attention_is_measured_with_fewer_heads_beside_torch(tmp_path):
    said = []
    run = attention.run(
        ["bertkern-fp32", "torch-fp32", "bertkern-bf16"],
        encoder.parse_shapes("1x7,2x9:0.3"),
        heads=3,
        head_dim=16,
        kept=["2", "mask1"],
        dtypes=["fp32"],
        threads=1,
        rounds=2,
        seconds=0.001,
        report=said.append,
    )
    assert said == []
    assert run.name == "attention-3x16-1t"
    assert run.providers("latency_ms") == ["bertkern-fp32", "torch-fp32", "bertkern-fp32:2", "bertkern-fp32:mask1"]
    assert run.providers("ratio") == ["torch-fp32 / bertkern-fp32"]
    assert run.providers("time_share") == ["bertkern-fp32:2", "bertkern-fp32:mask1"]
    row, rate = (run.find("bertkern-fp32:2", metric, "2x9:0.3") for metric in ("latency_ms", "gmac_s"))
    squares = 9**2 + 4**2
    assert rate.median == pytest.approx(2 * squares * 2 * 16 / (row.median * 1e6), rel=1e-3)
    assert row.config["kept"] == 2
    share = run.find("bertkern-fp32", "share_of_peak", "1x7")
    if share:
        rate = run.find("bertkern-fp32", "gmac_s", "1x7")
        assert share.median == pytest.approx(rate.median / share.config["fp32_peak_gmac_s"], rel=0.01)
    text = show(run, tmp_path)
    assert "GMAC/s" in text and "bertkern-fp32:mask1" in text and "float64" in text


# --- the command line -----------------------------------------------------------------------------------------------


def test_bench_attention_writes_json_csv_and_a_plot(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from bertkern.cli import main

    options = "--shapes 1x5 --heads 2 --head-dim 16 --kept 1 --dtypes fp32 --rounds 1 --threads 1 --name tiny"
    arguments = ["--engines", "bertkern-fp32,torch-fp32", "--out", str(tmp_path)]
    assert main(["bench", "attention", *options.split(), *arguments]) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        f"attention-2x16-1t-tiny.{kind}" for kind in ("csv", "json", "png")
    ]
    assert "bertkern-fp32:1" in capsys.readouterr().out


@pytest.mark.parametrize(
    "what", ["attention", "padding", "heads", "sentences", "importance", "hessian", "encoder", "memory"]
)
def test_each_benchmark_has_help_of_its_own(what, capsys):
    from bertkern.cli import main

    with pytest.raises(SystemExit) as stop:
        main(["bench", what, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert f"    python -m bertkern bench {what}" in out, "examples"
    assert ("--kept" in out) == (what == "attention")
    assert ("--rounds" in out) and ("--epilogues" not in out)


def test_every_option_of_a_benchmark_is_on_the_command_line():
    from bertkern.cli import bench
    from bertkern.cli.measuring import benchmarks

    known = set()
    for name in bench.BENCHMARKS:
        known |= set(benchmarks(name).OPTIONS)
        parser = argparse.ArgumentParser()
        bench._add_options(parser, benchmarks(name).OPTIONS, rounds=1, threads=None)
    assert known == set(bench.OPTIONS)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("attention", "--kept", "13"), "kept: expected heads from 1 to 12, like 6 or mask6. Got '13'"),
        (("attention", "--heads", "0"), "heads: expected a whole number of at least 1. Got '0'"),
        (("attention", "--head-dim", "x"), "head-dim: expected a whole number of at least 1. Got 'x'"),
        (("attention", "--dtypes", "int8"), "dtype: expected one of fp32, bf16. Got 'int8'"),
        (("attention", "--engines", "nothing"), "engine: expected one of bertkern-fp32, bertkern-bf16"),
        (("attention", "--model", "minilm"), "bench attention: --model belongs to another benchmark"),
        (("encoder", "--head-dim", "4"), "bench encoder: --head-dim belongs to another benchmark"),
        (("encoder", "--pattern", "heads@2"), "share: expected a share of the heads above 0 and up to 1"),
        (("padding", "--texts", "bible"), "texts: expected one of stsb, rotten-tomatoes. Got 'bible'"),
        (("padding", "--batch", "0"), "batch: expected a whole number of at least 1. Got '0'"),
        (("heads", "--share", "0"), "share: expected a share of the heads above 0 and up to 1, like 0.5. Got '0'"),
        (("heads", "--model", "/no/such"), "model: expected bert-base, minilm or a folder"),
        (("importance", "--sentences", "-1"), "sentences: expected a whole number of at least 1"),
        (("sentences", "--engines", "nothing"), "engine: expected one of bertkern-int8, bertkern-fp32, torch-fp32"),
    ],
)
def test_mistakes_on_the_command_line(arguments, said, capsys):
    from bertkern.cli import main

    assert main(["bench", *arguments]) == 2
    assert said in capsys.readouterr().err
