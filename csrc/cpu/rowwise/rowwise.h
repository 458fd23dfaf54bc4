// Row kernels: what happens to complete rows between matrix products. One row at a time, so that a row's result depends
// on nothing else.
//
//   load_row        out = float(x)
//   store_row       out = round(x) to fp32, bf16 or fp16
//   quantize_row    u = clamp(round(x / s) + z, lo, hi) as u8, returns s
//                     step = 0: s = max|x| / 127 (1 for a row of zeros), z = 128, codes in [1, 255]
//                     step > 0: s = step; z = 128: codes in [1, 255] (signed codes -127..127); else codes in [0, 255]
//                     A row with a NaN or Inf returns NaN, which the epilogue spreads over that row alone.
//   quantize_range  the same with a scale and a zero point of the row's own: s = (hi - lo) / 255, z = round(-lo / s),
//                     lo <= 0 <= hi the row's ends; codes in [0, 255]. BERT's activations lie to one side of 0: this
//                     halves their steps.
//   flip_row        out = codes ^ mask: 0x80 turns signed codes into unsigned ones with zero point 128, and back;
//                   may be in place
//   sum_codes       sums[g * pitch] = the sum of (codes - zero) over the g-th `group` codes, the last ones fewer
//   layer_norm_row  out = (x - mean) / sqrt(var + eps) * gamma + beta
//   add_scaled_row  acc += scale * x, x fp32, bf16, fp16 or int8
//   epilogue        what is left to do to a tile of a GEMM, see Epilogue
//   spread          the outputs of a tile, kPanel apart, to their columns of Y, see Places; `bytes` of each
//   collect         back: floats of Y into a tile
//   transpose       dst[j][i] = src[i][j] of dwords
#pragma once

#include <stdint.h>

#include "cpu/gemm/gemm.h"

namespace bertkern::cpu {

enum class Dtype : int32_t { f32 = 0, bf16 = 1, f16 = 2, s8 = 3, u8 = 4 };

static inline int64_t dtype_size(Dtype dtype) { return dtype == Dtype::f32 ? 4 : dtype <= Dtype::f16 ? 2 : 1; }

enum class Activation : int32_t { none = 0, gelu = 1, gelu_tanh = 2, relu = 3, tanh = 4, silu = 5 };
constexpr int32_t kActivations = 6;

// From a tile of floats, kPanel apart, to rows of Y, where the tile kernel itself cannot write there:
// y = clamp(round(y / output_scale), -127, 127) * output_scale   where output_scale > 0
// y = act(y) + residual[m, n], stored as `dtype`: rounded to it, or for s8, u8 the code of quantize_row with a fixed
// step and zero point (s8: zero point 0).
struct Epilogue {
  float output_scale;
  Activation activation;
  const float* residual;  // null: none
  int64_t residual_pitch;
  void* out;
  int64_t out_pitch;  // elements
  Dtype dtype;
  float code_step;
  int32_t code_zero;
};

// Where outputs of a tile stand in Y: those from `from` on, in as many of the columns [to, to + kPlaces) as have
// their bit set in `mask`, in order. Where RowKernels::holes is false the bits set are the first ones.
// A tile that outputs are collected into has room for kPlaces more, which are written and count for nothing.
struct Places {
  int32_t from;
  uint32_t mask;
  int64_t to;
};
constexpr int64_t kPlaces = 16;

struct RowKernels {
  void (*load_row)(const void* x, Dtype dtype, int64_t n, float* out);
  void (*store_row)(const float* x, int64_t n, Dtype dtype, void* out);
  float (*quantize_row)(const float* x, int64_t n, float step, int32_t zero_point, uint8_t* out);
  float (*quantize_range)(const float* x, int64_t n, uint8_t* out, int32_t* zero_point);
  void (*flip_row)(const uint8_t* codes, int64_t n, uint8_t mask, uint8_t* out);
  void (*sum_codes)(const uint8_t* codes, int64_t n, int64_t group, int32_t zero, float* sums, int64_t pitch);
  void (*layer_norm_row)(const float* x, int64_t n, const float* gamma, const float* beta, float eps, float* out);
  void (*add_scaled_row)(const void* x, Dtype dtype, int64_t n, float scale, float* acc);
  void (*epilogue)(const float* tile, int mr, int64_t columns, const Epilogue& e);
  bool holes;
  void (*spread)(const void* tile, int64_t rows, const Places* places, int64_t count, int64_t bytes, void* out,
                 int64_t out_pitch);
  void (*collect)(const float* y, int64_t y_pitch, int64_t rows, const Places* places, int64_t count, float* tile);
  void (*transpose)(const float* src, int64_t ld_src, int64_t rows, int64_t cols, float* dst, int64_t ld_dst);
};

const RowKernels& row_kernels();  // of active_isa()

}  // namespace bertkern::cpu
