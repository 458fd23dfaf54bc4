// The device primitives of every CUDA kernel, each with two bodies: the card's instruction under nvcc, and the
// emulator's under an ordinary C++ compiler (emulator/emulator.h), where tests run the same source.
//
// Fragments, lane = 4 g + t (PTX ISA, "Matrix Fragments for mma.m16n8k16 / .m16n8k32"); e: the element within a
// register
//   m16n8k16  f16, bf16     A[16][16]  a[r] = A[g + 8 (r % 2)][2 t + 8 (r / 2) + e]     e in 0..1
//                           B[16][8]   b[r] = B[2 t + 8 r + e][g]
//   m16n8k32  s8, u8, e4m3  A[16][32]  a[r] = A[g + 8 (r % 2)][4 t + 16 (r / 2) + e]    e in 0..3
//                           B[32][8]   b[r] = B[4 t + 16 r + e][g]
//   C[16][8], both          c[i] = C[g + 8 (i / 2)][2 t + i % 2]
// ldmatrix: lane 8 j + i names row i (16 bytes, aligned to 16) of matrix j; r[j] = row g, 16-bit columns 2 t and 2 t +
// 1 of it; `trans`: rows 2 t and 2 t + 1, column g. So with A's rows in shared memory, K contiguous, x4 over (rows 0-7,
// 8-15) x (first, second half of K) is a[0..3] of either form, and x2 over K halves of B's columns (K contiguous) is
// b[0..1].
//
// Everything `.sync.aligned` here (ldmatrix, mma, shuffles) is executed by all 32 lanes together, or not at all.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __CUDACC__

#define BK_DEVICE __device__ __forceinline__
#define BK_KERNEL(max_threads, min_blocks) __global__ __launch_bounds__(max_threads, min_blocks)
// BK_SHARED(float, partial, [8][32]); at most 48 KB together; 16-byte aligned.
#define BK_SHARED(type, name, ...) __shared__ __align__(16) type name __VA_ARGS__
#define BK_UNROLL _Pragma("unroll")

namespace bertkern::cuda {

BK_DEVICE int thread_x() { return static_cast<int>(threadIdx.x); }
BK_DEVICE int block_x() { return static_cast<int>(blockIdx.x); }
BK_DEVICE int block_y() { return static_cast<int>(blockIdx.y); }
BK_DEVICE int block_z() { return static_cast<int>(blockIdx.z); }
BK_DEVICE int grid_x() { return static_cast<int>(gridDim.x); }
BK_DEVICE int grid_y() { return static_cast<int>(gridDim.y); }
BK_DEVICE int grid_z() { return static_cast<int>(gridDim.z); }
BK_DEVICE int block_threads() { return static_cast<int>(blockDim.x); }

BK_DEVICE char* dynamic_shared() {
  extern __shared__ __align__(128) char bertkern_dynamic_shared[];
  return bertkern_dynamic_shared;
}

BK_DEVICE void block_sync() { __syncthreads(); }
BK_DEVICE void warp_sync() { __syncwarp(); }
BK_DEVICE void fence_device() { __threadfence(); }

BK_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// 16 bytes, both ends aligned to 16; zeros where !valid (gmem is not read, but must be a pointer).
BK_DEVICE void cp_async16(void* smem, const void* gmem, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(smem)),
               "l"(__cvta_generic_to_global(gmem)), "r"(valid ? 16 : 0)
               : "memory");
}
// The first `bytes` (0 to 16) of gmem, aligned to 16, and zeros; gmem is not read beyond them.
BK_DEVICE void cp_async16_part(void* smem, const void* gmem, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(smem)),
               "l"(__cvta_generic_to_global(gmem)), "r"(bytes)
               : "memory");
}
// 4 bytes, both ends aligned to 4.
BK_DEVICE void cp_async4(void* smem, const void* gmem, bool valid = true) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(smem)),
               "l"(__cvta_generic_to_global(gmem)), "r"(valid ? 4 : 0)
               : "memory");
}
BK_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most N of this thread's groups are in flight; others' copies are there after a block_sync behind it.
template <int N>
BK_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

BK_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
BK_DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
BK_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
BK_DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

// c += a b; int32 wraps.
BK_DEVICE void mma_m16n8k32_s8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
BK_DEVICE void mma_m16n8k32_u8s8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
BK_DEVICE void mma_m16n8k16_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
BK_DEVICE void mma_m16n8k16_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// sm_89 and newer; elsewhere it traps: launchers ask the device first.
BK_DEVICE void mma_m16n8k32_e4m3(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 890
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();
#endif
}

// Ends the launch with an error.
BK_DEVICE void trap() { __trap(); }

