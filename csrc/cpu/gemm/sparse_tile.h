// The bodies of sparse tile kernels: the dense one's steps, at the dwords of K that a panel lists.
#pragma once

#include "cpu/gemm/tile.h"

namespace bertkern::cpu {
namespace {

// ------------------------------------------------------------------------------------------ lanes are features
template <class Dot, int MR, int V, int first>
BK_INLINE void steps(typename Dot::Acc (&acc)[MR][kVectors], const uint32_t* a, int64_t lda, const uint32_t* index,
                     int64_t count, const uint32_t* b, int64_t width, const char*& ahead, int64_t ahead_step) {
  int64_t i = 0;
  if (V == 1 && sizeof(typename Dot::Act) == sizeof(vf) && ahead_step == 0) {
    // The loads are what counts, one a dot product: nothing is fetched, and two places are read at once.
    for (; i + 2 <= count; i += 2, b += 2 * width) {
      uint64_t two;
      __builtin_memcpy(&two, index + i, sizeof two);
      step<Dot, MR, V, first>(acc, a + static_cast<int64_t>(static_cast<uint32_t>(two)) * lda * Dot::kPlanes, lda, b);
      step<Dot, MR, V, first>(acc, a + static_cast<int64_t>(two >> 32) * lda * Dot::kPlanes, lda, b + width);
    }
  }
  for (; i < count; ++i, b += width, ahead += ahead_step) {
    __builtin_prefetch(ahead, 0, 2);
    step<Dot, MR, V, first>(acc, a + static_cast<int64_t>(index[i]) * lda * Dot::kPlanes, lda, b);
  }
}

template <class Dot, int MR>
void sparse_tile(const uint32_t* a, int64_t lda, const SparsePanel& b, const TileOutput& o) {
  fetch_output<MR>(o);
  const uint32_t* half_index[2] = {b.index + b.both, b.index + b.both + b.half[0]};
  const uint32_t* half_weights[2] = {b.weights + b.both * kPanel, b.weights + b.both * kPanel + b.half[0] * kHalfPanel};
  for (int64_t j = 0; j < kPanel; j += kWidth * kVectors) {
    typename Dot::Acc acc[MR][kVectors];
    start<Dot, MR>(acc, j, o);
    const char* ahead = o.ahead;
    steps<Dot, MR, kVectors, 0>(acc, a, lda, b.index, b.both, b.weights + j, kPanel, ahead, o.ahead_step);
    if (kWidth == kHalfPanel) {
      steps<Dot, MR, 1, 0>(acc, a, lda, half_index[0], b.half[0], half_weights[0], kHalfPanel, ahead, o.ahead_step);
      steps<Dot, MR, 1, 1>(acc, a, lda, half_index[1], b.half[1], half_weights[1], kHalfPanel, ahead, o.ahead_step);
    } else {
      const int64_t half = j / kHalfPanel;
      steps<Dot, MR, kVectors, 0>(acc, a, lda, half_index[half], b.half[half], half_weights[half] + j % kHalfPanel,
                                  kHalfPanel, ahead, o.ahead_step);
    }
    finish<Dot, MR>(acc, j, o);
  }
}

// ------------------------------------------------------------------------------------------------ lanes are rows
// Accumulators of R features x V vectors of rows, beside the weights of one step and, with several features, its rows.
constexpr int kTokenAccumulators = kWidth == 16 ? 16 : 8;

template <class Dot, int R, int V>
BK_INLINE void start_tokens(typename Dot::Acc (&acc)[R][V], const uint32_t* init, const uint32_t* sums, int64_t pitch) {
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    if (!init) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[r][v] = Dot::init(sums + r * pitch + v * kWidth);
      continue;
    }
    const uint32_t x = init[r];
    const uint32_t lanes[16] = {x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
    const typename Dot::Acc first = Dot::init(lanes);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[r][v] = first;
  }
}

template <class Dot, int R, int V>
BK_INLINE void store_tokens(const typename Dot::Acc (&acc)[R][V], uint32_t* sums, int64_t pitch) {
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) __builtin_memcpy(sums + r * pitch + v * kWidth, &acc[r][v], sizeof acc[r][v]);
  }
}

