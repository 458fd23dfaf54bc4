"""References in plain PyTorch, float64 where numbers are compared: tests and benchmarks judge the kernels by them.

Nothing of bertkern is imported, and every formula is written the obvious way. Functions are named as the operators they
stand for; weights are canonical (codes and scales), never packed. Scales here are steps, x = code * scale, but for the
Q8BERT section, which speaks the paper's multipliers.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NONE, GELU, GELU_TANH, RELU, TANH, SILU = range(6)


# --- comparing ---------------------------------------------------------------------------------------------------


def sqnr(expected: Tensor, actual: Tensor) -> float:
    """Signal to quantization-noise ratio in dB; inf where the two are equal."""
    expected = expected.detach().double()
    noise = expected - actual.detach().double()
    return float(20 * torch.log10(expected.norm() / noise.norm())) if noise.norm() > 0 else math.inf


def agreement(expected: Tensor, actual: Tensor) -> float:
    """Share of rows whose largest element stands at the same place."""
    return float((expected.argmax(-1) == actual.argmax(-1)).double().mean())


# --- elementwise -------------------------------------------------------------------------------------------------


def gelu(x: Tensor) -> Tensor:
    """x * Phi(x), the normal distribution by erf."""
    x = x.double()
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh form (gelu_new, gelu_pytorch_tanh)."""
    x = x.double()
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def activate(x: Tensor, activation: int) -> Tensor:
    """The operators' activations by number, in float64."""
    x = x.double()
    if activation == NONE:
        return x
    return (gelu, gelu_tanh, lambda v: v.clamp(min=0), torch.tanh, lambda v: v * torch.sigmoid(v))[activation - 1](x)


