// Weights of few bits: planes to codes, codes to floats, and the tile whose sums change scale along K.
#pragma once

#include "cpu/gemm/tile.h"

namespace bertkern::cpu {
namespace {

constexpr int64_t kBlockVectors = kBlockDwords * kPanel / 16;  // of 16 dwords

// Bits [from, from + width) of every byte, at bit `to`.
template <int kWidthBits>
BK_INLINE vi take(vi x, int from, int to) {
  const int mask = ((1 << kWidthBits) - 1) << to;
  const vi moved = from > to ? vshift_right(x, from - to) : to > from ? vshift_left(x, to - from) : x;
  return vandi(moved, vseti(static_cast<int32_t>(static_cast<uint32_t>(mask) * 0x01010101u)));
}

// The codes of vector v, kWidth dwords of it from `lane` on.
template <int kBits>
BK_INLINE vi codes_of(const uint32_t* in, int v, int lane) {
  constexpr bool kFour = kBits >= 4, kTwo = kBits == 2 || kBits == 3 || kBits >= 6, kOne = kBits % 2 == 1;
  const auto at = [&](int vector) __attribute__((always_inline)) {
    return vloadi(reinterpret_cast<const int32_t*>(in) + vector * 16 + lane);
  };
  vi code = vseti(0);
  int base = 0, low = 0;
  if (kFour) code = take<4>(at(v % 8), 4 * (v / 8), 0), base = 8, low = 4;
  if (kTwo) {
    const vi part = take<2>(at(base + v % 4), 2 * (v / 4), low);
    code = kFour ? vori(code, part) : part;
    base += 4, low += 2;
  }
  if (kOne) code = vori(code, take<1>(at(base + v % 2), v / 2, low));
  return code;
}

template <int kBits>
void decode_blocks(const uint32_t* planes, int64_t blocks, uint32_t* codes) {
  const vi middle = vseti(static_cast<int32_t>((1u << (kBits - 1)) * 0x01010101u));
  for (int64_t b = 0; b < blocks; ++b, planes += kBits * 32, codes += kBlockDwords * kPanel) {
#pragma GCC unroll 4
    for (int lane = 0; lane < 16; lane += kWidth) {
#pragma GCC unroll 16
      for (int v = 0; v < kBlockVectors; ++v) {
        const vi code = kBits == 8 ? vloadi(reinterpret_cast<const int32_t*>(planes) + v * 16 + lane)
                                   : codes_of<kBits == 8 ? 4 : kBits>(planes, v, lane);
        vstorei(reinterpret_cast<int32_t*>(codes) + v * 16 + lane, vsub8(code, middle));
      }
    }
  }
}

inline void decode(int bits, const uint32_t* planes, int64_t blocks, uint32_t* codes) {
  switch (bits) {
    case 2:
      return decode_blocks<2>(planes, blocks, codes);
    case 3:
      return decode_blocks<3>(planes, blocks, codes);
    case 4:
      return decode_blocks<4>(planes, blocks, codes);
    case 5:
      return decode_blocks<5>(planes, blocks, codes);
    case 6:
      return decode_blocks<6>(planes, blocks, codes);
    case 7:
      return decode_blocks<7>(planes, blocks, codes);
    default:
      return decode_blocks<8>(planes, blocks, codes);
  }
}

inline void dequantize(const uint32_t* codes, int64_t length, const float* scale, const float* zero, float* values) {
  for (int64_t n = 0; n < kPanel; n += kWidth) {
    const vf s = vload(scale + n), z = vload(zero + n);
    for (int64_t i = 0; i < length; ++i) {
      const vi x = vloadi(reinterpret_cast<const int32_t*>(codes) + i / 4 * kPanel + n);
      const int up = 24 - 8 * static_cast<int>(i % 4);
      const vf c = to_float(vshift_right_signed(vshift_left(x, up), 24));
      vstore(values + i * kPanel + n, vmul(vsub(c, z), s));
    }
  }
}

// int32 and fp32 sums of kVectors vectors side by side, the weights and one activation.
constexpr int kGroupTileRows = kWidth == 16 ? kGroupRows : 2;

template <int MR, bool kResidual, bool kBf16, int kStride>
BK_INLINE void store_scaled(const vf (&sum)[MR][kVectors], int64_t j, const TileOutput& o) {
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    const int64_t n = j + v * kStride;
    const vf bias = vload(o.bias + n);
#pragma GCC unroll 6
    for (int r = 0; r < MR; ++r) put<kResidual, kBf16>(vadd(vmul(sum[r][v], vset(o.row_scale[r])), bias), r, n, o);
  }
}

template <int MR, int kStride>
BK_INLINE void finish_scaled(const vf (&sum)[MR][kVectors], int64_t j, const TileOutput& o) {
  if (o.bf16)
    o.residual ? store_scaled<MR, true, true, kStride>(sum, j, o) : store_scaled<MR, false, true, kStride>(sum, j, o);
  else
    o.residual ? store_scaled<MR, true, false, kStride>(sum, j, o) : store_scaled<MR, false, false, kStride>(sum, j, o);
}

// sum += S * scale + R * zero, of group i.
template <class Dot, int MR, int kStride>
BK_INLINE void add_group(vf (&sum)[MR][kVectors], typename Dot::Acc (&acc)[MR][kVectors], const GroupPanel& g,
                         int64_t i, int64_t j) {
  const float* row_sum = g.row_sum + i * g.row_sum_pitch;
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    const int64_t at = i * kPanel + j + v * kStride;
    const vf scale = vload(g.scale + at), zero = vload(g.zero + at);
#pragma GCC unroll 6
    for (int r = 0; r < MR; ++r)
      sum[r][v] = vfma(vset(row_sum[r]), zero, vfma(Dot::value(acc[r][v]), scale, sum[r][v]));
  }
}

