// Any processor: GNU vectors of four lanes.
#include "cpu/gemm/tiles.h"

namespace bertkern::cpu {
namespace {

struct Dot_bytes {
  using Acc = vi;
  struct Vec {
    vi byte[4];
  };
  using Act = Vec;
  static constexpr bool kInteger = true;
  static constexpr bool kOrdered = false;
  static constexpr int kPlanes = 1;
  BK_INLINE Acc init(const void* p) { return vloadi(static_cast<const int32_t*>(p)); }
  BK_INLINE Vec split(vi w) { return {{(w << 24) >> 24, (w << 16) >> 24, (w << 8) >> 24, w >> 24}}; }
  BK_INLINE Vec load(const uint32_t* b) { return split(vloadi(reinterpret_cast<const int32_t*>(b))); }
  BK_INLINE Act broadcast(const uint32_t* a, int64_t) {
    const uint32_t x = *a;
    return {{vseti(x & 255u), vseti((x >> 8) & 255u), vseti((x >> 16) & 255u), vseti(x >> 24)}};
  }
  BK_INLINE Act rows(const uint32_t* a, int64_t) {
    const vi x = vloadi(reinterpret_cast<const int32_t*>(a));
    return {{x & 255, (x >> 8) & 255, (x >> 16) & 255, (x >> 24) & 255}};
  }
  BK_INLINE Vec splat(uint32_t w) { return split(vseti(static_cast<int32_t>(w))); }
  BK_INLINE Vec weights(vi w) { return split(w); }
  BK_INLINE Acc add(Acc a, Acc b) { return a + b; }
  BK_INLINE Acc spread(int32_t x) { return vseti(x); }
  BK_INLINE Acc times(Acc a, int32_t x) { return a * x; }
  BK_INLINE void step(Acc& acc, const Act& x, const Vec& w) {
    for (int i = 0; i < 4; ++i) acc += x.byte[i] * w.byte[i];
  }
  BK_INLINE vf value(Acc acc) { return to_float(acc); }
};

}  // namespace
}  // namespace bertkern::cpu

BERTKERN_DEFINE_TILES(f32, f32, portable, 4)
BERTKERN_DEFINE_TILES(bf16, bf16, portable, 4)
BERTKERN_DEFINE_TILES(bytes, s8, portable, 4)
