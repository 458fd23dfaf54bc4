// Row kernels: what happens to complete rows between matrix products. A row's result depends on nothing else: not on
// the other rows, not on their number, not on where it is aligned.
//
//   quantize    codes of x
//   normalize   y = LayerNorm(x + residual), and the codes of y as it is stored
//   embed       y = LayerNorm(sum_i table_i[ids_i] * scale_i); a row with an id that a table has not is NaN
//
// LayerNorm is (x - mean) / sqrt(var + eps) * gamma + beta, in fp32, the variance from the differences. Codes are those
// of csrc/cpu/rowwise/rowwise.h, with the same integers for the same x, but signed: a code is 128 less than the CPU's
// unsigned one, and so is its zero point (x = (code - zero) * scale).
//
//   Grid::own        scale = (hi - lo) / 255, zero = round(-lo / scale) - 128, lo <= 0 <= hi the row's ends
//   Grid::symmetric  scale = max|x| / 127, zero = 0, codes in [-127, 127]
//   Grid::fixed      a given scale, and a given zero point or, where `symmetric_codes`, none and codes in [-127, 127]
//
// A scale below the normal numbers is 1. A row with a NaN or Inf has NaN for its scale and the codes of 0.
//
// `live` counts, on the device, the rows that are there. Those from it on come out as zeros (scale 1, zero point 0),
// and what x has there is not read: grids are sized for the padded batch, and one CUDA graph serves every mask.
#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

#include "cuda/types.h"

namespace bertkern::cuda {

// Rows of so many elements that a block keeps one in registers.
constexpr int64_t kWidestRow = 8192;
constexpr int kTables = 4;

struct Rows {
  void* data = nullptr;
  Type type = Type::f32;
  bool whole = false;  // 8 neighbours may be read and written at once; set by the launchers
  int64_t pitch = 0;   // elements between rows
};

enum class Grid : int32_t { none = 0, own = 1, symmetric = 2, fixed = 3 };

struct Codes {
  Grid grid = Grid::none;
  bool symmetric_codes = false;
  Rows codes;               // s8, or u8: code + 128
  float* scale = nullptr;   // [rows]
  int32_t* zero = nullptr;  // [rows], or null
  float step = 0.0f;        // of Grid::fixed
  int32_t zero_point = 0;   // of Grid::fixed, for signed codes
};

struct RowParams {
  int64_t rows = 0;
  int32_t width = 0;
  const int32_t* live = nullptr;  // null: all rows
  Rows x, residual, gamma, beta, y;
  float eps = 0.0f;
  Codes out;
};

struct Table {
  const int64_t* ids = nullptr;  // [rows]
  Rows rows;                     // u8: rows of `bits` bits, as bertkern/formats/groupwise.py (table_rows) makes them
  int64_t count = 0;             // rows of the table
  const float* scale = nullptr;
  bool scale_per_row = false;
  int32_t bits = 0;
};

struct EmbedParams {
  int64_t rows = 0;
  int32_t width = 0, tables = 0;
  Table table[kTables];
  Rows gamma, beta, y;
  float eps = 0.0f;
  Codes out;
};

// Bits of the codes of `width` columns in rows of so many bytes, or 0: scale and zero point (8 bytes), then the codes.
inline int row_bits(int64_t width, int64_t bytes) {
  for (int bits = 2; bits <= 8 && width >= 8; ++bits)
    if (8 + (width * bits + 7) / 8 == bytes) return bits;
  return 0;
}

cudaError_t launch_quantize(const RowParams& p, cudaStream_t stream);
cudaError_t launch_normalize(const RowParams& p, cudaStream_t stream);
cudaError_t launch_embed(const EmbedParams& p, cudaStream_t stream);

}  // namespace bertkern::cuda
