// All loops over a Dot policy, as one row of kernels.inc.
#pragma once

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

template <class Dot, int kMaxMr>
constexpr TileKernels make_tiles() {
  TileKernels kernels{kMaxMr, Dot::kPlanes, {}, {}, {}, &finish_tokens<Dot>};
  FillTiles<Dot, kMaxMr>::run(kernels);
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
