#include "cpu/gemm/linear.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/scratch.h"

namespace bertkern::cpu {

namespace {

int64_t values_per_dword(WeightKind kind) { return kind == WeightKind::s8 ? 4 : kind == WeightKind::bf16 ? 2 : 1; }
int64_t value_bytes(WeightKind kind) { return 4 / values_per_dword(kind); }
int64_t padded(int64_t n) { return (n + kPanel - 1) / kPanel * kPanel; }

}  // namespace

int64_t dword_count(WeightKind kind, int64_t k) {
  const int64_t values = values_per_dword(kind);
  return (k + values - 1) / values;
}

int64_t packed_bytes(WeightKind kind, int64_t n, int64_t k) {
  const int64_t np = padded(n);
  const int64_t vectors = kind == WeightKind::s8 ? 4 : 1;
  return static_cast<int64_t>(sizeof(LinearHeader)) + np * dword_count(kind, k) * 4 + vectors * np * 4;
}

bool view_linear(const void* data, int64_t bytes, Linear& linear) {
  LinearHeader header;
  if (bytes < static_cast<int64_t>(sizeof header)) return false;
  std::memcpy(&header, data, sizeof header);
  if (header.magic != kLinearMagic || header.kind < 0 || header.kind > 2) return false;
  if (header.n < 0 || header.k < 0 || header.n > (int64_t{1} << 31) || header.k > (int64_t{1} << 31)) return false;
  const WeightKind kind = static_cast<WeightKind>(header.kind);
  if (bytes != packed_bytes(kind, header.n, header.k)) return false;
  const int64_t np = padded(header.n), kd = dword_count(kind, header.k);
  linear.kind = kind;
  linear.n = header.n, linear.k = header.k, linear.kd = kd, linear.panels = np / kPanel;
  linear.weights = reinterpret_cast<const uint32_t*>(static_cast<const char*>(data) + sizeof header);
  const uint32_t* tail = linear.weights + np * kd;
  linear.init = linear.column_sum = nullptr;
  linear.scale = nullptr;
  if (kind == WeightKind::s8) {
    linear.init = reinterpret_cast<const int32_t*>(tail);
    linear.column_sum = linear.init + np;
    linear.scale = reinterpret_cast<const float*>(linear.column_sum + np);
    tail += 3 * np;
  }
  linear.bias = reinterpret_cast<const float*>(tail);
  linear.input_scale = header.input_scale, linear.input_zero = header.input_zero;
  linear.output_scale = header.output_scale, linear.has_bias = header.has_bias != 0;
  return true;
}

void pack_linear(const LinearHeader& header, const void* weight, const float* scale, int64_t scale_count,
                 const float* bias, void* out) {
  const WeightKind kind = static_cast<WeightKind>(header.kind);
  const int64_t n = header.n, k = header.k, np = padded(n), kd = dword_count(kind, k);
  std::memset(out, 0, static_cast<size_t>(packed_bytes(kind, n, k)));
  std::memcpy(out, &header, sizeof header);
  char* weights = static_cast<char*>(out) + sizeof header;
  const int64_t bytes = value_bytes(kind), per_dword = values_per_dword(kind);
  for (int64_t i = 0; i < n; ++i) {
    const char* row = static_cast<const char*>(weight) + i * k * bytes;
    char* column = weights + ((i / kPanel) * kd * kPanel + i % kPanel) * 4;
    for (int64_t d = 0; d < kd; ++d)
      std::memcpy(column + d * kPanel * 4, row + d * 4,
                  static_cast<size_t>(std::min(per_dword, k - d * per_dword) * bytes));
  }
  char* tail = weights + np * kd * 4;
  if (kind == WeightKind::s8) {
    int32_t* init = reinterpret_cast<int32_t*>(tail);
    int32_t* column_sum = init + np;
    float* scales = reinterpret_cast<float*>(column_sum + np);
    for (int64_t i = 0; i < n; ++i) {
      const int8_t* row = static_cast<const int8_t*>(weight) + i * k;
      int32_t sum = 0;
      for (int64_t j = 0; j < k; ++j) sum += row[j];
      column_sum[i] = sum;
      init[i] = -header.input_zero * sum;
      scales[i] = scale[scale_count == 1 ? 0 : i];
    }
    tail += 3 * np * 4;
  }
  if (bias) std::memcpy(tail, bias, static_cast<size_t>(n) * 4);
}

void unpack_linear(const Linear& linear, void* weight, float* scale, float* bias) {
  const int64_t bytes = value_bytes(linear.kind), per_dword = values_per_dword(linear.kind);
  for (int64_t i = 0; i < linear.n; ++i) {
    char* row = static_cast<char*>(weight) + i * linear.k * bytes;
    const uint32_t* column = linear.weights + (i / kPanel) * linear.kd * kPanel + i % kPanel;
    for (int64_t d = 0; d < linear.kd; ++d)
      std::memcpy(row + d * 4, column + d * kPanel,
                  static_cast<size_t>(std::min(per_dword, linear.k - d * per_dword) * bytes));
  }
  if (linear.kind == WeightKind::s8) std::memcpy(scale, linear.scale, static_cast<size_t>(linear.n) * 4);
  std::memcpy(bias, linear.bias, static_cast<size_t>(linear.n) * 4);
}

namespace {

constexpr int64_t kLeastRows = 6;  // of a group that is one of several for a reason: fewer leave the dot products idle
constexpr int64_t kSplitRows = 6;  // measured: fewer rows wait for memory in any case

// Wide tiles take a group each; narrow ones share a group.
int64_t group_rows(WeightKind kind) {
  const int max_mr = tile_kernels(kind).max_mr;
  return max_mr > 8 ? max_mr : kGroupPitch;
}

// Two groups at least: while one passes over a panel, the other fetches the next (see gemm).
int64_t group_count(WeightKind kind, int64_t rows, int64_t multiple) {
  int64_t groups = (rows + group_rows(kind) - 1) / group_rows(kind);
  if (groups == 1 && rows >= kSplitRows) groups = 2;
  const int64_t rounded = (groups + multiple - 1) / multiple * multiple;
  return rounded * kLeastRows <= rows ? rounded : groups;
}

thread_local Scratch staging;

}  // namespace

bool same_operand(const Linear& a, const Linear& b) {
  return a.kind == b.kind && a.k == b.k && a.input_scale == b.input_scale && a.input_zero == b.input_zero;
}

int64_t rows_dwords(const Linear& linear, int64_t rows, int64_t multiple) {
  const int64_t groups = group_count(linear.kind, rows, multiple);
  return groups * linear.kd * tile_kernels(linear.kind).planes * kGroupPitch + 64;
}

Rows make_rows(const Linear& linear, int64_t rows, uint32_t* data, float* scale, int64_t multiple) {
  const int64_t groups = group_count(linear.kind, rows, multiple);
  return {rows, groups, linear.kd, tile_kernels(linear.kind).planes, data, scale};
}

namespace {

// Calls convert(row, dwords) for each row of the group, then interleaves the rows.
template <class Convert>
void pack_rows(const Rows& rows, int64_t group, Convert&& convert) {
  const int64_t r0 = rows.begin(group), mr = rows.begin(group + 1) - r0, kd = rows.kd;
  uint32_t* out = rows.group_data(group);
  const int64_t pitch = (kd * rows.planes + 15) / 16 * 16;
  uint32_t* stage = staging.get<uint32_t>(pitch * (kGroupPitch + 1));
  uint32_t* narrow = stage + pitch * kGroupPitch;
  const auto row = [&](int64_t r, uint32_t* to) {
    if (rows.planes == 1) return convert(r, to);
    convert(r, narrow);
    for (int64_t d = 0; d < kd; ++d) {
      to[2 * d] = narrow[d] & 0x00ff00ffu;
      to[2 * d + 1] = narrow[d] >> 8 & 0x00ff00ffu;
    }
  };
  if (rows.pitch() == 1) return row(r0, out);
  for (int64_t r = 0; r < mr; ++r) row(r0 + r, stage + r * pitch);
  row_kernels().transpose(reinterpret_cast<float*>(stage), pitch, kGroupPitch, kd * rows.planes,
                          reinterpret_cast<float*>(out), kGroupPitch);
}

}  // namespace

void pack_group(const Linear& linear, const Rows& rows, int64_t group, const float* x, int64_t pitch) {
  const RowKernels& kernels = row_kernels();
  pack_rows(rows, group, [&](int64_t r, uint32_t* out) {
    const float* row = x + r * pitch;
    if (linear.k > 0) out[rows.kd - 1] = 0;
    if (linear.kind == WeightKind::s8) {
      const float scale =
          kernels.quantize_row(row, linear.k, linear.input_scale, linear.input_zero, reinterpret_cast<uint8_t*>(out));
      rows.scale[r] = scale;
    } else {
      kernels.store_row(row, linear.k, linear.kind == WeightKind::bf16 ? Dtype::bf16 : Dtype::f32, out);
    }
  });
}

void flip_codes(const uint8_t* codes, int64_t count, uint8_t xor_mask, uint8_t* out) {
  const uint64_t mask = xor_mask * uint64_t{0x0101010101010101};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    uint64_t word;
    std::memcpy(&word, codes + i, 8);
    word ^= mask;
    std::memcpy(out + i, &word, 8);
  }
  for (; i < count; ++i) out[i] = codes[i] ^ xor_mask;
}

