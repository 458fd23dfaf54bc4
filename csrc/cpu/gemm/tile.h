// The body of a dense tile kernel: two weight vectors are kept at a time, so a panel takes kPanel / (2 kWidth) passes.
#pragma once

#include "cpu/gemm/dot.h"

namespace bertkern::cpu {
namespace {

constexpr int kVectors = 2;

template <class Dot, int MR, int V>
BK_INLINE void start(typename Dot::Acc (&acc)[MR][V], int64_t j, const TileOutput& o) {
  if constexpr (!Dot::kInteger) {
    if (o.resume) {
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) acc[r][v] = Dot::init(o.carry + r * kPanel + j + v * kWidth);
      return;
    }
  }
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) {
    const typename Dot::Acc first =
        o.init ? Dot::init(static_cast<const char*>(o.init) + (j + v * kWidth) * 4) : typename Dot::Acc{};
    if constexpr (Dot::kInteger) {
      if (o.row_zero) {
#pragma GCC unroll 16
        for (int r = 0; r < MR; ++r) acc[r][v] = Dot::times(first, -o.row_zero[r]);
        continue;
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) acc[r][v] = first;
  }
}

template <bool kResidual, bool kBf16>
BK_INLINE void put(vf y, int r, int64_t n, const TileOutput& o) {
  if (kResidual) y = vadd(y, vload(o.residual + r * o.residual_pitch + n));
  if (kBf16)
    vstore_bf16_n(static_cast<uint16_t*>(o.out) + r * o.pitch + n, y, kWidth);
  else
    vstore(static_cast<float*>(o.out) + r * o.pitch + n, y);
}

// Vector v holds the features from j + v * kStride on.
template <class Dot, int MR, bool kResidual, bool kBf16, int kStride, int V>
BK_INLINE void store(typename Dot::Acc (&acc)[MR][V], int64_t j, const TileOutput& o) {
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) {
    const int64_t n = j + v * kStride;
    const vf scale = Dot::kInteger ? vload(o.weight_scale + n) : vset(0.0f);
    const vf bias = Dot::kInteger ? vload(o.bias + n) : vset(0.0f);
    const bool shifted = Dot::kInteger && o.weight_zero;
    const vf zero = shifted ? vload(o.weight_zero + n) : vset(0.0f);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      vf y = Dot::value(acc[r][v]);
      if (shifted) y = vsub(y, vmul(vset(o.row_sum[r]), zero));
      if (Dot::kInteger)
        y = vadd(vmul(y, vmul(vset(o.row_scale[r]), scale)), bias);  // unfused: equal bits on every ISA
      put<kResidual, kBf16>(y, r, n, o);
    }
  }
}

template <class Dot, int MR, int kStride = kWidth, int V>
BK_INLINE void finish(typename Dot::Acc (&acc)[MR][V], int64_t j, const TileOutput& o) {
  if constexpr (!Dot::kInteger) {
    if (o.suspend) {
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) vstore(o.carry + r * kPanel + j + v * kStride, Dot::value(acc[r][v]));
      return;
    }
  }
  if (o.bf16)
    o.residual ? store<Dot, MR, true, true, kStride>(acc, j, o) : store<Dot, MR, false, true, kStride>(acc, j, o);
  else
    o.residual ? store<Dot, MR, true, false, kStride>(acc, j, o) : store<Dot, MR, false, false, kStride>(acc, j, o);
}

// Where few groups of rows pass over a panel, as a step of `ahead` tells. Where many do, the last tile's output is
// still being written when the next one begins, and lines fetched in between only hold it up.
template <int MR>
BK_INLINE void fetch_output(const TileOutput& o) {
  if (o.ahead_step == 0) return;
  const int64_t bytes = o.bf16 ? 2 : 4;
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) {
    const char* out = static_cast<const char*>(o.out) + r * o.pitch * bytes;
    __builtin_prefetch(out, 1);
    __builtin_prefetch(out + kPanel * bytes - 1, 1);
  }
}

// acc[r][first + v] += a[r] * b[v], one dword of K.
template <class Dot, int MR, int V, int first>
BK_INLINE void step(typename Dot::Acc (&acc)[MR][kVectors], const uint32_t* a, int64_t lda, const uint32_t* b) {
  typename Dot::Vec w[V];
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) {
    w[v] = Dot::load(b + v * kWidth);
  }
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) {
    const typename Dot::Act x = Dot::broadcast(a + r, lda);
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) Dot::step(acc[r][first + v], x, w[v]);
  }
}

template <class Dot, int MR>
void tile(const uint32_t* a, int64_t lda, const uint32_t* b, int64_t kd, const TileOutput& o) {
  fetch_output<MR>(o);
  for (int64_t j = 0; j < kPanel; j += kWidth * kVectors) {
    typename Dot::Acc acc[MR][kVectors];
    start<Dot, MR>(acc, j, o);
    const uint32_t* ak = a;
    const uint32_t* bk = b + j;
    const char* ahead = o.ahead;
    for (int64_t k = 0; k < kd; ++k, ak += lda * Dot::kPlanes, bk += kPanel, ahead += o.ahead_step) {
      __builtin_prefetch(ahead, 0, 2);
      step<Dot, MR, kVectors, 0>(acc, ak, lda, bk);
    }
    finish<Dot, MR>(acc, j, o);
  }
}

}  // namespace
}  // namespace bertkern::cpu
