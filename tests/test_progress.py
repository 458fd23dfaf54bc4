"""Measuring kernels shows a bar where it takes long, and nowhere else."""

import sys
import time

import pytest
import torch
import transformers
from torch import nn

import bertkern as bk
from bertkern import progress, tuning
from bertkern.progress import LateBar
from tests.families.test_sparse import heavy, pruned


@pytest.fixture
def at_once(monkeypatch, tmp_path):
    """Nothing is known of this machine, a measurement takes no time, and a bar is shown without delay."""
    monkeypatch.setenv("BERTKERN_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "_share", lambda *_: 0.5)
    monkeypatch.setattr(progress, "DELAY", 0.0)
    return tmp_path


def two_layers(second=0.9):
    return nn.Sequential(heavy(0.9)[0], nn.Linear(512, 8), heavy(second, (32, 4))[0]).eval()


@pytest.mark.parametrize("swap", [bk.accelerate, bk.quantize_])
def test_a_bar_of_layers_where_something_is_measured(swap, at_once, capsys):
    swap(two_layers())
    shown = capsys.readouterr().err
    assert "measure kernels" in shown and "3/3" in shown and "layer" in shown
    swap(two_layers())
    assert capsys.readouterr().err == "", "all is known"
    swap(two_layers(0.7))
    assert "2/3" in capsys.readouterr().err, "begins with the first layer that is not"


@pytest.mark.parametrize("options", [{"progress": False}, {"measure": False}])
@pytest.mark.parametrize("swap", [bk.accelerate, bk.quantize_])
def test_none_where_it_is_switched_off_or_nothing_is_measured(swap, options, at_once, capsys):
    swap(two_layers(), **options)
    assert capsys.readouterr().err == ""


def test_none_where_it_is_over_in_no_time(at_once, monkeypatch, capsys):
    monkeypatch.setattr(progress, "DELAY", 60.0)
    bk.accelerate(two_layers())
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "DELAY", 0.3)
    monkeypatch.setattr(tuning, "_share", lambda *_: time.sleep(0.4) or 0.5)
    bk.accelerate(two_layers(0.7))
    assert "3/3" in capsys.readouterr().err


def test_a_calibration_has_the_same_switch(at_once, capsys):
    config, x = bk.Int8Config(activation="static"), torch.ones(2, 256)
    bk.quantize_(heavy(0.9), config, calibration=[x], progress=False)
    assert capsys.readouterr().err == ""
    bk.quantize_(heavy(0.9), config, calibration=[x])
    assert "calibrate" in capsys.readouterr().err


def test_nothing_needs_tqdm(at_once, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    assert bk.plan_of(bk.accelerate(two_layers())).layers["0"].measured
    assert capsys.readouterr().err == ""


def test_what_was_measured_before_an_interruption_is_kept(at_once, monkeypatch):
    def share(packed, dense, n, k, rows):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append((n, k))
        return 0.5

    asked = []
    monkeypatch.setattr(tuning, "_share", share)
    with pytest.raises(KeyboardInterrupt):
        bk.accelerate(two_layers(0.7))
    (path,) = at_once.glob("times-*.json")
    times = tuning.Times(path)
    assert len(asked) == 3 and len(times._shares) == 3
    assert times.share(next(iter(times._shares)), lambda: pytest.fail("measured again")) == 0.5


def test_from_pretrained_is_as_silent_as_transformers(at_once, capsys):
    model = bk.quantize_(pruned("BertModel", share=0.98), measure=False)  # so many zeros are worth a look with AMX, too
    model.save_pretrained(at_once / "model")
    capsys.readouterr()
    transformers.logging.disable_progress_bar()
    try:
        transformers.AutoModel.from_pretrained(at_once / "model")
        assert capsys.readouterr().err == ""
    finally:
        transformers.logging.enable_progress_bar()
    for file in at_once.glob("times-*.json"):
        file.unlink()
    transformers.AutoModel.from_pretrained(at_once / "model")
    assert "measure kernels" in capsys.readouterr().err


def test_the_bar_by_itself(monkeypatch, capsys):
    monkeypatch.setattr(progress, "DELAY", 0.0)
    with LateBar("read", "page", shown=True) as bar:
        bar.expect(2)
        bar.step()
        assert capsys.readouterr().err == ""
        bar.begin()
        bar.expect(1)
        bar.begin()
        bar.step()
        bar.step()
    shown = capsys.readouterr().err
    assert "read" in shown and "1/2" in shown and "3/3" in shown and "page" in shown
