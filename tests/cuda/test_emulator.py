"""The emulator is the judge of every kernel: what it must compute, and the mistakes that it must see."""

import pytest
import torch

from tests.cuda.emulation import EmulatorError, emulated, skip_without_emulator

skip_without_emulator()

# One warp: a 16x8 tile of A B^T from shared memory, K by K, as GEMM kernels do it; `wait` and `sync` can be left out.
TILES = """
using namespace bertkern::cuda;

template <class T, class C, void (*Mma)(C (&)[4], const uint32_t (&)[4], const uint32_t (&)[2], int)>
BK_KERNEL(32, 1) void tile(const T* a, const T* b, C* c, int k, bool wait, bool sync) {
  constexpr int kStep = 32 / sizeof(T);  // elements of 32 bytes
  BK_SHARED(T, rows_a, [16][kStep + 16 / sizeof(T)]);
  BK_SHARED(T, rows_b, [8][kStep + 16 / sizeof(T)]);
  C sum[4] = {};
  const int lane = thread_x();
  for (int at = 0; at < k; at += kStep) {
    const int row = lane / 2, half = lane % 2 * 16 / static_cast<int>(sizeof(T));
    cp_async16(&rows_a[row][half], a + row * k + at + half);
    if (lane < 16) cp_async16(&rows_b[row][half], b + row * k + at + half, true);
    cp_async_commit();
    if (wait) cp_async_wait<0>();
    if (sync) block_sync();
    uint32_t fa[4], fb[2];
    ldmatrix_x4(fa, &rows_a[lane % 16][lane / 16 * 16 / sizeof(T)]);
    ldmatrix_x2(fb, &rows_b[lane % 8][lane / 8 % 2 * 16 / sizeof(T)]);
    Mma(sum, fa, fb, 0);
    block_sync();
  }
  for (int i = 0; i < 4; ++i) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sum[i];
}

#define TILE(name, T, C)                                                                             \\
  extern "C" int name(void* a, void* b, void* c, int64_t k, int64_t wait, int64_t sync) {              \\
    return BK_LAUNCH(tile<T, C, mma_##name>, dim3(1), dim3(32), 0, nullptr, static_cast<const T*>(a), \\
                     static_cast<const T*>(b), static_cast<C*>(c), static_cast<int>(k), wait != 0, sync != 0); \\
  }
TILE(m16n8k32_s8, int8_t, int32_t)
TILE(m16n8k32_u8s8, uint8_t, int32_t)
TILE(m16n8k32_e4m3, uint8_t, float)
TILE(m16n8k16_f16, __half, float)
TILE(m16n8k16_bf16, __nv_bfloat16, float)
"""

OPERANDS = {
    "m16n8k32_s8": (torch.int8, torch.int8),
    "m16n8k32_u8s8": (torch.uint8, torch.int8),
    "m16n8k32_e4m3": (torch.float8_e4m3fn, torch.float8_e4m3fn),
    "m16n8k16_f16": (torch.float16, torch.float16),
    "m16n8k16_bf16": (torch.bfloat16, torch.bfloat16),
}


