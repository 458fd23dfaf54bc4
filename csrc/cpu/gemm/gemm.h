// Dense GEMM with packed weights: Y[m, n] = epilogue(sum_k X[m, k] * W[n, k]).
//
// Every data type runs through one loop over dwords (32-bit groups along K):
//
//   type   a dword holds          one step of the dot product
//   s8     4 codes along K        acc(int32) += sum of 4 products u8 x s8     exact, never saturates
//   bf16   2 values along K       acc(fp32)  += 2 products
//   f32    1 value                acc(fp32)  += 1 product
//
//   W packed: panels of kPanel = 32 output features; a panel is [KD][32] dwords, KD = ceil(K / values per dword).
//             K and N tails are zeros.
//   X packed: tiles of up to max_mr rows; a tile of mr rows is [KD][mr] dwords. Where 16-bit products do the work
//             (planes = 2) it is [KD][2][mr]: bytes 0 and 2 of each dword as 16-bit numbers, then bytes 1 and 3.
//   A tile kernel computes the sums of mr rows and 32 features and, for s8, makes floats of them: TileOutput.
//
// Activations are unsigned codes u with a zero point z, weights signed: sum (u - z) w = sum u w - z sum w. The second
// term does not depend on the activations: it is the `init` of the accumulators.
//
// Every output is summed along K in ascending order in one accumulator, in every tile of one kernel: a row's result
// does not depend on the rows beside it. (int32 sums are exact, hence equal on all ISAs.)
#pragma once

#include <stdint.h>

#include "cpu/isa.h"

namespace bertkern::cpu {

constexpr int64_t kPanel = 32;
constexpr int kMaxRows = 14;

enum class WeightKind : int32_t { f32 = 0, bf16 = 1, s8 = 2 };

// y[m, n] = c[m, n]                                                   c = init[n] + sum over KD, fp32 kinds
// y[m, n] = float(c[m, n]) * (row_scale[m] * weight_scale[n]) + bias[n]   s8
// y += residual[m, n]                                                 where there is one
struct TileOutput {
  const void* init;  // [32] int32 for s8, else fp32; null: zeros
  const float* weight_scale;
  const float* bias;
  const float* row_scale;
  const float* residual;
  int64_t residual_pitch;
  void* out;  // fp32 or bf16; 32 columns of every row are written
  int64_t pitch;
  bool bf16;
  const char* ahead;  // fetched into the L2 cache meanwhile, `ahead_step` <= 64 bytes a step of KD
  int64_t ahead_step;
};

using TileFn = void (*)(const uint32_t* a, int64_t lda, const uint32_t* b, int64_t kd, const TileOutput& output);

struct TileKernels {
  int max_mr;
  int planes;
  TileFn tile[kMaxRows + 1];  // by mr; [0] is null
};

const TileKernels& tile_kernels(WeightKind kind);           // of active_isa()
const TileKernels* tile_kernels(WeightKind kind, Isa isa);  // null where kernels.inc has no such row

}  // namespace bertkern::cpu
