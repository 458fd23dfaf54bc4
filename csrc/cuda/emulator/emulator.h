// Runs the kernels' source on the host, for tests: every thread of a block is a fiber, blocks run one after the other.
//
// A warp's collectives and the block's barrier are meeting points; what the lanes do there is checked: all 32 must
// come, to the same one. Shared memory begins as poison (0xff bytes: NaN in every float type). Every access of the
// kernels' code is seen (the tests compile it with -fsanitize=thread, whose calls emulator.cpp answers itself), and
// these end the launch: an access outside of a shared array or in a guard around a test's tensor; a byte of shared
// memory that two threads touch, one of them writing, without block_sync between them, or warp_sync within a warp (a
// shuffle orders no memory); a cp.async's target touched before its own thread has waited for it.
//
// Index arithmetic, fragment layouts, tails and epilogues are proven by running them, barriers within a block too, for
// the inputs of the test. Races between blocks, hardware limits (registers, bank conflicts) and speed are not.
//
// An error ends the launch with cudaErrorLaunchFailure, and bk_emulator_error() says what it was.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <tuple>
#include <type_traits>

#define BK_DEVICE inline __attribute__((unused))
#define BK_KERNEL(max_threads, min_blocks) __attribute__((noinline, unused))
#define BK_SHARED(type, name, ...)                              \
  typedef type name##_shared_type __VA_ARGS__;                  \
  static char name##_shared_key;                                \
  name##_shared_type& name = *static_cast<name##_shared_type*>( \
      ::bertkern::cuda::emulator::static_shared(&name##_shared_key, sizeof(name##_shared_type)))
#define BK_UNROLL
#define BK_LAUNCH(...) ::bertkern::cuda::launch(__VA_ARGS__)

extern "C" const char* bk_emulator_error();  // of the last launch; empty: none

namespace bertkern::cuda {
namespace emulator {

struct Place {
  dim3 grid, block_shape;
  uint3 block, thread;
};
const Place& place();
int lane();  // of the warp

// What a launch checks and runs: `body(closure)` in every thread of every block.
cudaError_t run(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* closure);

void* static_shared(const void* key, size_t bytes);
char* dynamic_shared();

// Meets the other 31 lanes; `line` tells call sites apart. Each lane's `in` and `out` stay its own until all are there;
// the last calls `combine` for all.
void meet(const char* what, int line, const void* in, void* out,
          void (*combine)(const void* const (&in)[32], void* const (&out)[32]));
void block_sync(int line);
void warp_sync(int line);
// The first `bytes` of `size` (4 or 16) are copied, zeros follow.
void cp_async(void* smem, const void* gmem, int size, int bytes);
void cp_async_commit();
void cp_async_wait(int groups);
void ldmatrix(uint32_t* r, int matrices, bool transposed, const void* row, int line);

enum class Operand { s8, u8, e4m3, f16, bf16 };
void mma_int(int32_t* c, const uint32_t* a, const uint32_t* b, Operand a_type, int line);
void mma_float(float* c, const uint32_t* a, const uint32_t* b, Operand type, int line);

struct Shuffle {
  uint64_t value;
  int source;
};
uint64_t shuffle(const Shuffle& mine, int line);
uint32_t ballot(bool v, int line);
int atomic_add(int* p, int v);
float atomic_add(float* p, float v);

bool is_shared(const void* p);
// Fails where this thread must not touch these bytes.
void check(const void* p, size_t bytes, bool write);
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace emulator

BK_DEVICE int thread_x() { return static_cast<int>(emulator::place().thread.x); }
BK_DEVICE int block_x() { return static_cast<int>(emulator::place().block.x); }
BK_DEVICE int block_y() { return static_cast<int>(emulator::place().block.y); }
BK_DEVICE int block_z() { return static_cast<int>(emulator::place().block.z); }
BK_DEVICE int grid_x() { return static_cast<int>(emulator::place().grid.x); }
BK_DEVICE int grid_y() { return static_cast<int>(emulator::place().grid.y); }
BK_DEVICE int grid_z() { return static_cast<int>(emulator::place().grid.z); }
BK_DEVICE int block_threads() { return static_cast<int>(emulator::place().block_shape.x); }
BK_DEVICE char* dynamic_shared() { return emulator::dynamic_shared(); }

BK_DEVICE void block_sync(int line = __builtin_LINE()) { emulator::block_sync(line); }
BK_DEVICE void warp_sync(int line = __builtin_LINE()) { emulator::warp_sync(line); }
BK_DEVICE void fence_device() {}

BK_DEVICE void cp_async16(void* smem, const void* gmem, bool valid = true) {
  emulator::cp_async(smem, gmem, 16, valid ? 16 : 0);
}
BK_DEVICE void cp_async16_part(void* smem, const void* gmem, int bytes) { emulator::cp_async(smem, gmem, 16, bytes); }
BK_DEVICE void cp_async4(void* smem, const void* gmem, bool valid = true) {
  emulator::cp_async(smem, gmem, 4, valid ? 4 : 0);
}
BK_DEVICE void cp_async_commit() { emulator::cp_async_commit(); }
template <int N>
BK_DEVICE void cp_async_wait() {
  emulator::cp_async_wait(N);
}

BK_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row, int line = __builtin_LINE()) {
  emulator::ldmatrix(r, 4, false, row, line);
}
BK_DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* row, int line = __builtin_LINE()) {
  emulator::ldmatrix(r, 2, false, row, line);
}
BK_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, int line = __builtin_LINE()) {
  emulator::ldmatrix(r, 4, true, row, line);
}
BK_DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row, int line = __builtin_LINE()) {
  emulator::ldmatrix(r, 2, true, row, line);
}