template <int MR, int kStride>
BK_INLINE void start_scaled(vf (&sum)[MR][kVectors], int64_t j, const TileOutput& o) {
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    const vf first = vload(static_cast<const float*>(o.init) + j + v * kStride);
#pragma GCC unroll 6
    for (int r = 0; r < MR; ++r) sum[r][v] = o.row_zero ? vmul(first, vset(-static_cast<float>(o.row_zero[r]))) : first;
  }
}

template <class Dot, int MR>
void group_tile(const uint32_t* a, int64_t lda, const uint32_t* b, const GroupPanel& g, const TileOutput& o) {
  fetch_output<MR>(o);
  for (int64_t j = 0; j < kPanel; j += kWidth * kVectors) {
    vf sum[MR][kVectors];
    start_scaled<MR, kWidth>(sum, j, o);
    const char* ahead = o.ahead;
    for (int64_t i = 0; i < g.count; ++i) {
      const Group& group = g.groups[i];
      typename Dot::Acc acc[MR][kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 6
        for (int r = 0; r < MR; ++r) acc[r][v] = typename Dot::Acc{};
      }
      const uint32_t* ak = a + static_cast<int64_t>(group.first) * lda * Dot::kPlanes;
      const uint32_t* bk = b + static_cast<int64_t>(group.first) * kPanel + j;
      for (uint32_t k = 0; k < group.count; ++k, ak += lda * Dot::kPlanes, bk += kPanel, ahead += o.ahead_step) {
        __builtin_prefetch(ahead, 0, 2);
        step<Dot, MR, kVectors, 0>(acc, ak, lda, bk);
      }
      add_group<Dot, MR, kWidth>(sum, acc, g, i, j);
    }
    finish_scaled<MR, kWidth>(sum, j, o);
  }
}

// ------------------------------------------------------------------------------------- straight from the planes
// Vector v of a tile holds half v of the panel; two sets of sums where one would wait for itself.
constexpr int kHalf = static_cast<int>(kHalfPanel);

template <class Dot, int kBits, int MR, int kSets>
BK_INLINE void narrow_block(typename Dot::Acc (&acc)[kSets][MR][kVectors], const uint32_t* a, int64_t lda,
                            const uint32_t* planes, int lane, int64_t steps) {
#pragma GCC unroll 8
  for (int s = 0; s < kBlockDwords; ++s) {
    if (s >= steps) break;
    typename Dot::Vec w[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) w[v] = Dot::weights(codes_of<kBits>(planes, 2 * s + v, lane));
#pragma GCC unroll 4
    for (int r = 0; r < MR; ++r) {
      const typename Dot::Act x = Dot::broadcast(a + s * lda * Dot::kPlanes + r, lda);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) Dot::step(acc[s % kSets][r][v], x, w[v]);
    }
  }
}

