// The body of a tile kernel, for files compiled for one ISA. A Dot policy supplies the dot product of a dword:
//
//   Acc, Vec, Act                accumulator, weights and activation; kWidth outputs each
//   Acc init(const void*)        kWidth accumulators
//   Vec load(const uint32_t*)    kWidth weight dwords
//   Act broadcast(const uint32_t* a, int64_t plane)  one activation dword, of kPlanes planes
//   void step(Acc&, Act, Vec)    one step of the dot product
//   vf value(Acc)                as floats
//
// Two weight vectors are kept at a time, so a panel takes kPanel / (2 kWidth) passes.
#pragma once

#include "cpu/gemm/gemm.h"
#include "cpu/simd.h"

namespace bertkern::cpu {
namespace {

struct Dot_f32 {
  using Acc = vf;
  using Vec = vf;
  using Act = vf;
  static constexpr bool kInteger = false;
  static constexpr int kPlanes = 1;
  BK_INLINE Acc init(const void* p) { return vload(static_cast<const float*>(p)); }
  BK_INLINE Vec load(const uint32_t* b) { return as_float(vloadi(reinterpret_cast<const int32_t*>(b))); }
  BK_INLINE Act broadcast(const uint32_t* a, int64_t) { return as_float(vseti(static_cast<int32_t>(*a))); }
  BK_INLINE void step(Acc& acc, Act x, Vec w) { acc = vfma(x, w, acc); }
  BK_INLINE vf value(Acc acc) { return acc; }
};

struct Dot_bf16 : Dot_f32 {  // the low half of a dword is the earlier k
  struct Vec {
    vf low, high;
  };
  using Act = Vec;
  BK_INLINE Vec split(vi x) {
    return {as_float(vshift_left(x, 16)), as_float(vandi(x, vseti(static_cast<int32_t>(0xffff0000u))))};
  }
  BK_INLINE Vec load(const uint32_t* b) { return split(vloadi(reinterpret_cast<const int32_t*>(b))); }
  BK_INLINE Act broadcast(const uint32_t* a, int64_t) { return split(vseti(static_cast<int32_t>(*a))); }
  BK_INLINE void step(Acc& acc, const Act& x, const Vec& w) { acc = vfma(x.high, w.high, vfma(x.low, w.low, acc)); }
};

#if defined(__AVX2__)
// vpmaddwd on 16-bit halves: exact, where vpmaddubsw would saturate.
struct Dot_madd {
  using Acc = vi;
  struct Vec {
    vi even, odd;
  };
  using Act = Vec;
  static constexpr bool kInteger = true;
  static constexpr int kPlanes = 2;
  BK_INLINE Acc init(const void* p) { return vloadi(static_cast<const int32_t*>(p)); }
  BK_INLINE Vec load(const uint32_t* b) {
    const vi w = vloadi(reinterpret_cast<const int32_t*>(b));
    return {vshift_right16(vshift_left16(w, 8), 8), vshift_right16(w, 8)};
  }
  BK_INLINE Act broadcast(const uint32_t* a, int64_t plane) {
    return {vseti(static_cast<int32_t>(*a)), vseti(static_cast<int32_t>(a[plane]))};
  }
  BK_INLINE void step(Acc& acc, const Act& x, const Vec& w) {
    acc = vaddi(acc, vaddi(vmadd16(x.even, w.even), vmadd16(x.odd, w.odd)));
  }
  BK_INLINE vf value(Acc acc) { return to_float(acc); }
};
#endif

template <class Dot, int MR, bool kResidual, bool kBf16>
BK_INLINE void finish(typename Dot::Acc (&acc)[MR][2], int64_t j, const TileOutput& o) {
#pragma GCC unroll 2
  for (int v = 0; v < 2; ++v) {
    const int64_t n = j + v * kWidth;
    const vf scale = Dot::kInteger ? vload(o.weight_scale + n) : vset(0.0f);
    const vf bias = Dot::kInteger ? vload(o.bias + n) : vset(0.0f);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      vf y = Dot::value(acc[r][v]);
      if (Dot::kInteger)
        y = vadd(vmul(y, vmul(vset(o.row_scale[r]), scale)), bias);  // unfused: equal bits on every ISA
      if (kResidual) y = vadd(y, vload(o.residual + r * o.residual_pitch + n));
      if (kBf16)
        vstore_bf16_n(static_cast<uint16_t*>(o.out) + r * o.pitch + n, y, kWidth);
      else
        vstore(static_cast<float*>(o.out) + r * o.pitch + n, y);
    }
  }
}

template <class Dot, int MR>
void tile(const uint32_t* a, int64_t lda, const uint32_t* b, int64_t kd, const TileOutput& o) {
  constexpr int V = 2;
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) {
    const int64_t bytes = o.bf16 ? 2 : 4;
    const char* out = static_cast<const char*>(o.out) + r * o.pitch * bytes;
    __builtin_prefetch(out, 1);
    __builtin_prefetch(out + kPanel * bytes - 1, 1);
  }
  for (int64_t j = 0; j < kPanel; j += kWidth * V) {
    typename Dot::Acc acc[MR][V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const typename Dot::Acc start =
          o.init ? Dot::init(static_cast<const char*>(o.init) + (j + v * kWidth) * 4) : typename Dot::Acc{};
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) acc[r][v] = start;
    }
    const uint32_t* ak = a;
    const uint32_t* bk = b + j;
    const char* ahead = o.ahead;
    for (int64_t k = 0; k < kd; ++k, ak += lda * Dot::kPlanes, bk += kPanel, ahead += o.ahead_step) {
      __builtin_prefetch(ahead, 0, 2);
      typename Dot::Vec w[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        w[v] = Dot::load(bk + v * kWidth);
      }
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) {
        const typename Dot::Act x = Dot::broadcast(ak + r, lda);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) Dot::step(acc[r][v], x, w[v]);
      }
    }
    if (o.bf16)
      o.residual ? finish<Dot, MR, true, true>(acc, j, o) : finish<Dot, MR, false, true>(acc, j, o);
    else
      o.residual ? finish<Dot, MR, true, false>(acc, j, o) : finish<Dot, MR, false, false>(acc, j, o);
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
  TileKernels kernels{kMaxMr, Dot::kPlanes, {}};
  FillTiles<Dot, kMaxMr>::run(kernels);
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
