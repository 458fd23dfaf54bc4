// The Dot policy of vdpbf16ps, which flushes denormals and rounds to nearest even whatever MXCSR says.
#pragma once

#include "cpu/gemm/dot.h"

namespace bertkern::cpu {
namespace {

struct Dot_dpbf16 : Dot_f32 {
  using Vec = vi;
  using Act = vi;
  BK_INLINE Vec load(const uint32_t* b) { return vloadi(reinterpret_cast<const int32_t*>(b)); }
  BK_INLINE Act broadcast(const uint32_t* a, int64_t) { return vseti(static_cast<int32_t>(*a)); }
  BK_INLINE Act rows(const uint32_t* a, int64_t) { return load(a); }
  BK_INLINE Vec splat(uint32_t w) { return vseti(static_cast<int32_t>(w)); }
  BK_INLINE Vec weights(vi w) { return w; }
  BK_INLINE void step(Acc& acc, Act x, Vec w) { asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(x), "v"(w)); }
};

}  // namespace
}  // namespace bertkern::cpu