def add_layernorm(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm(x + residual) over the last axis, in float64."""
    total = x.double() if residual is None else x.double() + residual.double()
    centred = total - total.mean(-1, keepdim=True)
    variance = (centred**2).mean(-1, keepdim=True)
    return centred / torch.sqrt(variance + eps) * weight.double() + bias.double()


# --- int8 --------------------------------------------------------------------------------------------------------


def quantize_weight(weight: Tensor, per_channel: bool = True) -> tuple[Tensor, Tensor]:
    """Symmetric codes int8 [N, K] in [-127, 127] and steps fp32 [N] (or [1]), absmax / 127; 1 for a row of zeros."""
    largest = weight.float().abs().amax(1) if per_channel else weight.float().abs().amax().reshape(1)
    scale = torch.where(largest > 0, largest / 127, torch.ones_like(largest))
    codes = (weight.double() / scale.double()[:, None]).round().clamp(-127, 127)
    return codes.to(torch.int8), scale


def quantize_rows(x: Tensor, scale: float = 0.0, zero_point: int = 0, unsigned: bool = False) -> tuple[Tensor, Tensor]:
    """Codes of x [M, K] and steps: dynamic, absmax / 127 of each row, [M]; static (scale > 0), [1].

    Signed codes lie in [-127, 127], unsigned ones in [0, 255] around `zero_point`.
    """
    rows = x.double()
    if scale > 0:
        step = torch.tensor([scale], dtype=torch.float32)
    else:
        largest = x.float().abs().amax(1)
        step = torch.where(largest > 0, largest / 127, torch.ones_like(largest))
    codes = (rows / step.double()[:, None]).round() + zero_point
    if unsigned:
        return codes.clamp(0, 255).to(torch.uint8), step
    return codes.clamp(-127, 127).to(torch.int8), step


def quantize_ranges(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 of x [M, K], steps [M] and zero points [M]: each row from its lowest value to its highest."""
    low, high = x.float().amin(1).clamp(max=0), x.float().amax(1).clamp(min=0)
    step = high * (1 / 255) - low * (1 / 255)
    step = torch.where(step > 0, step, torch.ones_like(step))
    zero = (-low / step).round().clamp(max=255)
    codes = (x.double() / step.double()[:, None]).round() + zero.double()[:, None]
    return codes.clamp(0, 255).to(torch.uint8), step, zero


def qgemm(
    codes: Tensor,
    scale: Tensor,
    zero_point: int | Tensor,
    weight_codes: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    activation: int = NONE,
    residual: Tensor | None = None,
    output_scale: float = 0.0,
) -> Tensor:
    """act(sum (codes - zero_point) * weight_codes * steps + bias) + residual, [M, N] in float64.

    The integer sum is exact. output_scale > 0 rounds to codes of that step before the activation.
    """
    # Below 2^53 float64 adds integers exactly, and unlike an int64 product it is fast.
    exact = (codes.double() - zero_point) @ weight_codes.double().T
    y = exact * scale.double()[:, None] * weight_scale.double()
    if bias is not None:
        y = y + bias.double()
    if output_scale > 0:
        y = (y / output_scale).round().clamp(-127, 127) * output_scale
    y = activate(y, activation)
    return y if residual is None else y + residual.double()


def embed(
    ids: Sequence[Tensor], tables: Sequence[Tensor], scales: Sequence[Tensor], weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """LayerNorm of the sum of rows tables[i][ids[i]] * scales[i][row or 0], in float64."""
    total = sum(
        table[i].double() * (scale.double()[i][..., None] if scale.numel() > 1 else scale.double())
        for i, table, scale in zip(ids, tables, scales, strict=True)
    )
    return add_layernorm(total, None, weight, bias, eps)


# --- linears and the encoder -------------------------------------------------------------------------------------

Linear = Callable[[Tensor], Tensor]


def dense(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """x W^T + b in float64."""
    return lambda x: F.linear(x.double(), weight.double(), None if bias is None else bias.double())


def int8_linear(
    weight_codes: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    input_scale: float = 0.0,
    output_scale: float = 0.0,
    input_zero_point: int = 0,
) -> Linear:
    """A linear that quantizes its input (per token, or statically), sums integers, and may requantize its output."""

    def run(x: Tensor) -> Tensor:
        rows, zero = x.reshape(-1, x.shape[-1]), 0
        if input_scale > 0 or input_zero_point == 128:
            codes, scale = quantize_rows(rows, input_scale)
        else:
            codes, scale, zero = quantize_ranges(rows)
            zero = zero[:, None]
        y = qgemm(codes, scale, zero, weight_codes, weight_scale, bias, output_scale=output_scale)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    return run


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    empty_attends: bool = False,
) -> Tensor:
    """softmax(Q K^T / sqrt(d) + bias) V over the real keys, per head; [B, L, H] in float64.

    mask [B, L], nonzero = real token. A sequence without any real token attends to nothing, as transformers' sdpa does,
    or, if empty_attends, evenly to all of its positions, as transformers' eager.
    """
    batch, length, width = query.shape
    split = (t.double().reshape(batch, length, heads, width // heads).transpose(1, 2) for t in (query, key, value))
    q, k, v = split
    scores = q @ k.transpose(-1, -2) / math.sqrt(width // heads)
    if bias is not None:
        scores = scores + bias.double()
    if mask is not None:
        real = mask != 0
        empty = ~real.any(1)[:, None, None, None]
        # Beside the lowest float all scores are equal; as in transformers, their gradient stays that of the softmax.
        lowest = scores + torch.finfo(torch.float32).min
        scores = torch.where(empty, lowest, scores.masked_fill(~real[:, None, None, :], -math.inf))
        v = v if empty_attends else v.masked_fill(empty, 0)
    return (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width)


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Sequence[int],
    key_counts: Sequence[int] | None = None,
    bias: Tensor | None = None,
    head_mask: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """softmax(scale q k^T + bias) v in float64 for packed sequences, [T, H, d]; a token without a key gives zeros."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = []
    for i, (begin, end) in enumerate(pairwise(cu_seqlens)):
        length = end - begin
        queries, keys, values = (part[begin:end].double().transpose(0, 1) for part in (q, k, v))
        scores = queries @ keys.transpose(1, 2) * scale
        if bias is not None:
            scores = scores + bias[i if len(bias) > 1 else 0, :, :length, :length]
        place = torch.arange(length)
        hidden = place[None, :] >= (length if key_counts is None else key_counts[i])
        if causal:
            hidden = hidden | (place[None, :] > place[:, None])
        scores = scores.masked_fill(hidden, -torch.inf)
        silent = (scores == -torch.inf).all(-1, keepdim=True)
        weights = scores.masked_fill(silent, 0).softmax(-1).masked_fill(silent, 0)
        context = weights.masked_fill(weights == 0, 0) @ torch.where(hidden.all(0)[:, None], 0, values)
        factor = 1 if head_mask is None else head_mask[i, :, None, None]
        out.append((context * factor).transpose(0, 1))
    return torch.cat(out) if out else q.double()


def encoder(
    x: Tensor,
    mask: Tensor | None,
    position_bias: Tensor | None,
    linears: Sequence[Linear],
    norms: Tensor,
    heads: Sequence[int],
    activation: int,
    eps: float,
    keep_padding: bool = False,
    all_hidden_states: bool = False,
    empty_attends: bool = False,
    exact_attention: bool = False,
    head_mask: Tensor | None = None,
    packed: bool = False,
) -> Tensor:
    """A post-LayerNorm BERT encoder in float64.

    x [B, L, H]; mask [B, L]; position_bias [1|B, heads, L, L]; linears: query, key, value, output, ffn 1, ffn 2 of each
    layer; norms [layers, 4, H]: weight and bias of the attention's, then of the output's LayerNorm. Positions after a
    sequence's last real token come back as zero unless keep_padding or there is no token at all. head_mask [1 or B,
    heads of all layers] scales contexts. Returns [B, L, H], or [layers, B, L, H] with all_hidden_states; packed: the
    real tokens alone, [tokens, H] or [layers, tokens, H].
    """
    states = []
    factors = [None] * len(heads) if head_mask is None else head_mask.double().split(list(heads), 1)
    for layer, norm in enumerate(norms):
        query, key, value, output, ffn1, ffn2 = linears[6 * layer : 6 * layer + 6]
        context = attention(query(x), key(x), value(x), heads[layer], mask, position_bias, empty_attends)
        if factors[layer] is not None:
            context = (context.unflatten(-1, (heads[layer], -1)) * factors[layer][:, None, :, None]).flatten(2)
        attended = add_layernorm(output(context), x, norm[0], norm[1], eps)
        x = add_layernorm(ffn2(activate(ffn1(attended), activation)), attended, norm[2], norm[3], eps)
        states.append(x)
    result = torch.stack(states) if all_hidden_states else x
    if packed:
        return result.flatten(-3, -2) if mask is None else result[..., mask != 0, :]
    if mask is not None and not keep_padding:
        for row, real in enumerate(mask != 0):
            if real.any():
                result[..., row, int(real.nonzero().max()) + 1 :, :] = 0
    return result


# --- MobileBERT ---------------------------------------------------------------------------------------------------


def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float | None) -> Tensor:
    """LayerNorm, or x * weight + bias where eps is None, in float64."""
    if eps is None:
        return x.double() * weight.double() + bias.double()
    return add_layernorm(x, None, weight, bias, eps)


def mobilebert_encoder(
    x: Tensor,
    mask: Tensor | None,
    linears: Sequence[Sequence[Linear]],
    norms: Sequence[Sequence[tuple[Tensor, Tensor]]],
    eps: Sequence[float] | None,
    heads: Sequence[int],
    bottleneck: int,
    activation: int,
    keep_padding: bool = False,
    all_hidden_states: bool = False,
    empty_attends: bool = False,
) -> Tensor:
    """MobileBERT's encoder in float64.

    x [B, L, H]; mask [B, L]; bottleneck: 0 none, 1 before the residual alone, 2 another for queries and keys, 3 one for
    all. Linears of each layer: input (bottleneck), shared (2), query, key, value, output, then both of each
    feed-forward, out (bottleneck); norms, weight and bias: input, shared, output, each feed-forward's, out. Padding as
    in `encoder`.
    """
    states = []
    for layer, count in enumerate(heads):
        linear = iter(linears[layer])
        floors = [None] * len(norms[layer]) if eps is None else eps
        norms_left = [(*pair, floor) for pair, floor in zip(norms[layer], floors, strict=True)]
        narrow = shared = x
        if bottleneck:
            narrow = norm(next(linear)(x), *norms_left.pop(0))
        if bottleneck == 2:
            shared = norm(next(linear)(x), *norms_left.pop(0))
        for_query = {0: x, 1: x, 2: shared, 3: narrow}[bottleneck]
        query, key = next(linear)(for_query), next(linear)(for_query)
        value = next(linear)(narrow if bottleneck == 3 else x)
        context = attention(query, key, value, count, mask, None, empty_attends)
        narrow = norm(next(linear)(context) + narrow, *norms_left.pop(0))
        while len(norms_left) > (bottleneck > 0):
            inner = activate(next(linear)(narrow), activation)
            narrow = norm(next(linear)(inner) + narrow, *norms_left.pop(0))
        x = norm(next(linear)(narrow) + x, *norms_left.pop(0)) if bottleneck else narrow
        states.append(x)
    result = torch.stack(states) if all_hidden_states else x
    if mask is not None and not keep_padding:
        for row, real in enumerate(mask != 0):
            if real.any():
                result[..., row, int(real.nonzero().max()) + 1 :, :] = 0
    return result


def trigram_embed(
    ids: Sequence[Tensor],
    tables: Sequence[Tensor],
    scales: Sequence[Tensor],
    linear: Linear | None,
    weight: Tensor,
    bias: Tensor,
    eps: float | None,
    trigram: bool,
) -> Tensor:
    """norm(linear(words) + rows of the other tables) in float64; a word may have its two neighbours beside it."""
    rows = [
        table[i].double() * (scale.double()[i][..., None] if scale.numel() > 1 else scale.double())
        for i, table, scale in zip(ids, tables, scales, strict=True)
    ]
    words = rows[0]
    if trigram:
        after, before = torch.zeros_like(words), torch.zeros_like(words)
        after[:, :-1], before[:, 1:] = words[:, 1:], words[:, :-1]
        words = torch.cat([after, words, before], dim=-1)
    return norm(sum(rows[1:], words if linear is None else linear(words)), weight, bias, eps)


# --- Q8BERT as its paper has it ----------------------------------------------------------------------------------


def fake_quantize(x: Tensor, threshold: float, bits: int = 8) -> Tensor:
    """clamp(round(x S), -M, M) / S with S = M / threshold, in x's dtype."""
    largest = 2 ** (bits - 1) - 1
    scale = largest / threshold
    return (x * scale).round().clamp(-largest, largest) / scale


def moving_range(maxima: Sequence[float], decay: float) -> float:
    """The range after batches with these max|x|: the first, then t - (1 - decay) (t - max|x|)."""
    threshold = maxima[0]
    for largest in maxima[1:]:
        threshold -= (1 - decay) * (threshold - largest)
    return threshold


def q8bert_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, input_thresh: float = 0.0, output_thresh: float | None = None
) -> Tensor:
    """Q8BERT's inference in float64: integer input, weight and bias; output requantized unless its range is None.

    A range of 0 is taken from the live tensor (mode "dynamic").
    """
    x, weight, bias = x.detach(), weight.detach(), None if bias is None else bias.detach()
    input_scale = 127 / (input_thresh or float(x.abs().max()))
    weight_scale = 127 / float(weight.abs().max())
    codes = (x.double() * input_scale).round().clamp(-127, 127)
    weight_codes = (weight.double() * weight_scale).round().clamp(-127, 127)
    total = codes @ weight_codes.T
    if bias is not None:
        total = total + (bias.double() * input_scale * weight_scale).round()
    y = total / (input_scale * weight_scale)
    if output_thresh is not None:
        y = fake_quantize(y, output_thresh or float(y.abs().max()))
    return y


class Int8LinearReference(nn.Module):
    """A module over `int8_linear`, to stand in a model where the compiled one would."""

    def __init__(self, weight_codes: Tensor, weight_scale: Tensor, bias: Tensor | None, *steps: float):
        super().__init__()
        self.register_buffer("weight_codes", weight_codes)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)
        self.steps = steps

    def share(self, table: nn.Module) -> None:
        self.weight_codes, self.weight_scale = table.weight_codes, table.weight_scale

    def forward(self, x: Tensor) -> Tensor:
        run = int8_linear(self.weight_codes, self.weight_scale, self.bias, *self.steps)
        return run(x).to(x.dtype)


class Int8EmbeddingReference(nn.Module):
    """Rows of an int8 table times its step."""

    def __init__(self, weight_codes: Tensor, weight_scale: Tensor, padding_idx: int | None = None):
        super().__init__()
        self.register_buffer("weight_codes", weight_codes)
        self.register_buffer("weight_scale", weight_scale)
        self.padding_idx = padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight_codes[ids].float() * self.weight_scale
