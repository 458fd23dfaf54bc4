// The body of a tile kernel, for files compiled for one ISA. A Dot policy supplies the vectors:
//
//   Acc, Vec                    accumulator and weight vector; kLanes outputs each
//   Acc init(const void*, j)    accumulators j * kLanes ... of the panel, or zero for null
//   Vec load(const uint32_t*)   kLanes weight dwords
//   Act broadcast(uint32_t)     one activation dword
//   void step(Acc&, Act, Vec)   one step of the dot product
//   void store(void*, Acc)
//
// kVectors weight vectors are kept at a time, so a panel takes kPanel / (kLanes * kVectors) passes.
#pragma once

#include "cpu/gemm/gemm.h"
#include "cpu/simd.h"

namespace bertkern::cpu {
namespace {

template <class Dot, int MR>
void tile(const uint32_t* a, int64_t lda, const uint32_t* b, int64_t kd, void* c, const void* init) {
  constexpr int L = Dot::kLanes, V = Dot::kVectors;
  for (int64_t j = 0; j < kPanel; j += L * V) {
    typename Dot::Acc acc[MR][V];
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] = Dot::init(init, j + v * L);
    const uint32_t* ak = a;
    const uint32_t* bk = b + j;
    for (int64_t k = 0; k < kd; ++k, ak += lda, bk += kPanel) {
      typename Dot::Vec w[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) w[v] = Dot::load(bk + v * L);
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) {
        const typename Dot::Act x = Dot::broadcast(ak + r);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) Dot::step(acc[r][v], x, w[v]);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) Dot::store(static_cast<char*>(c) + (r * kPanel + j + v * L) * 4, acc[r][v]);
  }
}

template <class Dot, int MR>
struct FillTiles {
  static constexpr void run(TileKernels& kernels) {
    FillTiles<Dot, MR - 1>::run(kernels);
    kernels.tile[MR] = &tile<Dot, MR>;
  }
};
template <class Dot>
struct FillTiles<Dot, 0> {
  static constexpr void run(TileKernels&) {}
};

template <class Dot, int kMaxMr>
constexpr TileKernels make_tiles() {
  TileKernels kernels{kMaxMr, {}};
  FillTiles<Dot, kMaxMr>::run(kernels);
  return kernels;
}

}  // namespace
}  // namespace bertkern::cpu

#define BERTKERN_DEFINE_TILES(kind, isa, max_mr)                             \
  namespace bertkern::cpu {                                                  \
  extern const TileKernels tiles_##kind##_##isa;                             \
  const TileKernels tiles_##kind##_##isa = make_tiles<Dot_##kind, max_mr>(); \
  }
