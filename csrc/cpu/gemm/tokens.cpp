// The loops over weights whose lanes are rows of X (Layout::tokens).
#include <algorithm>
#include <cstring>

#include "cpu/gemm/loops.h"
#include "cpu/scratch.h"

namespace bertkern::cpu {

namespace {

thread_local Scratch token_sums;

}  // namespace

void gemm_tokens(const Linear& linear, const Rows& rows, int64_t g0, int64_t g1, int64_t p0, int64_t p1,
                 const Output& output, const void* start) {
  static constexpr int32_t kNothing[kPanel] = {};
  const TileKernels& tiles = tile_kernels(linear.kind);
  Sink sink(linear, output);
  const auto run = tiles.tokens[linear.features / 2];
  const int64_t blocks = token_blocks(linear);
  uint32_t* const sums = token_sums.get<uint32_t>(kTokenPanels * kPanel * kTokenGroups * kTokens);
  // Rows are written in long pieces: lines of many rows that lie 4 KiB apart would drive each other out of the L1.
  const bool straight = sink.in_tile() && !output.residual && output.dtype == Dtype::f32;
  constexpr int64_t kTokenPitch = kTokenPanels * kPanel + 16;
  alignas(64) float buffer[kTokens * kTokenPitch];
  for (int64_t g = g0; g < g1; g += kTokenGroups) {
    const int64_t groups = std::min(kTokenGroups, g1 - g), pitch = groups * kTokens;
    const auto init = [&](int64_t p) { return static_cast<const char*>(start) + p * kPanel * 4; };
    const auto tile_at = [&](int64_t p, int64_t r) {
      TileOutput tile{};
      if (rows.scale) tile.row_scale = rows.scale + r, tile.weight_scale = linear.scale + p * kPanel;
      if (rows.zeros) tile.row_zero = rows.zeros + r, tile.init = init(p);
      tile.bias = linear.bias + p * kPanel;
      return tile;
    };
    for (int64_t first = p0, last; first < p1; first = last) {
      last = std::min((first / kTokenPanels + 1) * kTokenPanels, p1);  // as they lie
      const auto panel_sums = [&](int64_t p) { return sums + (p - first) * kPanel * pitch; };
      for (int64_t block = 0; block < blocks; ++block)
        for (int64_t p = first; p < last; ++p) {
          // Lanes are rows: where these have zero points of their own, the finish takes them away.
          const void* begin = block > 0 ? nullptr : rows.zeros ? static_cast<const void*>(kNothing) : init(p);
          run(rows.group_data(g), rows.group_dwords(), groups, token_panel(linear, p, block), begin, panel_sums(p),
              pitch);
        }
      const int64_t column = first * kPanel, columns = std::min(last * kPanel, linear.n) - column;
      for (int64_t i = 0; i < groups; ++i) {
        const int64_t r = rows.begin(g + i), mr = rows.begin(g + i + 1) - r;
        for (int64_t p = first; p < last; ++p) {
          TileOutput tile = tile_at(p, r);
          tile.out = buffer + (straight ? (p - first) * kPanel : 0), tile.pitch = straight ? kTokenPitch : kPanel;
          tiles.finish_tokens(panel_sums(p) + i * kTokens, pitch, mr, tile);
          if (!straight) sink.write(buffer, r, mr, p * kPanel, std::min(kPanel, linear.n - p * kPanel));
        }
        for (int64_t t = 0; straight && t < mr; ++t)
          std::memcpy(sink.row(r + t, column), buffer + t * kTokenPitch, static_cast<size_t>(columns) * 4);
      }
    }
  }
}

}  // namespace bertkern::cpu
