// All loops over a Dot policy, as one row of kernels.inc.
#pragma once

#include "cpu/gemm/group_tile.h"
#include "cpu/gemm/ordered_tile.h"
#include "cpu/gemm/sparse_tile.h"
#include "cpu/gemm/tile.h"

namespace bertkern::cpu {
namespace {

template <class Dot, int MR>
struct FillTiles {
  static constexpr void run(TileKernels& kernels) {
    FillTiles<Dot, MR - 1>::run(kernels);
    kernels.tile[MR] = &tile<Dot, MR>;
    kernels.sparse_tile[MR] = &sparse_tile<Dot, MR>;
  }
};
template <class Dot>
struct FillTiles<Dot, 0> {
  static constexpr void run(TileKernels&) {}
};

template <class Dot, int MR, bool kOrderedDot>
struct FillOrdered {
  static constexpr void run(TileKernels& kernels) {
    FillOrdered<Dot, MR - 1, kOrderedDot>::run(kernels);
    kernels.ordered = kWidth, kernels.ordered_mr = kOrderedRows;
    kernels.ordered_tile[MR] = &ordered_tile<Dot, MR>;
  }
};
template <class Dot>
struct FillOrdered<Dot, 0, true> {
  static constexpr void run(TileKernels&) {}
};
template <class Dot, int MR>
struct FillOrdered<Dot, MR, false> {
  static constexpr void run(TileKernels&) {}
};

template <class Dot, int MR>
struct FillGroupTiles {
  static constexpr void run(TileKernels& kernels) {
    FillGroupTiles<Dot, MR - 1>::run(kernels);
    kernels.group_tile[MR] = &group_tile<Dot, MR>;
  }
};
template <class Dot>
struct FillGroupTiles<Dot, 0> {
  static constexpr void run(TileKernels&) {}
};
template <class Dot, int kBits>
struct FillNarrow {
  static constexpr void run(TileKernels& kernels) {
    FillNarrow<Dot, kBits - 1>::run(kernels);
    kernels.narrow_tile[kBits][0] = &narrow_tile<Dot, kBits, 1>;
    kernels.narrow_tile[kBits][1] = &narrow_tile<Dot, kBits, 2>;
    kernels.narrow_tile[kBits][2] = &narrow_tile<Dot, kBits, 4>;
    kernels.narrow_group_tile[kBits][0] = &narrow_group_tile<Dot, kBits, 1>;
    kernels.narrow_group_tile[kBits][1] = &narrow_group_tile<Dot, kBits, 2>;
    kernels.narrow_group_tile[kBits][2] = &narrow_group_tile<Dot, kBits, 4>;
  }
};
template <class Dot>
struct FillNarrow<Dot, 1> {
  static constexpr void run(TileKernels&) {}
};
template <class Dot, bool kInteger>
struct FillGroups {
  static constexpr void run(TileKernels& kernels) {
    kernels.group_mr = kGroupTileRows;
    FillGroupTiles<Dot, kGroupTileRows>::run(kernels);
    FillNarrow<Dot, kNarrowBits>::run(kernels);
    kernels.decode = &decode;
    kernels.dequantize = &dequantize;
  }
};
template <class Dot>
struct FillGroups<Dot, false> {
  static constexpr void run(TileKernels&) {}
};

// 120 KiB of a panel and of X. (Parts that fit into the L1 gain no more than their sums, which come and go, cost.)
constexpr int64_t kCarried = kWidth == 8 ? 768 : 0;

template <class Dot, int kMaxMr>
constexpr TileKernels make_tiles() {
  TileKernels kernels{};
  kernels.pitch = kWidth == 8 ? 8 : 16, kernels.k_block = Dot::kInteger ? 0 : kCarried;
  kernels.max_mr = kMaxMr, kernels.planes = Dot::kPlanes;
  kernels.finish_tokens = &finish_tokens<Dot>;
  FillTiles<Dot, kMaxMr>::run(kernels);
  FillOrdered<Dot, kOrderedRows, Dot::kOrdered>::run(kernels);
  FillGroups<Dot, Dot::kInteger>::run(kernels);
  kernels.tokens[0] = &tokens<Dot, 1>;
  kernels.tokens[1] = &tokens<Dot, 2>;
  kernels.tokens[2] = &tokens<Dot, 4>;
  return kernels;
}

}  // namespace
}  // namespace bertkern::cpu

// The tiles of a weight kind on an ISA, by a Dot policy.
#define BERTKERN_DEFINE_TILES(dot, kind, isa, max_mr)                       \
  namespace bertkern::cpu {                                                 \
  extern const TileKernels tiles_##kind##_##isa;                            \
  const TileKernels tiles_##kind##_##isa = make_tiles<Dot_##dot, max_mr>(); \
  }
