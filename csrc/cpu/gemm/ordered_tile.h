// The body of a tile kernel whose weights list the dwords of K by what 16 bits can hold (gemm.h). The fewer features
// share a list, the fewer dwords one of them spoils: where a vector holds twice as many, its lanes are two rows of
// each.
#pragma once

#include "cpu/gemm/tile.h"

namespace bertkern::cpu {
namespace {

// As many rows as 16 registers hold beside two steps' weights; with 32 the widest tile.
constexpr int kOrderedRows = kWidth == 8 ? 8 : 12;

// The steps of one list, in order. kFetch: whether `o.ahead` is fetched meanwhile.
template <bool kFetch, class Four, class Pair, class Wide>
BK_INLINE void each_step(const OrderedList& list, const TileOutput& o, Four&& four, Pair&& pair, Wide&& wide) {
  const uint16_t *at = list.index, *const fours = at + list.fours, *const end = at + list.count,
                 *const pairs = end - list.wide;
  const uint32_t* w = list.weights;
  const int64_t one = list.step;
  const char* ahead = o.ahead;
  const auto fetch = [&](int64_t entries) __attribute__((always_inline)) {
    if (!kFetch) return;
    __builtin_prefetch(ahead, 0, 2);
    ahead += entries * o.ahead_step;
  };
  for (; at < fours; at += 2, w += 2 * one) {
    fetch(2);
    four(at[0], w, at[1], w + one);
  }
  for (; at < pairs; ++at, w += one) {
    fetch(1);
    pair(at[0], w);
  }
  for (; at < end; ++at, w += one) wide(at[0], w);
}

// A list of kWidth features. kPitch: of X, rows of a group.
template <class Dot, int MR, int kPitch, bool kFetch>
BK_INLINE void ordered_pass(int64_t pass, const uint32_t* a, const OrderedList& list, const TileOutput& o) {
  const auto load = [](const uint32_t* w) { return vloadi(reinterpret_cast<const int32_t*>(w)); };
  const auto x = [a](uint16_t dword, int r) { return vseti(static_cast<int32_t>(a[dword * kPitch + r])); };
  typename Dot::Acc acc[MR][1];
  start<Dot, MR>(acc, pass * kWidth, o);
  each_step<kFetch>(
      list, o,
      [&](uint16_t d, const uint32_t* w, uint16_t d2, const uint32_t* w2) __attribute__((always_inline)) {
        const vi first = load(w), second = load(w2);
#pragma GCC unroll 16
        for (int r = 0; r < MR; ++r) Dot::step_four(acc[r][0], x(d, r), first, x(d2, r), second);
      },
      [&](uint16_t d, const uint32_t* w) __attribute__((always_inline)) {
        const vi weights = load(w);
#pragma GCC unroll 16
        for (int r = 0; r < MR; ++r) Dot::step_pair(acc[r][0], x(d, r), weights);
      },
      [&](uint16_t d, const uint32_t* w) __attribute__((always_inline)) {
        const typename Dot::Vec weights = Dot::load(w);
#pragma GCC unroll 16
        for (int r = 0; r < MR; ++r) Dot::step_wide(acc[r][0], x(d, r), weights);
      });
  finish<Dot, MR>(acc, pass * kWidth, o);
}

// A list of kWidth / 2 features: lanes are a feature of two rows, then the next feature of both.
template <class Dot, int kPairs, int kPitch, bool kFetch>
BK_INLINE void paired_sums(vi (&sums)[kPairs], const uint32_t* a, const OrderedList& list, const TileOutput& o) {
  const auto x = [a](uint16_t dword, int r) { return vload_two(a + dword * kPitch + 2 * r); };
#pragma GCC unroll 16
  for (int r = 0; r < kPairs; ++r) sums[r] = vseti(0);
  each_step<kFetch>(
      list, o,
      [&](uint16_t d, const uint32_t* w, uint16_t d2, const uint32_t* w2) __attribute__((always_inline)) {
        const vi first = vload_twice(w), second = vload_twice(w2);
#pragma GCC unroll 16
        for (int r = 0; r < kPairs; ++r) Dot::step_four(sums[r], x(d, r), first, x(d2, r), second);
      },
      [&](uint16_t d, const uint32_t* w) __attribute__((always_inline)) {
        const vi weights = vload_twice(w);
#pragma GCC unroll 16
        for (int r = 0; r < kPairs; ++r) Dot::step_pair(sums[r], x(d, r), weights);
      },
      [&](uint16_t d, const uint32_t* w) __attribute__((always_inline)) {
        const typename Dot::Vec weights = Dot::weights(vload_twice(w));
#pragma GCC unroll 16
        for (int r = 0; r < kPairs; ++r) Dot::step_wide(sums[r], x(d, r), weights);
      });
}

template <class Dot, int MR, int kPitch, bool kFetch>
BK_INLINE void paired_pass(int64_t pass, const uint32_t* a, const OrderedList* lists, const TileOutput& o) {
  constexpr int kPairs = (MR + 1) / 2;
  vi low[kPairs], high[kPairs];
  paired_sums<Dot, kPairs, kPitch, kFetch>(low, a, lists[0], o);
  paired_sums<Dot, kPairs, kPitch, false>(high, a, lists[1], o);
  typename Dot::Acc acc[MR][1];
  start<Dot, MR>(acc, pass * kWidth, o);
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) {
    const vi row = r % 2 ? vodd_lanes(low[r / 2], high[r / 2]) : veven_lanes(low[r / 2], high[r / 2]);
    acc[r][0] = Dot::add(acc[r][0], row);
  }
  finish<Dot, MR>(acc, pass * kWidth, o);
}

template <class Dot, int MR, int kPitch>
BK_INLINE void ordered_passes(const uint32_t* a, const PanelOrder& order, const TileOutput& o) {
  // A prefetch a step costs a tenth of the time: the first list does for all.
  if constexpr (kWidth == 2 * kListed) {
    if (order.features == kListed) {
      paired_pass<Dot, MR, kPitch, true>(0, a, order.list, o);
      for (int64_t pass = 1; pass < kPanel / kWidth; ++pass)
        paired_pass<Dot, MR, kPitch, false>(pass, a, order.list + 2 * pass, o);
      return;
    }
  }
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
