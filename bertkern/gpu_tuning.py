"""In which form linear layers with zeros run on a GPU: a dense product (torch's of floats, ours of int8 codes) or the
block-sparse kernels.

As on a CPU (`bertkern.tuning`), one form a layer, whatever the number of rows, by times measured on the user's card and
kept on disk. Measuring waits for the GPU; calls of the model do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .formats.bsr import BsrWeight
from .nn.sparse import DENSE, Form
from .ops import providers
from .ops.attention_packed import OP as ATTENTION
from .ops.attention_packed import attention_packed_cuda
from .ops.block_sparse import block_index, block_sparse_linear
from .ops.block_sparse_int8 import block_sparse_linear_int8
from .ops.int8_triton import int8_linear_cuda, pack_int8_weight
from .ops.rowwise_triton import add_layernorm_cuda, add_layernorm_quantize_cuda, embed_cuda, quantize_rows_cuda
from .tuning import LEAST_ZEROS, MARGIN, Choice, Times, fastest, found_for

# Rows at which forms are compared: a sentence, and a batch.
ROWS = (128, 4096)
# Sequences and their length, at which kernels of attention are compared.
SEQUENCES = ((1, 128), (32, 128))
# Sides of blocks that tensor cores are worth, and the density from which on none was ever faster.
SIDES = (128, 64, 32)
MOST = 0.8
# How many calls a timing holds, and how often it is taken.
CALLS, TAKES = 20, 5

Timer = Callable[[Callable[[], Tensor]], float]


def seconds(run: Callable[[], Tensor]) -> float:
    """The least time of a call of `run` on the current GPU, of several takes.

    Of calls in a CUDA graph: a launch by the host takes longer than the kernels of a sentence, so that calls one after
    the other would tell the host's times.
    """
    replay = _captured(run)
    best = math.inf
    for _ in range(TAKES):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        replay()
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) / 1e3 / CALLS)
    return best


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Within it `device` is the current one: clocks and graphs are of that."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _captured(run: Callable[[], Tensor]) -> Callable[[], None]:
    """What calls `run` as often as a timing holds, by a graph where it can be captured."""

    def calls() -> None:
        for _ in range(CALLS):
            run()

    current, aside = torch.cuda.current_stream(), torch.cuda.Stream()
    aside.wait_stream(current)
    with torch.cuda.stream(aside):
        run()  # loads and compiles what it needs
    current.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            calls()
    except RuntimeError:
        graph = None
    replay = calls if graph is None else graph.replay
    replay()
    return replay


def candidates(weight: Tensor) -> dict[Form, float]:
    """The block-sparse forms of a weight [N, K] that may be faster than the dense one, with their density.

    A side of blocks is left out where a larger one keeps no more.
    """
    nonzero = weight != 0
    if weight.numel() == 0 or float(nonzero.float().mean()) > 1 - LEAST_ZEROS:
        return {}
    found: dict[Form, float] = {}
    n, k = weight.shape
    for side in SIDES:
        padded = F.pad(nonzero, (0, -k % side, 0, -n % side))
        density = float(padded.view(-(-n // side), side, -1, side).any(3).any(1).float().mean())
        if density < MOST and all(density < 0.98 * known for known in found.values()):
            found[Form("panels", side, side)] = density
    return found


def choose(weight: Tensor, times: Times | None, rows: Sequence[int] = ROWS, timer: Timer = seconds) -> Choice:
    """The form in which a weight runs fastest on its GPU.

    Args:
        weight: [N, K] fp32, bf16, fp16, or int8 codes.
        times: where measured times are looked up and kept; None: by the density alone.
        rows: of X, at which forms are compared.
        timer: of a call.
    """
    forms = candidates(weight)
    if not forms:
        return found_for(weight, Choice(DENSE))
    if times is None:
        # Of a block-sparse product, twice the dense one's time a block, which is never far from it.
        shares = {str(form): 2 * density for form, density in forms.items()}
        return found_for(weight, fastest(list(forms), shares, measured=False))
    kind = str(weight.dtype).removeprefix("torch.")
    shares: dict[str, float] = {}
    for form, density in forms.items():
        key = f"gpu {kind} {'x'.join(map(str, weight.shape))} {form} {density:.2f} at {','.join(map(str, rows))}"
        shares[str(form)] = times.share(key, lambda form=form: _share(weight, form, rows, timer))
    return found_for(weight, fastest(list(forms), shares, measured=True))


def _share(weight: Tensor, form: Form, rows: Sequence[int], timer: Timer) -> float:
    """The time of the form as a share of the dense one's: the worst over `rows` if it loses anywhere, else the mean."""
    blocks = BsrWeight.from_dense(weight, (form.rows, form.columns))
    calls = _int8_calls(weight, blocks) if weight.dtype == torch.int8 else _float_calls(weight, blocks)
    shares = []
    with torch.no_grad(), _on(weight.device):
        for count in rows:
            dense, sparse = calls(torch.ones(count, weight.shape[1], dtype=weight.dtype, device=weight.device))
            shares.append(timer(sparse) / timer(dense))
    return max(shares) if max(shares) >= 1 else math.exp(sum(map(math.log, shares)) / len(shares))


