// The Dot policy of vpdpbusd: 14 x 32 int8 tile, 28 accumulators + 2 weight vectors + 1 broadcast in 32 registers.
#pragma once

#include "cpu/gemm/dot.h"

namespace bertkern::cpu {
namespace {

struct Dot_vnni {
  // Not __m512i: gcc 12 copies 64-bit-lane accumulators around _mm512_dpbusd_epi32 and spills them (half the speed).
  typedef int32_t Acc __attribute__((vector_size(64)));
  using Vec = Acc;
  using Act = Acc;
  static constexpr bool kInteger = true;
  static constexpr bool kOrdered = false;
  static constexpr int kPlanes = 1;
  BK_INLINE Acc init(const void* p) { return (Acc)_mm512_loadu_si512(p); }
  BK_INLINE Vec load(const uint32_t* b) { return (Vec)_mm512_loadu_si512(b); }
  BK_INLINE Act broadcast(const uint32_t* a, int64_t) { return (Act)_mm512_set1_epi32(static_cast<int>(*a)); }
  BK_INLINE Act rows(const uint32_t* a, int64_t) { return load(a); }
  BK_INLINE Vec splat(uint32_t w) { return (Vec)_mm512_set1_epi32(static_cast<int>(w)); }
  BK_INLINE Vec weights(vi w) { return (Vec)w; }
  BK_INLINE Acc add(Acc a, Acc b) { return a + b; }
  BK_INLINE Acc spread(int32_t x) { return (Acc)_mm512_set1_epi32(x); }
  BK_INLINE Acc times(Acc a, int32_t x) { return a * x; }
  BK_INLINE void step(Acc& acc, Act x, Vec w) { asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(x), "v"(w)); }
  BK_INLINE vf value(Acc acc) { return to_float((__m512i)acc); }
};

}  // namespace
}  // namespace bertkern::cpu
