"""In which form float linear layers with zeros run on a GPU: torch's dense product or the block-sparse kernels.

As on a CPU (`bertkern.tuning`), one form a layer, whatever the number of rows, by times measured on the user's card and
kept on disk. Measuring waits for the GPU; calls of the model do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .formats.bsr import BsrWeight
from .nn.sparse import DENSE, Form
from .ops import providers
from .ops.block_sparse import block_index, block_sparse_linear
from .ops.rowwise_triton import add_layernorm_cuda, add_layernorm_quantize_cuda, embed_cuda, quantize_rows_cuda
from .tuning import LEAST_ZEROS, MARGIN, Choice, Times, fastest

# Rows at which forms are compared: a sentence, and a batch.
ROWS = (128, 4096)
# Sides of blocks that tensor cores are worth, and the density from which on none was ever faster.
SIDES = (128, 64, 32)
MOST = 0.8
# How many products a timing holds, and how often it is taken.
CALLS, TAKES = 20, 5

Timer = Callable[[Callable[[], Tensor]], float]


def seconds(run: Callable[[], Tensor]) -> float:
    """The least time of a call of `run` on the current GPU, of several takes."""
    best = math.inf
    run()
    for _ in range(TAKES):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(CALLS):
            run()
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) / 1e3 / CALLS)
    return best


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
        weight: [N, K] fp32, bf16 or fp16.
        times: where measured times are looked up and kept; None: by the density alone.
        rows: of X, at which forms are compared.
        timer: of a call.
    """
    forms = candidates(weight)
    if not forms:
        return Choice(DENSE)
    if times is None:
        # Of a block-sparse product, twice the dense one's time a block, which is never far from it.
        return fastest(list(forms), {str(form): 2 * density for form, density in forms.items()}, measured=False)
    kind = str(weight.dtype).removeprefix("torch.")
    shares: dict[str, float] = {}
    for form, density in forms.items():
        key = f"gpu {kind} {'x'.join(map(str, weight.shape))} {form} {density:.2f} at {','.join(map(str, rows))}"
        share = times.get(key)
        if share is None:
            share = _share(weight, form, rows, timer)
            times.put(key, share)
        shares[str(form)] = share
    return fastest(list(forms), shares, measured=True)


def _share(weight: Tensor, form: Form, rows: Sequence[int], timer: Timer) -> float:
    """The time of the form as a share of the dense one's: the worst over `rows` if it loses anywhere, else the mean."""
    blocks = BsrWeight.from_dense(weight, (form.rows, form.columns))
    index, values = block_index(blocks), blocks.values
    shares = []
    with torch.no_grad():
        for count in rows:
            x = torch.ones(count, weight.shape[1], dtype=weight.dtype, device=weight.device)
            dense = timer(lambda x=x: F.linear(x, weight))
            sparse = timer(lambda x=x: block_sparse_linear(x, values, index, weight.shape[0]))
            shares.append(sparse / dense)
    return max(shares) if max(shares) >= 1 else math.exp(sum(map(math.log, shares)) / len(shares))


# --- providers of the row operators --------------------------------------------------------------------------------


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


def choose_providers(
    width: int, dtype: torch.dtype, device: torch.device, times: Times, timer: Timer = seconds
) -> None:
    """Has each row operator computed by the fastest of its providers, for rows of a width.

    Args:
        times: where measured times are looked up and kept.
    """
    x = torch.ones(ROWS[0], width, dtype=dtype, device=device)
    kind = str(dtype).removeprefix("torch.")
    for op, call in _row_calls(x).items():
        if providers.CUDA not in providers.available(op):
            continue
        key = f"gpu {kind} {op} {width} cuda"
        share = times.get(key)
        if share is None:
            took = {}
            for name in (providers.TRITON, providers.CUDA):
                with torch.no_grad(), providers.preferred(op, device, width, name):
                    took[name] = timer(call)
            share = took[providers.CUDA] / took[providers.TRITON]
            times.put(key, share)
        providers.prefer(op, device, width, providers.CUDA if share < MARGIN else None)