Calls = tuple[Callable[[], Tensor], Callable[[], Tensor]]


def _float_calls(weight: Tensor, blocks: BsrWeight) -> Callable[[Tensor], Calls]:
    """The dense and the block-sparse product of x."""
    index, n = block_index(blocks), weight.shape[0]
    return lambda x: (lambda: F.linear(x, weight), lambda: block_sparse_linear(x, blocks.values, index, n))


def _int8_calls(weight: Tensor, blocks: BsrWeight) -> Callable[[Tensor], Calls]:
    """As `_float_calls`, of codes in the rows' own ranges, with results in fp16."""
    (n, _), index, half = weight.shape, block_index(blocks), torch.float16
    (packed, sums), one = pack_int8_weight(weight), torch.ones(n, device=weight.device)

    def calls(x: Tensor) -> Calls:
        scale, zero = torch.ones(len(x), device=x.device), torch.ones(len(x), dtype=torch.int32, device=x.device)
        return (
            lambda: int8_linear_cuda(x, scale, packed, one, zero_point=zero, weight_sums=sums, out_dtype=half),
            lambda: block_sparse_linear_int8(
                x, scale, blocks.values, one, index, n, zero=zero, column_sum=sums, out_dtype=half
            ),
        )

    return calls


# --- providers of operators ----------------------------------------------------------------------------------------


def _row_calls(x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """A call of each row operator, of rows like x [T, H]."""
    weight, one = x[0], torch.ones(1, device=x.device)
    ids = torch.zeros(1, x.shape[0], dtype=torch.int64, device=x.device)
    return {
        "quantize_rows_cuda": lambda: quantize_rows_cuda(x).codes,
        "add_layernorm_cuda": lambda: add_layernorm_cuda(x, x, weight, weight, 1e-5),
        "add_layernorm_quantize_cuda": lambda: add_layernorm_quantize_cuda(x, x, weight, weight, 1e-5)[0],
        "embed_cuda": lambda: embed_cuda([ids] * 2, [x] * 2, [one] * 2, weight, weight, 1e-5, x.dtype),
    }


def _share_of_twin(
    op: str, device: torch.device, width: Hashable, key: str, calls: Sequence[Callable[[], Tensor]], times: Times,
    timer: Timer,
) -> None:  # fmt: skip
    """Has `op` computed by the CUDA kernel where its calls are faster than Triton's, all together."""
    if providers.CUDA not in providers.available(op, device):
        return

    def measure() -> float:
        shares = []
        for call in calls:
            took = {}
            for name in (providers.TRITON, providers.CUDA):
                with torch.no_grad(), _on(device), providers.preferred(op, device, width, name):
                    took[name] = timer(call)
            shares.append(took[providers.CUDA] / took[providers.TRITON])
        return math.exp(sum(map(math.log, shares)) / len(shares))

    share = times.share(key, measure)
    providers.prefer(op, device, width, providers.CUDA if share < MARGIN else None)


def choose_providers(
    width: int, dtype: torch.dtype, device: torch.device, times: Times, timer: Timer = seconds
) -> None:
    """Has each row operator computed by the fastest of its providers, for rows of a width.

    Args:
        times: where measured times are looked up and kept.
    """
    x = torch.ones(ROWS[0], width, dtype=dtype, device=device)
    name = str(dtype).removeprefix("torch.")
    for op, call in _row_calls(x).items():
        _share_of_twin(op, device, width, f"gpu {name} {op} {width} cuda", [call], times, timer)


def choose_attention(
    heads: int, head_dim: int, dtype: torch.dtype, device: torch.device, times: Times, timer: Timer = seconds
) -> None:
    """Has attention between projections of a dtype computed by the fastest of its providers.

    Args:
        heads: of a model.
        dtype: fp16 or bf16; there is one provider of others.
        times: where measured times are looked up and kept.
    """
    if dtype not in (torch.float16, torch.bfloat16) or not heads or not 0 < head_dim <= 128:
        return

    def call(batch: int, length: int) -> Callable[[], Tensor]:
        q = torch.ones(batch * length, heads, head_dim, dtype=dtype, device=device)
        ends = torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=device)
        counts = torch.full((batch,), length, dtype=torch.int32, device=device)
        return lambda: attention_packed_cuda(q, q, q, ends, length, counts=counts)

    name, width = str(dtype).removeprefix("torch."), (head_dim, dtype)
    key = f"gpu {name} {ATTENTION} {heads}x{head_dim} cuda"
    _share_of_twin(ATTENTION, device, width, key, [call(*shape) for shape in SEQUENCES], times, timer)
