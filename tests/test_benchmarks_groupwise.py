"""The benchmark of group-wise weights: groupings, providers, a run. Nothing here judges a speed."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import engines, groupings, groupwise, opening, plots, readme_table, results, tables
from bertkern.cli import main


def provider(name: str) -> engines.Engine:
    missing = engines.missing(f"groupwise/{name}")
    if missing:
        pytest.skip(f"needs {missing}")
    return engines.create(f"groupwise/{name}", threads=1)


def test_groupings_are_spelled_in_one_way():
    (grouping,) = groupings.parse_groupings("2+4n128")
    assert grouping == groupings.Grouping((2, 4), "n", 128) and str(grouping) == "2+4n128"
    assert grouping.group_size(768) == 6 and grouping.bits_of(768, 10)[:3].tolist() == [2, 4, 2]
    codes = grouping.draw(768, 10)
    assert codes[:6].max() == 3 and codes[6:12].max() == 15
    np.testing.assert_array_equal(codes, grouping.draw(768, 10))
    for text in ("4", "n128", "4n", "9n4", "4m4", "4k0", ""):
        with pytest.raises(ValueError, match="grouping: expected BITSnGROUPS"):
            groupings.parse_groupings(text)


@pytest.mark.parametrize("name", engines.GROUPWISE)
@pytest.mark.parametrize("grouping", ["8n128", "4n7", "2+4n128", "4k32", "4k64", "3k24"])
def test_every_provider_holds_the_same_weights(name, grouping):
    engine, reference = provider(name), engines.create("groupwise/torch-fp32", threads=1)
    case = {"m": 5, "n": 96, "k": 192, "grouping": grouping}
    if name in ("torch-int4", "onnxruntime-int4") and grouping not in ("4n7", "4k32", "4k64"):
        with pytest.raises(ValueError, match="has no grouping"):
            engine.prepare(**case)
        return
    for copies in (1, 3):
        engine.prepare(**case, copies=copies)
        reference.prepare(**case)
        got = engines.agreement(reference.outputs(), engine.outputs())
        opening.check(name, got)
        assert got["sqnr_db"] > {"fp32": 100.0, "bf16": 40.0, "int8": 30.0}[engines.GROUPWISE[name].precision]
    if hasattr(engine, "turn"):
        assert min(engine.turn(0.001)) > 0


def test_a_run(tmp_path, capsys):
    names = ["bertkern-groupwise-int8", "bertkern-int8", "torch-fp32"]
    cases = groupings.parse_groupings("4n8,4k32")
    run = groupwise.run(names, [1, 3], [(64, 64)], cases, rounds=2, seconds=0.001, cold=10_000)
    assert run.x_values("latency_ms") == ["1x64x64 4n8", "3x64x64 4n8", "1x64x64 4k32", "3x64x64 4k32"]
    assert set(run.providers("ratio")) == {f"{slow} / bertkern-groupwise-int8" for slow in names[1:]}
    assert run.providers("share_of_peak") == names[:2]
    tables.show(run)
    assert "4k32" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    assert plots.save(run, tmp_path / "x.png").stat().st_size > 1000
    run.save(tmp_path)
    assert results.load(tmp_path / "groupwise-1t.json").rows == run.rows


def test_mistakes_are_explained(capsys):
    assert main(["bench", "groupwise", "--groupings", "4x4"]) != 0
    assert "grouping: expected BITSnGROUPS" in capsys.readouterr().err


def test_the_readme_shows_the_layer_with_the_most_outputs(tmp_path):
    run = results.Run("groupwise-1t", "a processor", "avx512vnni", 1, facts={"rounds": 3})
    for shape, gain in (("1x768x768", 1.5), ("1x3072x768", 1.9), ("128x3072x768", 0.96)):
        at = (groupwise.AXIS, f"{shape} 4n128")
        run.add("groupwise", "bertkern-int8 / bertkern-groupwise-int8", "ratio", at, (gain,) * 3)
    at = (groupwise.AXIS, "1x3072x768 4n128")
    run.add("groupwise", "torch-int4 / bertkern-groupwise-int8", "ratio", at, (2.5,) * 3)
    run.save(tmp_path)
    text = readme_table.table(tmp_path)
    assert "| Group-wise weights (M x N x K) | 1x3072x768 | 128x3072x768 |" in text
    assert "| **bertkern-groupwise-int8** 4n128, times bertkern-int8 | 1.90x | 0.96x |" in text
    assert "| **bertkern-groupwise-int8** 4n128, times torch-int4 | 2.50x | - |" in text
