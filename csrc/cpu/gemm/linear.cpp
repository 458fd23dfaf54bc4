// The left operand of a product, and the loops over its tiles.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/gemm/linear.h"
#include "cpu/scratch.h"

namespace bertkern::cpu {

namespace {

constexpr int64_t kLeastRows = 6;  // of a group that is one of several for a reason: fewer leave the dot products idle
constexpr int64_t kSplitRows = 6;  // measured: fewer rows wait for memory in any case

// Wide tiles take a group each; narrow ones share a group.
int64_t group_rows(const Linear& linear) {
  const int max_mr = tile_kernels(linear.kind).max_mr;
  return max_mr > 8 && linear.layout != Layout::tokens ? max_mr : kGroupPitch;
}

// Two groups at least: while one passes over a panel, the other fetches the next (see gemm).
int64_t group_count(const Linear& linear, int64_t rows, int64_t multiple) {
  int64_t groups = (rows + group_rows(linear) - 1) / group_rows(linear);
  if (linear.layout == Layout::tokens) return groups;  // an idle lane costs as much as a busy one
  if (groups == 1 && rows >= kSplitRows) groups = 2;
  const int64_t rounded = (groups + multiple - 1) / multiple * multiple;
  return rounded * kLeastRows <= rows ? rounded : groups;
}

thread_local Scratch staging;

}  // namespace

bool same_operand(const Linear& a, const Linear& b) {
  return a.kind == b.kind && a.k == b.k && a.input_scale == b.input_scale && a.input_zero == b.input_zero &&
         (a.layout == Layout::tokens) == (b.layout == Layout::tokens);
}

int64_t rows_dwords(const Linear& linear, int64_t rows, int64_t multiple) {
  const int64_t groups = group_count(linear, rows, multiple);
  return groups * (linear.kd * tile_kernels(linear.kind).planes * kGroupPitch + kGroupPad) + 64;
}

Rows make_rows(const Linear& linear, int64_t rows, uint32_t* data, float* scale, int64_t multiple) {
  const int64_t groups = group_count(linear, rows, multiple);
  const int64_t pitch = rows == groups && linear.layout != Layout::tokens ? 1 : kGroupPitch;
  return {rows, groups, linear.kd, tile_kernels(linear.kind).planes, pitch, data, scale};
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
  if (rows.pitch == 1) return row(r0, out);
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

namespace {

// Where a tile's sums go: straight to the rows of Y where nothing but the sums, or their bf16, is asked for; else
// through a buffer of floats that the epilogue makes rows of Y from.
class Sink {
 public:
  Sink(const Linear& linear, const Output& output) : linear_(linear), output_(output) {}

  bool in_tile() const {
    return output_.activation == Activation::none && linear_.output_scale <= 0.0f && output_.dtype <= Dtype::bf16;
  }
  void* row(int64_t r, int64_t column) const {
    return static_cast<char*>(output_.out) + (r * output_.out_pitch + column) * dtype_size(output_.dtype);
  }
  const float* residual(int64_t r, int64_t column) const {
    return output_.residual ? output_.residual + r * output_.residual_pitch + column : nullptr;
  }
  // Rows [r, r + mr) x columns [column, column + columns) from a buffer of kPanel columns.
  void write(const float* buffer, int64_t r, int64_t mr, int64_t column, int64_t columns) const {
    Epilogue e;
    e.output_scale = linear_.output_scale;
    e.activation = output_.activation;
    e.residual = residual(r, column), e.residual_pitch = output_.residual_pitch;
    e.out = row(r, column), e.out_pitch = output_.out_pitch;
    e.dtype = output_.dtype;
    e.code_step = output_.code_step, e.code_zero = output_.code_zero;
    kernels_.epilogue(buffer, static_cast<int>(mr), columns, e);
  }

 private:
  const Linear& linear_;
  const Output& output_;
  const RowKernels& kernels_ = row_kernels();
};

void gemm_tiles(const Linear& linear, const Rows& rows, int64_t g0, int64_t g1, int64_t p0, int64_t p1,
                const Output& output, const void* start) {
  const TileKernels& tiles = tile_kernels(linear.kind);
  const bool integer = linear.kind == WeightKind::s8, dense = linear.layout == Layout::dense;
  const Sink sink(linear, output);
  alignas(64) float buffer[kMaxRows * kPanel];
  for (int64_t p = p0; p < p1; ++p) {
    const int64_t column = p * kPanel, columns = std::min(kPanel, linear.n - column);
    const bool direct = sink.in_tile() && columns == kPanel;
    const SparsePanel listed = dense ? SparsePanel{} : sparse_panel(linear, p);
    const uint32_t* panel = dense ? linear.weights + p * linear.kd * kPanel : listed.weights;
    const int64_t steps = dense ? linear.kd : listed.both + listed.half[0] + listed.half[1];
    TileOutput sums{};
    sums.init = static_cast<const char*>(start) + column * 4;
    if (integer) sums.weight_scale = linear.scale + column, sums.bias = linear.bias + column;
    sums.out = buffer, sums.pitch = kPanel, sums.bf16 = direct && output.dtype == Dtype::bf16;
    // Few rows take weights from memory: the groups fetch the next panel while they compute, each its share, evenly.
    // (All at once, or a fixed distance ahead, is slower than nothing: it holds up the loads of the running panel.)
    const Piece next = p + 1 < p1 ? panel_weights(linear, p + 1) : output.after;
    const int64_t share = g1 - g0 > 1 && steps > 0 ? next.bytes / (g1 - g0) : 0;
    sums.ahead = reinterpret_cast<const char*>(panel);
    for (int64_t g = g0; g < g1; ++g) {
      const int64_t begin = rows.begin(g), end = rows.begin(g + 1);
      if (share) {
        sums.ahead = reinterpret_cast<const char*>(next.data) + (g - g0) * share;
        sums.ahead_step = std::min<int64_t>(64, (share + steps - 1) / steps);
      }
      for (int64_t r = begin; r < end;) {
        const int64_t left = (end - r + tiles.max_mr - 1) / tiles.max_mr, mr = (end - r + left - 1) / left;
        if (integer) sums.row_scale = rows.scale + r;
        if (direct) {
          sums.residual = sink.residual(r, column), sums.residual_pitch = output.residual_pitch;
          sums.out = sink.row(r, column), sums.pitch = output.out_pitch;
        }
        const uint32_t* a = rows.group_data(g) + (r - begin);
        if (dense)
          tiles.tile[mr](a, rows.pitch, panel, linear.kd, sums);
        else
          tiles.sparse_tile[mr](a, rows.pitch, listed, sums);
        if (!direct) sink.write(buffer, r, mr, column, columns);
        r += mr;
      }
    }
  }
}

void gemm_tokens(const Linear& linear, const Rows& rows, int64_t g0, int64_t g1, int64_t p0, int64_t p1,
                 const Output& output, const void* start) {
  const TileKernels& tiles = tile_kernels(linear.kind);
  const Sink sink(linear, output);
  const auto run = tiles.tokens[linear.features / 2];
  alignas(64) uint32_t sums[kPanel * kTokenGroups * kTokens];
  alignas(64) float buffer[kTokens * kPanel];
  for (int64_t g = g0; g < g1; g += kTokenGroups) {
    const int64_t groups = std::min(kTokenGroups, g1 - g), pitch = groups * kTokens;
    for (int64_t p = p0; p < p1; ++p) {
      const int64_t column = p * kPanel, columns = std::min(kPanel, linear.n - column);
      const bool direct = sink.in_tile() && columns == kPanel && !output.residual && output.dtype == Dtype::f32;
      run(rows.group_data(g), rows.group_dwords(), groups, token_panel(linear, p),
          static_cast<const char*>(start) + column * 4, sums, pitch);
      for (int64_t i = 0; i < groups; ++i) {
        const int64_t r = rows.begin(g + i), mr = rows.begin(g + i + 1) - r;
        TileOutput tile{};
        if (rows.scale) tile.row_scale = rows.scale + r, tile.weight_scale = linear.scale + column;
        tile.bias = linear.bias + column;
        tile.out = direct ? sink.row(r, column) : buffer;
        tile.pitch = direct ? output.out_pitch : kPanel;
        tiles.finish_tokens(sums + i * kTokens, pitch, mr, tile);
        if (!direct) sink.write(buffer, r, mr, column, columns);
      }
    }
  }
}

}  // namespace

void gemm(const Linear& linear, const Rows& rows, int64_t g0, int64_t g1, int64_t p0, int64_t p1, const Output& output,
          const int32_t* init) {
  const bool integer = linear.kind == WeightKind::s8;
  const void* start = integer ? static_cast<const void*>(init ? init : linear.init) : linear.bias;
  if (linear.layout == Layout::tokens)
    gemm_tokens(linear, rows, g0, g1, p0, p1, output, start);
  else
    gemm_tiles(linear, rows, g0, g1, p0, p1, output, start);
}

}  // namespace bertkern::cpu
