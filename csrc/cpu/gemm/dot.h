// Dot policies: the dot product of a dword, for files compiled for one ISA.
//
//   Acc, Vec, Act                accumulator, weights and activation; kWidth outputs each
//   Acc init(const void*)        kWidth accumulators
//   void step(Acc&, Act, Vec)    one step of the dot product
//   vf value(Acc)                as floats
//
// Lanes are features, or rows of X:
//
//   Vec load(const uint32_t*)    kWidth weight dwords
//   Act broadcast(const uint32_t* a, int64_t plane)  one activation dword, of kPlanes planes side by side
//   Act rows(const uint32_t* a, int64_t plane)       the dwords of kWidth rows
//   Vec splat(uint32_t)          one weight dword
//   Vec weights(vi)              weight dwords that are in a register
//
// Integer ones also:
//
//   Acc add(Acc, Acc), spread(int32_t), times(Acc, int32_t)
//
// Where weights are ordered (kOrdered):
//
//   void step_pair(Acc&, vi x, vi w)                 one dword; 2 products fit 16 bits
//   void step_four(Acc&, vi x, vi w, vi x2, vi w2)   two dwords; 4 products do
//   void step_wide(Acc&, vi x, Vec w)                one dword; a product does
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
  static constexpr bool kOrdered = false;
  static constexpr int kPlanes = 1;
  BK_INLINE Acc init(const void* p) { return vload(static_cast<const float*>(p)); }
  BK_INLINE Vec load(const uint32_t* b) { return as_float(vloadi(reinterpret_cast<const int32_t*>(b))); }
  BK_INLINE Act broadcast(const uint32_t* a, int64_t) { return as_float(vseti(static_cast<int32_t>(*a))); }
  BK_INLINE Act rows(const uint32_t* a, int64_t) { return vload(reinterpret_cast<const float*>(a)); }
  BK_INLINE Vec splat(uint32_t w) { return as_float(vseti(static_cast<int32_t>(w))); }
  BK_INLINE Vec weights(vi w) { return as_float(w); }
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
  BK_INLINE Act rows(const uint32_t* a, int64_t) { return load(a); }
  BK_INLINE Vec splat(uint32_t w) { return split(vseti(static_cast<int32_t>(w))); }
  BK_INLINE Vec weights(vi w) { return split(w); }
  BK_INLINE void step(Acc& acc, const Act& x, const Vec& w) { acc = vfma(x.high, w.high, vfma(x.low, w.low, acc)); }
};

#if defined(__AVX2__)
// vpmaddubsw where its sums fit 16 bits, else vpmaddwd on bytes that are widened.
struct Dot_madd {
  using Acc = vi;
  struct Vec {
    vi even, odd;
  };
  using Act = Vec;
  static constexpr bool kInteger = true;
  static constexpr bool kOrdered = true;
  static constexpr int kPlanes = 2;
  BK_INLINE Acc init(const void* p) { return vloadi(static_cast<const int32_t*>(p)); }
  BK_INLINE Vec split(vi w) { return {vshift_right16(vshift_left16(w, 8), 8), vshift_right16(w, 8)}; }
  BK_INLINE Vec load(const uint32_t* b) { return split(vloadi(reinterpret_cast<const int32_t*>(b))); }
  BK_INLINE Act broadcast(const uint32_t* a, int64_t plane) {
    return {vseti(static_cast<int32_t>(*a)), vseti(static_cast<int32_t>(a[plane]))};
  }
  BK_INLINE Act rows(const uint32_t* a, int64_t plane) {
    return {vloadi(reinterpret_cast<const int32_t*>(a)), vloadi(reinterpret_cast<const int32_t*>(a + plane))};
  }
  BK_INLINE Vec splat(uint32_t w) { return split(vseti(static_cast<int32_t>(w))); }
  BK_INLINE Vec weights(vi w) { return split(w); }
  BK_INLINE Acc add(Acc a, Acc b) { return vaddi(a, b); }
  BK_INLINE Acc spread(int32_t x) { return vseti(x); }
  BK_INLINE Acc times(Acc a, int32_t x) { return vmuli(a, vseti(x)); }
  BK_INLINE void step(Acc& acc, const Act& x, const Vec& w) {
    acc = vaddi(acc, vaddi(vmadd16(x.even, w.even), vmadd16(x.odd, w.odd)));
  }
  BK_INLINE void step_pair(Acc& acc, vi x, vi w) { acc = vaddi(acc, vsum16(vmadd8(x, w))); }
  BK_INLINE void step_four(Acc& acc, vi x, vi w, vi x2, vi w2) {
    acc = vaddi(acc, vsum16(vadd16(vmadd8(x, w), vmadd8(x2, w2))));
  }
  BK_INLINE void step_wide(Acc& acc, vi x, const Vec& w) {
    const Act planes{vandi(x, vseti(0x00ff00ff)), vshift_right16_unsigned(x, 8)};
    step(acc, planes, w);
  }
  BK_INLINE vf value(Acc acc) { return to_float(acc); }
};
#endif

}  // namespace
}  // namespace bertkern::cpu