def numbers(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    if dtype.is_floating_point:
        return torch.randn(shape).to(dtype)
    bounds = torch.iinfo(dtype)
    return torch.randint(bounds.min, bounds.max + 1, shape, dtype=dtype)


@pytest.mark.parametrize("name", OPERANDS)
def test_products_of_tiles(name):
    torch.manual_seed(0)
    k = 96
    a, b = (numbers((rows, k), dtype) for rows, dtype in zip((16, 8), OPERANDS[name], strict=True))
    c = torch.empty(16, 8, dtype=torch.float32 if a.dtype.is_floating_point else torch.int32)
    getattr(emulated(None, TILES), name)(a, b, c, k, 1, 1)
    torch.testing.assert_close(c.double(), a.double() @ b.double().T, rtol=1e-6, atol=1e-4)


def test_a_forgotten_wait_is_seen():
    a, b = torch.ones(16, 32).half(), torch.ones(8, 32).half()
    with pytest.raises(EmulatorError, match="still has in flight"):
        emulated(None, TILES).m16n8k16_f16(a, b, torch.empty(16, 8), 32, 0, 1)


def test_a_forgotten_barrier_is_seen():
    a, b = torch.ones(16, 32).half(), torch.ones(8, 32).half()
    with pytest.raises(EmulatorError, match="without a barrier between them"):
        emulated(None, TILES).m16n8k16_f16(a, b, torch.empty(16, 8), 32, 1, 0)


# Mistakes by number (0 and 1 are none), each by 64 threads; x is 64 floats.
MISTAKES = """
using namespace bertkern::cuda;

BK_KERNEL(64, 1) void mistake(int which, float* x) {
  BK_SHARED(float, memory, [64]);
  const int t = thread_x();
  const bool odd = t % 2;
  if (which == 0) memory[t] = x[t], block_sync(), x[t] = memory[t ^ 32];
  if (which == 1) memory[t] = x[t], warp_sync(), x[t] = memory[t ^ 1];
  if (which == 2) x[t + 1] = 0;
  if (which == 3) x[t] = x[t - 1];
  if (which == 4) memory[t + 1] = 0;
  if (which == 5 && odd) block_sync();
  else if (which == 5) block_sync();
  if (which == 6 && odd) x[t] = shfl_xor(x[t], 2);
  if (which == 7) x[t] = odd ? shfl_xor(x[t], 2) : warp_sum(x[t]);
  if (which == 8) memory[t] = x[t], x[t] = memory[t ^ 32];
  if (which == 9) memory[t] = x[t], warp_sync(), x[t] = memory[t ^ 32];
  if (which == 10) memory[t] = x[t], x[t] = memory[t ^ 1];
  if (which == 11) memory[t] = x[t], block_sync(), x[t] = memory[t ^ 32], memory[t] = 1;
  if (which == 12) memory[t / 2] = x[t];
  if (which == 13 && t < 40) return;
  if (which == 13) x[t] = warp_sum(x[t]);
  if (which == 14) cp_async16(memory, x + 1), cp_async_commit();
  if (which == 15 && t == 0) cp_async16(memory, x), cp_async_commit(), x[0] = memory[3], cp_async_wait<0>();
}
extern "C" int run(int64_t which, void* x) {
  return BK_LAUNCH(mistake, dim3(1), dim3(64), 0, nullptr, static_cast<int>(which), static_cast<float*>(x));
}
"""


@pytest.mark.parametrize(
    ("which", "what"),
    [
        (2, "writes 4 bytes at byte 256 of a tensor of 256"),
        (3, "reads 4 bytes at byte -4 of a tensor of 256"),
        (4, "writes bytes 256 to 259 of a shared array of 256 bytes"),
        (5, "block_sync of line"),
        (6, "only 16 of 32 lanes came"),
        (7, "lanes part"),
        (8, "without a barrier between them"),
        (9, "without a barrier between them"),
        (10, "without a barrier between them"),
        (11, "without a barrier between them"),
        (12, "wrote, without a barrier between them"),
        (13, "only 24 of 32 lanes came"),
        (14, "multiples of 16"),
        (15, "still has in flight"),
    ],
)
def test_mistakes_are_seen(which, what):
    with pytest.raises(EmulatorError, match=what):
        emulated(None, MISTAKES).run(which, torch.arange(64.0))


@pytest.mark.parametrize(("which", "other"), [(0, 32), (1, 1)])
def test_barriers_order_memory(which, other):
    x = torch.arange(64.0)
    emulated(None, MISTAKES).run(which, x)
    assert torch.equal(x, (torch.arange(64) ^ other).float())


BITS = """
using namespace bertkern::cuda;

BK_KERNEL(1, 1) void bits(uint32_t a, uint32_t b, uint32_t c, uint32_t* out) {
  out[0] = lop3<0xc0>(a, b, c), out[1] = lop3<(0xf0 & 0xcc) | 0xaa>(a, b, c), out[2] = lop3<0x96>(a, b, c);
  out[3] = prmt(a, b, 0x3715), out[4] = prmt(a, b, 0x8bf0);
}
extern "C" int run(int64_t a, int64_t b, int64_t c, void* out) {
  return BK_LAUNCH(bits, dim3(1), dim3(1), 0, nullptr, a, b, c, static_cast<uint32_t*>(out));
}
"""


def test_bit_instructions():
    a, b, c = 0x12F4A6E8, 0x9ABC5E71, 0x0F1E2D3C
    out = torch.zeros(5, dtype=torch.int32)
    emulated(None, BITS).run(a, b, c, out)
    found = [value & 0xFFFFFFFF for value in out.tolist()]
    chosen = [0x12, 0x9A, 0xA6, 0x5E]  # bytes 3, 7, 1 and 5 of b:a
    assert found[:3] == [a & b, a & b | c, a ^ b ^ c]
    assert found[3] == int.from_bytes(bytes(chosen), "big")
    # Signs of bytes 0 (0xe8) and 3 (0x12) and 7 (0x9a), then byte 0 itself.
    assert found[4] == 0xFF00FFE8