// One entry of a list: R features.
template <class Dot, int R, int V>
BK_INLINE void token_step(typename Dot::Acc (&acc)[R][V], const uint32_t* const (&a)[V], uint16_t index,
                          const uint32_t* weights) {
  const int64_t offset = static_cast<int64_t>(index) * (kTokens * Dot::kPlanes);
  // Rows wait in registers while the features pass; but where a row takes two of them, the fewer weights wait.
  if (R == 1 || (R < V && sizeof(typename Dot::Act) > sizeof(vf))) {
    typename Dot::Vec w[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) w[r] = Dot::splat(weights[r]);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const typename Dot::Act x = Dot::rows(a[v] + offset, kTokens);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) Dot::step(acc[r][v], x, w[r]);
    }
  } else {
    typename Dot::Act x[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) x[v] = Dot::rows(a[v] + offset, kTokens);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const typename Dot::Vec w = Dot::splat(weights[r]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) Dot::step(acc[r][v], x[v], w);
    }
  }
}

struct TokenList {
  const uint16_t* index;
  const uint32_t* weights;
  int64_t count;
};

#if defined(__AVX512F__)
// Four entries of one feature. Where an operand is one register, loads bound a step, of 64 bytes one a cycle, and a
// broadcast counts as one: so four weights and four indexes come with one load each.
template <int i, class Dot, int V>
BK_INLINE void token_step_of_four(typename Dot::Acc (&acc)[1][V], const uint32_t* const (&a)[V], uint64_t indexes,
                                  vi weights) {
  const int64_t offset = static_cast<int64_t>(indexes >> 16 * i & 0xffffu) * (kTokens * Dot::kPlanes);
  const typename Dot::Vec w = Dot::weights(vspread_of_four<i>(weights));
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) Dot::step(acc[0][v], Dot::rows(a[v] + offset, kTokens), w);
}

template <class Dot, int V>
BK_INLINE int64_t token_fours(typename Dot::Acc (&acc)[1][V], const uint32_t* const (&a)[V], const TokenList& list) {
  int64_t i = 0;
  for (; i + 4 <= list.count; i += 4) {
    uint64_t indexes;
    __builtin_memcpy(&indexes, list.index + i, sizeof indexes);
    const vi weights = vload_four(list.weights + i);
    token_step_of_four<0, Dot>(acc, a, indexes, weights);
    token_step_of_four<1, Dot>(acc, a, indexes, weights);
    token_step_of_four<2, Dot>(acc, a, indexes, weights);
    token_step_of_four<3, Dot>(acc, a, indexes, weights);
  }
  return i;
}
#endif

// All features of a panel for V vectors of rows from vector v0 on.
template <class Dot, int R, int V>
void token_panel(const uint32_t* a, int64_t group_dwords, int64_t v0, const TokenPanel& b, const uint32_t* init,
                 uint32_t* sums, int64_t pitch) {
  constexpr int kVectorsOfGroup = kTokens / kWidth;
  const uint32_t* rows[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v)
    rows[v] = a + (v0 + v) / kVectorsOfGroup * group_dwords + (v0 + v) % kVectorsOfGroup * kWidth;
  const auto list = [&](int64_t n) {
    const uint32_t* const begin = b.begin + n / R;
    return TokenList{b.index + begin[0], b.weights + int64_t{begin[0]} * R, int64_t{begin[1]} - begin[0]};
  };
  constexpr bool kFours = kWidth == 16 && R == 1 && V >= 4 && sizeof(typename Dot::Act) == sizeof(vf);
  // Two lists at a time where one alone has too few sums under way to hide the latency of a step.
  constexpr int kLists = kWidth == 16 && R * V <= 4 && !kFours ? 2 : 1;
  for (int64_t n = 0; n < kPanel; n += R * kLists) {
    const TokenList x = list(n), y = list(kLists == 2 ? n + R : n);
    typename Dot::Acc xs[R][V], ys[R][V];
    uint32_t *const x_sums = sums + n * pitch + v0 * kWidth, *const y_sums = x_sums + R * pitch;
    start_tokens<Dot, R, V>(xs, init ? init + n : nullptr, x_sums, pitch);
    int64_t i = 0;
    if (kLists == 2) {
      start_tokens<Dot, R, V>(ys, init ? init + n + R : nullptr, y_sums, pitch);
      const int64_t both = x.count < y.count ? x.count : y.count;
      for (; i < both; ++i) {
        token_step<Dot, R, V>(xs, rows, x.index[i], x.weights + i * R);
        token_step<Dot, R, V>(ys, rows, y.index[i], y.weights + i * R);
      }
      for (int64_t j = i; j < y.count; ++j) token_step<Dot, R, V>(ys, rows, y.index[j], y.weights + j * R);
      store_tokens<Dot, R, V>(ys, y_sums, pitch);
    }
#if defined(__AVX512F__)
    if constexpr (kFours) i = token_fours<Dot, V>(xs, rows, x);
#endif
    for (; i < x.count; ++i) token_step<Dot, R, V>(xs, rows, x.index[i], x.weights + i * R);
    store_tokens<Dot, R, V>(xs, x_sums, pitch);
  }
}