// Relative error 2^-22; subnormal results are 0.
BK_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// a / b to 2 units in the last place, over the whole range; inline, where `/` calls a subroutine.
BK_DEVICE float div_full(float a, float b) {
  float y;
  asm("div.full.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}
// a * b + c of two numbers a register, rounded once.
template <class T>
BK_DEVICE uint32_t fma2(uint32_t a, uint32_t b, uint32_t c);
template <>
BK_DEVICE uint32_t fma2<__half>(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
template <>
BK_DEVICE uint32_t fma2<__nv_bfloat16>(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
// Two rounded by one instruction, the first in the low half.
BK_DEVICE uint32_t round_bf16x2(float low, float high) {
  uint32_t d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
// Bit i of the result is bit (4 a_i + 2 b_i + c_i) of LUT: (0xf0 & 0xcc) ^ 0xaa is a & b ^ c.
template <int LUT>
BK_DEVICE uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(LUT));
  return d;
}
// Byte i of the result: nibble i of s chooses of bytes 0-3 (a) and 4-7 (b); its top bit spreads the chosen byte's sign.
BK_DEVICE uint32_t prmt(uint32_t a, uint32_t b, uint32_t s) {
  uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(s));
  return d;
}

template <class T>
BK_DEVICE T shfl_xor(T v, int lane_mask) {
  return __shfl_xor_sync(0xffffffffu, v, lane_mask);
}
template <class T>
BK_DEVICE T shfl_down(T v, int delta) {
  return __shfl_down_sync(0xffffffffu, v, delta);
}
template <class T>
BK_DEVICE T shfl(T v, int source_lane) {
  return __shfl_sync(0xffffffffu, v, source_lane);
}
BK_DEVICE uint32_t ballot(bool v) { return __ballot_sync(0xffffffffu, v); }

BK_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
BK_DEVICE float float_of(uint32_t x) { return __uint_as_float(x); }
// To nearest, ties to even; outside of int32 it saturates, NaN gives 0.
BK_DEVICE int round_to_int(float x) { return __float2int_rn(x); }
// Correctly rounded, and never fused with a neighbour.
BK_DEVICE float add_rn(float a, float b) { return __fadd_rn(a, b); }
BK_DEVICE float mul_rn(float a, float b) { return __fmul_rn(a, b); }
BK_DEVICE float div_rn(float a, float b) { return __fdiv_rn(a, b); }
BK_DEVICE float sqrt_rn(float a) { return __fsqrt_rn(a); }
BK_DEVICE float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }

BK_DEVICE int atomic_add(int* p, int v) { return atomicAdd(p, v); }
BK_DEVICE float atomic_add(float* p, float v) { return atomicAdd(p, v); }

// BK_LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...) -> cudaError_t. `kernel` may be kernel<A, B>.
#define BK_LAUNCH(...) ::bertkern::cuda::launch(__VA_ARGS__)

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, A... args) {
  if (shared_bytes > 48 * 1024) {
    const cudaError_t limit =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared_bytes));
    if (limit != cudaSuccess) return limit;
  }
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<P>(args)...);
  return cudaGetLastError();
}

}  // namespace bertkern::cuda

#else
#include "cuda/emulator/emulator.h"
#endif

namespace bertkern::cuda {

BK_DEVICE int lane_id() { return thread_x() & 31; }
BK_DEVICE int warp_id() { return thread_x() >> 5; }

// Over the warp, the same bits in every lane and in every run: a tree of fixed order.
template <class T>
BK_DEVICE T warp_sum(T v) {
  BK_UNROLL
  for (int mask = 16; mask; mask >>= 1) v += shfl_xor(v, mask);
  return v;
}
// A NaN is lost wherever it meets a number (as fmaxf does).
template <class T>
BK_DEVICE T warp_max(T v) {
  BK_UNROLL
  for (int mask = 16; mask; mask >>= 1) {
    const T other = shfl_xor(v, mask);
    v = v < other ? other : v;
  }
  return v;
}

BK_DEVICE float to_float(float x) { return x; }
BK_DEVICE float to_float(__half x) { return __half2float(x); }
BK_DEVICE float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
// Rounded to nearest, ties to even.
template <class T>
BK_DEVICE T from_float(float x);
template <>
BK_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
BK_DEVICE __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
BK_DEVICE __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// Two 16-bit numbers in a register, the first in the low half.
template <class T>
BK_DEVICE uint32_t pack2(T low, T high) {
  static_assert(sizeof(T) == 2, "two of 16 bits");
  uint16_t l, h;
  __builtin_memcpy(&l, &low, 2);
  __builtin_memcpy(&h, &high, 2);
  return l | static_cast<uint32_t>(h) << 16;
}
template <class T>
BK_DEVICE uint32_t pack2(float low, float high) {
  return pack2(from_float<T>(low), from_float<T>(high));
}
template <class T>
BK_DEVICE T unpack2(uint32_t pair, int which) {
  const uint16_t bits = static_cast<uint16_t>(which ? pair >> 16 : pair);
  T x;
  __builtin_memcpy(static_cast<void*>(&x), &bits, 2);
  return x;
}

// The instruction by the operand's type.
template <class T>
BK_DEVICE void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
BK_DEVICE void mma_m16n8k16<__half>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_m16n8k16_f16(c, a, b);
}
template <>
BK_DEVICE void mma_m16n8k16<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_m16n8k16_bf16(c, a, b);
}

}  // namespace bertkern::cuda
