// Products of 8-bit codes on tensor cores, by mma.sync and cp.async: sm_80 and newer.
//
//   c[m, n] = sum_k a[m, k] W[n, k] - z[m] sum_k W[n, k]     int32, exact (s8, u8); fp32, z = 0 (e4m3)
//   y = float(c) * (s[m] * S[n]) + bias[n]                   each operation rounded, in this order: the CPU's bits
//   y = clamp(round(y / g), -127, 127) * g                   where output_step g > 0
//   y = activation(y) + residual[m, n]                       stored in fp32, fp16 or bf16,
//   or as clamp(round(y / o) + z_o, low, high)               codes of a static step o; NaN gives the lowest
//
// Layout. Both operands are row-major, rows begin at multiples of 16 bytes, and are read in whole 16 bytes: what a row
// of a has behind K must be memory, what W has there zeros (e4m3: both). A block computes BM x BN outputs. Shared
// memory holds kStages steps of K, each cut into KW slices of kSlice bytes, which KW warps multiply at the same time:
//
//   stage  A [KW][BM][kSlice], then W [KW][BN][kSlice]. The 16 bytes c of row r lie, in slices of 128 bytes, at
//          c ^ (r % 8); of 64 bytes, at c ^ (r / 2 % 4), and rows of odd slices change places in pairs
//
// so the 8 rows that a matrix of ldmatrix reads lie in 8 different groups of 4 banks, and so do the 16 bytes that 8
// lanes of a cp.async write. After the last step the same memory takes the sums, 16 rows of every warp at a time, KW of
// each: a thread then adds those of 4 neighbouring outputs, slice after slice, and finishes them.
//
//   tile      BM   BN   warps (M x N x K)   step    for
//   large     128  128  2 x 2 x 1           64      many rows: 32 products for 8 ldmatrix
//   middle    64   64   2 x 2 x 1           128     too few large tiles for the multiprocessors
//   slices    32   32   1 x 1 x 4           256     fewer still: a block is 4 warps deep along K
//   few       16   16   1 x 1 x 8           512     up to 16 rows: a block is 8 warps deep along K
//   rows      16   64   1 x 4 x 1           128     the last two for e4m3
//
// All use 40 to 48 KB of shared memory: two blocks to a multiprocessor, on the small cards too, where one multiplies
// while the other waits or finishes.
//
// Order of sums: those of s8 and u8 are exact. e4m3 adds K in steps of 32 from 0 on in every tile, so a row's result
// does not depend on the others; its tiles have no slices for that reason. It needs sm_89, or sm_120 and newer: between
// these mma.sync turns float8 into fp16 first, and the kernel ends with an error.
//
// Floor: N K bytes of W for few rows, 2 M N K operations for many. A large tile takes 64 operations from a byte that it
// fetches; a step of it is 64 products (64 x 8 = 512 cycles of a quarter of a multiprocessor on sm_80) a warp.
#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

#include "cuda/activation.h"
#include "cuda/rowwise/rowwise.h"

namespace bertkern::cuda {

enum class Code : int32_t { s8 = 0, u8 = 1, e4m3 = 2 };
enum class GemmTile : int32_t { automatic = 0, large = 1, middle = 2, slices = 3, few = 4, rows = 5 };

struct GemmParams {
  int64_t m = 0;
  int32_t n = 0, k = 0;
  Code code = Code::s8;                   // of a; W is s8, or e4m3
  const void* a = nullptr;                // [m][a_pitch]
  const void* weight = nullptr;           // [n][weight_pitch]
  int64_t a_pitch = 0, weight_pitch = 0;  // bytes, multiples of 16
  const float* scale = nullptr;           // [m], or one where scale_step is 0
  const int32_t* zero = nullptr;          // [m], or one; null: 0
  const float* weight_scale = nullptr;    // [n], or one
  int32_t scale_step = 0, zero_step = 0, weight_step = 0;
  const int32_t* weight_sums = nullptr;  // [n], beside zero
  const float* bias = nullptr;
  const int32_t* live = nullptr;  // how many rows are there; the others' outputs are not written; null: all
  Activation activation = Activation::none;
  float output_step = 0.0f;
  Rows residual, y;
  float out_step = 0.0f;  // of codes
  int32_t out_zero = 0;
  float* steps = nullptr;  // [m], beside codes: out_step, or NaN where scale is not finite
  int32_t processors = 108;
  GemmTile tile = GemmTile::automatic;
};

cudaError_t launch_gemm(const GemmParams& params, cudaStream_t stream);

}  // namespace bertkern::cuda