BK_DEVICE void mma_m16n8k32_s8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                               int line = __builtin_LINE()) {
  emulator::mma_int(c, a, b, emulator::Operand::s8, line);
}
BK_DEVICE void mma_m16n8k32_u8s8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                 int line = __builtin_LINE()) {
  emulator::mma_int(c, a, b, emulator::Operand::u8, line);
}
BK_DEVICE void mma_m16n8k16_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                int line = __builtin_LINE()) {
  emulator::mma_float(c, a, b, emulator::Operand::f16, line);
}
BK_DEVICE void mma_m16n8k16_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                 int line = __builtin_LINE()) {
  emulator::mma_float(c, a, b, emulator::Operand::bf16, line);
}
BK_DEVICE void mma_m16n8k32_e4m3(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                 int line = __builtin_LINE()) {
  emulator::mma_float(c, a, b, emulator::Operand::e4m3, line);
}

BK_DEVICE void trap() { emulator::fail("trap"); }

BK_DEVICE float exp2_approx(float x) { return exp2f(x); }
BK_DEVICE float div_full(float a, float b) { return a / b; }
template <class T>
BK_DEVICE uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d = 0;
  for (int i = 0; i < 2; ++i) {
    T in[3], out;
    const uint16_t bits[3] = {static_cast<uint16_t>(a >> 16 * i), static_cast<uint16_t>(b >> 16 * i),
                              static_cast<uint16_t>(c >> 16 * i)};
    memcpy(in, bits, sizeof in);
    // Products of two are exact in fp32, sums of three in fp64 for what is near in size: rounded once or nearly so.
    const float sum = static_cast<float>(static_cast<double>(static_cast<float>(in[0])) * static_cast<float>(in[1]) +
                                         static_cast<float>(in[2]));
    out = T(sum);
    uint16_t rounded;
    memcpy(&rounded, &out, sizeof rounded);
    d |= static_cast<uint32_t>(rounded) << 16 * i;
  }
  return d;
}
BK_DEVICE uint32_t round_bf16x2(float low, float high) {
  const __nv_bfloat16 pair[2] = {__float2bfloat16_rn(low), __float2bfloat16_rn(high)};
  uint32_t d;
  memcpy(&d, pair, sizeof d);
  return d;
}
template <int LUT>
BK_DEVICE uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d = 0;
  for (int row = 0; row < 8; ++row)
    if (LUT >> row & 1) d |= (row & 4 ? a : ~a) & (row & 2 ? b : ~b) & (row & 1 ? c : ~c);
  return d;
}
BK_DEVICE uint32_t prmt(uint32_t a, uint32_t b, uint32_t s) {
  const uint64_t bytes = a | static_cast<uint64_t>(b) << 32;
  uint32_t d = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = s >> 4 * i & 15;
    uint32_t byte = static_cast<uint32_t>(bytes >> 8 * (nibble & 7)) & 0xff;
    if (nibble & 8) byte = byte & 0x80 ? 0xff : 0;
    d |= byte << 8 * i;
  }
  return d;
}

template <class T>
BK_DEVICE T shuffle_from(T v, int source, int line) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>, "what a shuffle moves");
  emulator::Shuffle mine{0, source};
  memcpy(&mine.value, &v, sizeof v);
  const uint64_t got = emulator::shuffle(mine, line);
  memcpy(&v, &got, sizeof v);
  return v;
}
template <class T>
BK_DEVICE T shfl_xor(T v, int lane_mask, int line = __builtin_LINE()) {
  return shuffle_from(v, (thread_x() & 31) ^ lane_mask, line);
}
template <class T>
BK_DEVICE T shfl_down(T v, int delta, int line = __builtin_LINE()) {
  const int lane = thread_x() & 31;
  return shuffle_from(v, lane + delta > 31 ? lane : lane + delta, line);
}
template <class T>
BK_DEVICE T shfl(T v, int source_lane, int line = __builtin_LINE()) {
  return shuffle_from(v, source_lane & 31, line);
}
BK_DEVICE uint32_t ballot(bool v, int line = __builtin_LINE()) { return emulator::ballot(v, line); }

BK_DEVICE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
BK_DEVICE float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
BK_DEVICE int round_to_int(float x) {
  if (x != x) return 0;
  if (x >= 2147483648.0f) return INT32_MAX;
  if (x < -2147483648.0f) return INT32_MIN;
  return static_cast<int>(rintf(x));
}
BK_DEVICE float add_rn(float a, float b) { return a + b; }
BK_DEVICE float mul_rn(float a, float b) { return a * b; }
BK_DEVICE float div_rn(float a, float b) { return a / b; }
BK_DEVICE float sqrt_rn(float a) { return sqrtf(a); }
BK_DEVICE float fma_rn(float a, float b, float c) { return fmaf(a, b, c); }

BK_DEVICE int atomic_add(int* p, int v) { return emulator::atomic_add(p, v); }
BK_DEVICE float atomic_add(float* p, float v) { return emulator::atomic_add(p, v); }

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t, A... args) {
  struct Call {
    void (*kernel)(P...);
    std::tuple<std::decay_t<P>...> args;
  } call{kernel, {static_cast<P>(args)...}};
  return emulator::run(
      grid, block, shared_bytes,
      [](void* closure) {
        const Call& c = *static_cast<Call*>(closure);
        std::apply(c.kernel, c.args);
      },
      &call);
}

}  // namespace bertkern::cuda