template <class Dot, int MR, int kSets>
BK_INLINE void one_set(typename Dot::Acc (&acc)[kSets][MR][kVectors]) {
  if (kSets == 1) return;
#pragma GCC unroll 4
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) acc[0][r][v] = Dot::add(acc[0][r][v], acc[kSets - 1][r][v]);
  }
}

// Few bits are soon through a page, where the processor's own fetching ends: so from 2 KiB ahead. Measured: groups
// along K gain a sixth (family 26); of groups along N long panels of few bits gain an eighth, others lose as much
// (family 25).
constexpr int64_t kLongPanel = 512;  // dwords of K
constexpr int64_t kPlanesAhead = 512;
template <int kBits>
BK_INLINE void fetch_planes(const uint32_t* planes) {
#pragma GCC unroll 8
  for (int line = 0; line < 2 * kBits; ++line) __builtin_prefetch(planes + kPlanesAhead + line * 16);
}

template <class Dot, int kBits, int MR>
void narrow_tile(const uint32_t* a, int64_t lda, const uint32_t* planes, int64_t dwords, const int32_t* shift,
                 const TileOutput& o) {
  constexpr int kSets = MR <= 2 ? 2 : 1;
  for (int lane = 0; lane < kHalf; lane += kWidth) {
    typename Dot::Acc acc[kSets][MR][kVectors];
#pragma GCC unroll 4
    for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        const typename Dot::Acc first = Dot::init(static_cast<const int32_t*>(o.init) + lane + v * kHalf);
        acc[0][r][v] = Dot::add(o.row_zero ? Dot::times(first, -o.row_zero[r]) : first, Dot::spread(shift[r]));
        if (kSets == 2) acc[kSets - 1][r][v] = typename Dot::Acc{};
      }
    }
    const uint32_t* ak = a;
    const uint32_t* bk = planes;
    int64_t left = dwords;
    for (; left >= kBlockDwords; left -= kBlockDwords, ak += kBlockDwords * lda * Dot::kPlanes, bk += kBits * kPanel) {
      if (kBits <= 3 && dwords >= kLongPanel) fetch_planes<kBits>(bk);
      narrow_block<Dot, kBits, MR, kSets>(acc, ak, lda, bk, lane, kBlockDwords);
    }
    if (left) narrow_block<Dot, kBits, MR, kSets>(acc, ak, lda, bk, lane, left);
    one_set<Dot, MR, kSets>(acc);
    finish<Dot, MR, kHalf>(acc[0], lane, o);
  }
}

template <class Dot, int kBits, int MR>
void narrow_group_tile(const uint32_t* a, int64_t lda, const uint32_t* planes, const GroupPanel& g,
                       const int32_t* shift, const TileOutput& o) {
  constexpr int kSets = MR <= 2 ? 2 : 1;
  for (int lane = 0; lane < kHalf; lane += kWidth) {
    vf sum[MR][kVectors];
    start_scaled<MR, kHalf>(sum, lane, o);
    const uint32_t* ak = a;
    const uint32_t* bk = planes;
    for (int64_t i = 0; i < g.count; ++i) {
      typename Dot::Acc acc[kSets][MR][kVectors];
#pragma GCC unroll 4
      for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
          acc[0][r][v] = Dot::spread(shift[i * g.row_sum_pitch + r]);
          if (kSets == 2) acc[kSets - 1][r][v] = typename Dot::Acc{};
        }
      }
      for (int64_t left = g.groups[i].count; left > 0; left -= kBlockDwords) {
        if (left >= kBlockDwords)
          narrow_block<Dot, kBits, MR, kSets>(acc, ak, lda, bk, lane, kBlockDwords);
        else
          narrow_block<Dot, kBits, MR, kSets>(acc, ak, lda, bk, lane, left);
        ak += kBlockDwords * lda * Dot::kPlanes, bk += kBits * kPanel;
        fetch_planes<kBits>(bk);
      }
      one_set<Dot, MR, kSets>(acc);
      add_group<Dot, MR, kHalf>(sum, acc[0], g, i, lane);
    }
    finish_scaled<MR, kHalf>(sum, lane, o);
  }
}

}  // namespace
}  // namespace bertkern::cpu