template <class Dot, int R>
void tokens(const uint32_t* a, int64_t group_dwords, int64_t groups, const TokenPanel& b, const void* init,
            uint32_t* sums, int64_t pitch) {
  constexpr int kMost = kTokenAccumulators / R > 8 ? 8 : kTokenAccumulators / R;
  const int64_t vectors = groups * (kTokens / kWidth);
  const uint32_t* first = static_cast<const uint32_t*>(init);
  int64_t v = 0;
  const auto pass = [&](auto run, int64_t count) __attribute__((always_inline)) {
    for (; v + count <= vectors; v += count) run(a, group_dwords, v, b, first, sums, pitch);
  };
  pass(&token_panel<Dot, R, kMost>, kMost);
  // What is left is fewer: one pass of just that many.
  if (kMost > 4) {
    if (vectors - v == 7) pass(&token_panel < Dot, R, kMost >= 7 ? 7 : 1 >, 7);
    if (vectors - v == 6) pass(&token_panel < Dot, R, kMost >= 6 ? 6 : 1 >, 6);
    if (vectors - v == 5) pass(&token_panel < Dot, R, kMost >= 5 ? 5 : 1 >, 5);
  }
  if (vectors - v == 4) pass(&token_panel < Dot, R, kMost >= 4 ? 4 : 1 >, 4);
  if (vectors - v == 3) pass(&token_panel < Dot, R, kMost >= 3 ? 3 : 1 >, 3);
  if (vectors - v == 2) pass(&token_panel < Dot, R, kMost >= 2 ? 2 : 1 >, 2);
  pass(&token_panel<Dot, R, 1>, 1);
}

// To rows of Y: the same products and rounding as in the dense tile.
template <class Dot>
void finish_tokens(const uint32_t* sums, int64_t pitch, int64_t rows, const TileOutput& o) {
  for (int64_t n = 0; n < kPanel; n += kWidth) {
    for (int64_t t = 0; t < rows; t += kWidth) {
      const int64_t count = rows - t < kWidth ? rows - t : kWidth;
      const vf row_scale = Dot::kInteger ? vload_n(o.row_scale + t, count) : vset(0.0f);
      vf y[kWidth];
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) {
        typename Dot::Acc sum = Dot::init(sums + (n + i) * pitch + t);
        if constexpr (Dot::kInteger) {
          if (o.row_zero)
            sum = Dot::add(sum, Dot::times(Dot::init(o.row_zero + t), -static_cast<const int32_t*>(o.init)[n + i]));
        }
        y[i] = Dot::value(sum);
        if (Dot::kInteger) y[i] = vadd(vmul(y[i], vmul(row_scale, vset(o.weight_scale[n + i]))), vset(o.bias[n + i]));
      }
      transpose_lanes(y);
      float* out = static_cast<float*>(o.out) + t * o.pitch + n;
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) {
        if (i < count) vstore(out + i * o.pitch, y[i]);
      }
    }
  }
}

}  // namespace
}  // namespace bertkern::cpu
