// The body of a dense tile kernel whose weights list the dwords of K by what 16 bits can hold (gemm.h). One vector of
// features shares a list: the fewer there are, the fewer dwords one of them spoils.
#pragma once

#include "cpu/gemm/tile.h"

namespace bertkern::cpu {
namespace {

// As many rows as 16 registers hold beside two steps' weights; with 32 the widest tile.
constexpr int kOrderedRows = kWidth == 8 ? 8 : 12;

template <class Dot, int MR>
BK_INLINE void pair_step(typename Dot::Acc (&acc)[MR][1], const uint32_t* x, vi w) {
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) Dot::step_pair(acc[r][0], vseti(static_cast<int32_t>(x[r])), w);
}

template <class Dot, int MR>
BK_INLINE void four_step(typename Dot::Acc (&acc)[MR][1], const uint32_t* x, const uint32_t* x2, vi w, vi w2) {
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
    Dot::step_four(acc[r][0], vseti(static_cast<int32_t>(x[r])), w, vseti(static_cast<int32_t>(x2[r])), w2);
}

template <class Dot, int MR>
BK_INLINE void wide_step(typename Dot::Acc (&acc)[MR][1], const uint32_t* x, const typename Dot::Vec& w) {
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) Dot::step_wide(acc[r][0], vseti(static_cast<int32_t>(x[r])), w);
}

// One list. kPitch: of X, rows of a group. kFetch: whether `o.ahead` is fetched meanwhile.
template <class Dot, int MR, int kPitch, bool kFetch>
BK_INLINE void ordered_pass(int64_t pass, const uint32_t* a, const OrderedList& list, const TileOutput& o) {
  const uint16_t *at = list.index, *const pairs = at + list.fours, *const end = at + list.count,
                 *const wide = end - list.wide;
  const uint32_t* w = list.weights;
  const int64_t one = list.step;
  const char* ahead = o.ahead;
  const auto fetch = [&](int64_t entries) {
    if (!kFetch) return;
    __builtin_prefetch(ahead, 0, 2);
    ahead += entries * o.ahead_step;
  };
  const auto load = [](const uint32_t* from) { return vloadi(reinterpret_cast<const int32_t*>(from)); };
  typename Dot::Acc acc[MR][1];
  start<Dot, MR>(acc, pass * kWidth, o);
  for (; at < pairs; at += 2, w += 2 * one) {
    fetch(2);
    four_step<Dot, MR>(acc, a + at[0] * kPitch, a + at[1] * kPitch, load(w), load(w + one));
  }
  for (; at < wide; ++at, w += one) {
    fetch(1);
    pair_step<Dot, MR>(acc, a + at[0] * kPitch, load(w));
  }
  for (; at < end; ++at, w += one) wide_step<Dot, MR>(acc, a + at[0] * kPitch, Dot::load(w));
  finish<Dot, MR>(acc, pass * kWidth, o);
}

template <class Dot, int MR, int kPitch>
BK_INLINE void ordered_passes(const uint32_t* a, const PanelOrder& order, const TileOutput& o) {
  // A prefetch a step costs a tenth of the time: the first list does for all.
  ordered_pass<Dot, MR, kPitch, true>(0, a, order.list[0], o);
  for (int64_t pass = 1; pass < kPanel / kWidth; ++pass)
    ordered_pass<Dot, MR, kPitch, false>(pass, a, order.list[pass], o);
}

template <class Dot, int MR>
void ordered_tile(const uint32_t* a, int64_t lda, const PanelOrder& order, const TileOutput& o) {
  fetch_output<MR>(o);
  if (MR == 1 && lda == 1)
    ordered_passes<Dot, MR, 1>(a, order, o);
  else
    ordered_passes<Dot, MR, kWidth>(a, order, o);
}

}  // namespace
}  // namespace bertkern::cpu