void pack_code_group(const Rows& rows, int64_t group, const uint8_t* codes, int64_t k, uint8_t xor_mask) {
  pack_rows(rows, group, [&](int64_t r, uint32_t* out) {
    if (k > 0) out[rows.kd - 1] = 0;
    flip_codes(codes + r * k, k, xor_mask, reinterpret_cast<uint8_t*>(out));
  });
}

void gemm(const Linear& linear, const Rows& rows, int64_t g0, int64_t g1, int64_t p0, int64_t p1, const Output& output,
          const int32_t* init) {
  const TileKernels& tiles = tile_kernels(linear.kind);
  const RowKernels& kernels = row_kernels();
  const bool integer = linear.kind == WeightKind::s8;
  const void* start = integer ? static_cast<const void*>(init ? init : linear.init) : linear.bias;
  const bool bf16 = output.dtype == Dtype::bf16;
  const bool plain = output.activation == Activation::none && linear.output_scale <= 0.0f;
  const bool in_tile = plain && (output.dtype == Dtype::f32 || bf16);
  alignas(64) float buffer[kMaxRows * kPanel];
  for (int64_t p = p0; p < p1; ++p) {
    const uint32_t* panel = linear.weights + p * linear.kd * kPanel;
    const int64_t column = p * kPanel, columns = std::min(kPanel, linear.n - column);
    const bool direct = in_tile && columns == kPanel;
    TileOutput sums{};
    sums.init = static_cast<const char*>(start) + column * 4;
    if (integer) sums.weight_scale = linear.scale + column, sums.bias = linear.bias + column;
    sums.out = buffer, sums.pitch = kPanel, sums.bf16 = direct && bf16;
    // Few rows take weights from memory: the groups fetch the next panel while they compute, each its share, evenly.
    // (All at once, or a fixed distance ahead, is slower than nothing: it holds up the loads of the running panel.)
    const uint32_t* next = p + 1 < p1 ? panel + linear.kd * kPanel : output.after;
    const int64_t share = next && g1 - g0 > 1 ? linear.kd * kPanel * 4 / (g1 - g0) : 0;
    sums.ahead = reinterpret_cast<const char*>(panel);
    for (int64_t g = g0; g < g1; ++g) {
      const int64_t begin = rows.begin(g), end = rows.begin(g + 1);
      if (share) {
        sums.ahead = reinterpret_cast<const char*>(next) + (g - g0) * share;
        sums.ahead_step = (share + linear.kd - 1) / linear.kd;
      }
      for (int64_t r = begin; r < end;) {
        const int64_t left = (end - r + tiles.max_mr - 1) / tiles.max_mr, mr = (end - r + left - 1) / left;
        const float* residual = output.residual ? output.residual + r * output.residual_pitch + column : nullptr;
        if (integer) sums.row_scale = rows.scale + r;
        if (direct) {
          sums.residual = residual, sums.residual_pitch = output.residual_pitch;
          sums.out = static_cast<char*>(output.out) + (r * output.out_pitch + column) * dtype_size(output.dtype);
          sums.pitch = output.out_pitch;
        }
        tiles.tile[mr](rows.group_data(g) + (r - begin), rows.pitch(), panel, linear.kd, sums);
        if (!direct) {
          Epilogue e;
          e.output_scale = linear.output_scale;
          e.activation = output.activation;
          e.residual = residual, e.residual_pitch = output.residual_pitch;
          e.out = static_cast<char*>(output.out) + (r * output.out_pitch + column) * dtype_size(output.dtype);
          e.out_pitch = output.out_pitch;
          e.dtype = output.dtype;
          e.code_step = output.code_step, e.code_zero = output.code_zero;
          kernels.epilogue(buffer, static_cast<int>(mr), columns, e);
        }
        r += mr;
      }
    }
  }
}

}  // namespace bertkern::cpu
