"""Choices by times on a GPU, with a clock of the test's own."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

import bertkern as bk
from bertkern import gpu_tuning, tuning
from bertkern.nn.sparse import DENSE, Form
from bertkern.ops import attention_packed, attention_triton, providers, rowwise_triton


def weight(side: int, kept: float, n: int = 256, k: int = 384) -> torch.Tensor:
    torch.manual_seed(0)
    blocks = torch.rand(n // side, 1, k // side, 1) < kept
    return (torch.randn(n // side, side, k // side, side) * blocks).view(n, k)


def test_candidates_are_the_largest_blocks_that_keep_no_more():
    assert list(gpu_tuning.candidates(weight(128, 0.5))) == [Form("panels", 128, 128)]
    assert list(gpu_tuning.candidates(weight(32, 0.2))) == [Form("panels", 64, 64), Form("panels", 32, 32)]
    assert gpu_tuning.candidates(weight(32, 0.99)) == {}
    assert gpu_tuning.candidates(torch.randn(64, 64)) == {}
    assert gpu_tuning.candidates(weight(16, 0.5)) == {}, "blocks of 16 fill all larger ones"
    assert Form("panels", 32, 32) in gpu_tuning.candidates(weight(32, 0.3)[:250, :370])


class Clock:
    """Says how long a call takes: the dense product 1, others `share`."""

    def __init__(self, share: float) -> None:
        self.share, self.calls = share, 0

    def __call__(self, run) -> float:
        self.calls += 1
        assert run().shape[-1] == 256
        sparse = {"block_sparse_linear", "block_sparse_linear_int8"} & set(run.__code__.co_names)
        return self.share if sparse else 1.0


class FakeCuda:
    """What `seconds` asks of torch.cuda: kernels take a microsecond, a launch by the host ten."""

    def __init__(self, fails: bool = False) -> None:
        self.fails, self.now, self.capturing, self.held = fails, 0.0, False, 0

    def call(self) -> None:
        if self.capturing:
            self.held += 1
        else:
            self.now += 10e-6

    def current_stream(self):
        return SimpleNamespace(wait_stream=lambda other: None)

    Stream = current_stream

    def stream(self, stream):
        return nullcontext()

    def CUDAGraph(self):
        def replay():
            self.now += 1e-6 * self.held

        return SimpleNamespace(replay=replay)

    @contextmanager
    def graph(self, graph, capture_error_mode):
        assert capture_error_mode == "thread_local"
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.capturing = True
        yield
        self.capturing = False

    def Event(self, enable_timing):
        event = SimpleNamespace(at=0.0, synchronize=lambda: None)
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda end: 1e3 * (end.at - event.at)
        return event


def test_times_are_the_cards_and_not_the_hosts(monkeypatch):
    for fails, expected in ((False, 1e-6), (True, 10e-6)):
        fake = FakeCuda(fails)
        monkeypatch.setattr(gpu_tuning, "torch", SimpleNamespace(cuda=fake))
        assert gpu_tuning.seconds(fake.call) == pytest.approx(expected)


def test_the_fastest_form_is_taken_and_kept(tmp_path):
    began = []
    times = tuning.Times(tmp_path / "times.json", bar=SimpleNamespace(begin=lambda: began.append(clock.calls)))
    w, clock = weight(32, 0.2), Clock(0.4)
    choice = gpu_tuning.choose(w, times, (8,), clock)
    assert choice.form in (Form("panels", 64, 64), Form("panels", 32, 32)) and choice.measured
    assert set(choice.shares.values()) == {0.4} and clock.calls == 4
    gpu_tuning.choose(w, times, (8,), clock)
    assert clock.calls == 4 and began == [0, 2], "looked up"
    assert gpu_tuning.choose(w, tuning.Times(tmp_path / "other.json"), (8,), Clock(1.1)).form == DENSE
    assert gpu_tuning.choose(torch.randn(256, 64), times, (8,), clock).form == DENSE
    assert gpu_tuning.choose(weight(32, 0.1), None).form.rows == 32
    assert gpu_tuning.choose(weight(32, 0.7), None).form == DENSE


@pytest.mark.parametrize(("share", "form"), [(0.5, Form("panels", 128, 128)), (1.5, DENSE)])
def test_int8_layers_with_zeros_run_in_the_chosen_form(on_gpu, monkeypatch, tmp_path, share, form):
    """With the bits of the dense form, of dynamic and static activations; what rounds its output stays dense."""
    monkeypatch.setenv("BERTKERN_CACHE", str(tmp_path))
    monkeypatch.setattr(gpu_tuning.choose, "__defaults__", (gpu_tuning.ROWS, Clock(share)))
    x = torch.randn(2, 7, 384)
    for options in ({}, {"input_scale": 0.03}, {"input_scale": 0.02, "input_zero_point": 40}, {"output_scale": 0.05}):
        codes = (weight(128, 0.5) * 40).clamp(-127, 127).to(torch.int8)
        layer = bk.nn.Int8Linear.from_codes(codes, torch.rand(256) * 0.01, torch.randn(256), **options).eval()
        with torch.no_grad():
            expected = layer(x)
            model = bk.accelerate(torch.nn.Sequential(layer))
            assert model[0].form == (DENSE if "output_scale" in options else form)
            assert torch.equal(model(x), expected)
        assert torch.equal(layer.weight_codes, codes)


def test_a_model_with_zeros_runs_in_the_chosen_form(on_gpu, monkeypatch, tmp_path):
    monkeypatch.setenv("BERTKERN_CACHE", str(tmp_path))
    monkeypatch.setattr(gpu_tuning.choose, "__defaults__", (gpu_tuning.ROWS, Clock(0.5)))
    linear = torch.nn.Linear(384, 256)
    with torch.no_grad():
        linear.weight.copy_(weight(32, 0.2))
    model, x = torch.nn.Sequential(linear).eval(), torch.randn(5, 384)
    with torch.no_grad():
        expected = model(x)
        bk.accelerate(model)
        assert model[0].form.rows in (32, 64)
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    assert "panels" in bk.report(model).rows[0].runs and "measured time" in bk.report(model).rows[0].why


def test_providers(monkeypatch):
    device = torch.device("cpu")
    assert providers.available("gather_rows_cuda", device) == (providers.TRITON, providers.TORCH)
    with pytest.raises(ValueError, match=r"expected a provider of quantize_rows_cuda, .* Got 'other'\."):
        providers.prefer("quantize_rows_cuda", device, 8, "other")
    monkeypatch.setattr(providers, "available", lambda op, device: (providers.TRITON, providers.CUDA, providers.TORCH))
    with providers.preferred("quantize_rows_cuda", device, 8, providers.CUDA):
        assert providers.provider("quantize_rows_cuda", device, 8) == providers.CUDA
        assert providers.provider("quantize_rows_cuda", device, 9) == providers.TRITON
    assert providers.provider("quantize_rows_cuda", device, 8) == providers.TRITON


def test_a_library_without_code_for_the_card_is_no_provider(monkeypatch, tmp_path):
    """Its operators are registered all the same; measured, they would fail."""
    card, why = torch.device("cuda", 0), [None]
    registered = SimpleNamespace(**dict.fromkeys(providers.TWINS.values()))
    fake = SimpleNamespace(
        ops=SimpleNamespace(bertkern=registered),
        _C=SimpleNamespace(_dispatch_has_kernel_for_dispatch_key=lambda *_: True),
    )
    monkeypatch.setattr(providers, "torch", fake)
    monkeypatch.setattr(providers, "lacking", lambda device: why[0])
    assert all(providers.CUDA in providers.available(op, card) for op in providers.TWINS)
    assert providers.available("gather_rows_cuda", card) == (providers.TRITON, providers.TORCH)
    why[0] = "the build has no code for compute capability 8.0 (90)"
    assert not any(providers.CUDA in providers.available(op, card) for op in providers.TWINS)
    times = tuning.Times(tmp_path / "times.json")
    gpu_tuning.choose_providers(8, torch.float32, torch.device("cpu"), times, lambda run: pytest.fail("measured"))


@pytest.mark.parametrize(("cuda", "chosen"), [(0.5, providers.CUDA), (1.5, providers.TRITON)])
def test_the_faster_provider_is_taken(monkeypatch, tmp_path, cuda, chosen):
    device = torch.device("cpu")
    monkeypatch.setattr(providers, "_chosen", {})
    monkeypatch.setattr(providers, "available", lambda op, device: (providers.TRITON, providers.CUDA, providers.TORCH))

    times = tuning.Times(tmp_path / "times.json")
    took = iter([1.0, cuda] * 4)
    gpu_tuning.choose_providers(8, torch.float32, device, times, lambda run: (run(), next(took))[1])
    assert {providers.provider(op, device, 8) for op in gpu_tuning._row_calls(torch.ones(2, 8))} == {chosen}
    # The second time it is looked up.
    monkeypatch.setattr(providers, "_chosen", {})
    gpu_tuning.choose_providers(8, torch.float32, device, times, lambda run: 1 / 0)
    assert {providers.provider(op, device, 8) for op in gpu_tuning._row_calls(torch.ones(2, 8))} == {chosen}


@pytest.mark.parametrize(("cuda", "chosen"), [(0.5, providers.CUDA), (1.5, providers.TRITON)])
def test_the_faster_attention_is_taken(monkeypatch, tmp_path, cuda, chosen):
    device, op = torch.device("cpu"), "attention_packed_cuda"
    monkeypatch.setattr(providers, "_chosen", {})
    monkeypatch.setattr(providers, "available", lambda op, device: (providers.TRITON, providers.CUDA, providers.TORCH))
    times, took = tuning.Times(tmp_path / "times.json"), iter([1.0, cuda] * len(gpu_tuning.SEQUENCES))
    gpu_tuning.choose_attention(2, 8, torch.bfloat16, device, times, lambda run: (run(), next(took))[1])
    assert providers.provider(op, device, (8, torch.bfloat16)) == chosen
    assert providers.provider(op, device, (8, torch.float16)) == providers.TRITON
    monkeypatch.setattr(providers, "_chosen", {})
    gpu_tuning.choose_attention(2, 8, torch.bfloat16, device, times, lambda run: 1 / 0)
    assert providers.provider(op, device, (8, torch.bfloat16)) == chosen
    # There is no other provider of fp32, nor of wider heads.
    gpu_tuning.choose_attention(2, 8, torch.float32, device, times, lambda run: 1 / 0)
    gpu_tuning.choose_attention(2, 256, torch.bfloat16, device, times, lambda run: 1 / 0)


def test_the_chosen_attention_is_called(monkeypatch):
    """By counts, head mask and bias; and Triton's where the library does not fit."""
    called = []
    key = "attention_packed_cuda", torch.device("cpu"), (8, torch.float16)
    monkeypatch.setattr(providers, "_chosen", {key: providers.CUDA})
    monkeypatch.setattr(
        attention_triton, "_cuda_forward", lambda q, *given: called.append(given) or (q.new_zeros(q.shape), None)
    )
    q, ends = torch.ones(5, 2, 8, dtype=torch.float16), torch.tensor([0, 2, 5], dtype=torch.int32)
    counts = torch.tensor([1, 3], dtype=torch.int32)
    for fits in (False, True):
        monkeypatch.setattr(attention_triton, "_cuda_fits", lambda q, scale, fits=fits: fits)
        got = attention_packed.attention_packed_cuda(q, q, q, ends, 3, counts=counts, head_mask=torch.ones(2, 2))
        assert bool(got.any()) != fits and len(called) == fits
    assert called[0][2].max_length == 3 and called[0][2].head_mask is not None and torch.equal(called[0][3], counts)


def test_the_twin_is_called_with_the_operators_arguments(monkeypatch):
    called = []
    monkeypatch.setattr(rowwise_triton, "_by_cuda", lambda op, x, width: lambda *given: called.append((op, given)))
    x, one = torch.ones(2, 8), torch.ones(8)
    rowwise_triton._quantize_op._init_fn(x, None, 0.0, 0)
    rowwise_triton._normal_op._init_fn(x, None, one, one, None, 1e-5)
    rowwise_triton._normal_quantize_op._init_fn(x, x, one, one, None, 1e-5, 0.0, 128)
    ids = torch.zeros(1, 2, dtype=torch.int64)
    rowwise_triton._embed_op._init_fn([ids], [x], [one[:1]], one, one, 1e-5, torch.float32)
    assert [op for op, _ in called] == [
        "quantize_rows_cuda", "add_layernorm_cuda", "add_layernorm_quantize_cuda", "embed_cuda",
    ]  # fmt: skip
    assert [len(given) for _, given in called] == [4, 6, 8, 7]
