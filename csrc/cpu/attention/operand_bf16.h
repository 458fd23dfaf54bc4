// bf16 operands: two values in a dword, as vdpbf16ps and tdpbf16ps multiply them.
#pragma once

#include "cpu/attention/operand.h"
#include "cpu/gemm/dot_bf16.h"

namespace bertkern::cpu {
namespace {

// Values 0..15 and 16..31 of two vectors in pairs; the same of the two halves of one.
alignas(64) constexpr uint16_t kPairs[64] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                             8,  40, 9,  41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47,
                                             16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
                                             24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
alignas(64) constexpr uint16_t kHalves[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                              8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};

// The 32 values of a zmm that begin at value d, of which n are there.
BK_INLINE __m512i values(const void* row, Dtype dtype, int64_t d, int64_t n) {
  if (dtype == Dtype::bf16) {
    const uint16_t* at = static_cast<const uint16_t*>(row) + d;
    return n >= 32 ? _mm512_loadu_si512(at) : _mm512_maskz_loadu_epi16((1u << n) - 1u, at);
  }
  const vf low = load_values(row, dtype, d, n < 16 ? n : 16);
  const vf high = n > 16 ? load_values(row, dtype, d + 16, n < 32 ? n - 16 : 16) : vset(0.0f);
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

struct Score_bf16 {
  using Dot = Dot_dpbf16;
  static constexpr int64_t kPer = 2;
  BK_INLINE void pack_query(const void* row, Dtype dtype, int64_t count, uint32_t* out) {
    for (int64_t d = 0; d < count; d += 32) {
      const int64_t n = count - d < 32 ? count - d : 32;
      const __m512i x = values(row, dtype, d, n);
      if (n == 32)
        _mm512_storeu_si512(out + d / 2, x);
      else
        _mm512_mask_storeu_epi32(out + d / 2, first_lanes((n + 1) / 2), x);
    }
  }
  // Codes, which alone have scales, are Score_s8's.
  BK_INLINE void pack_key(const void* row, Dtype dtype, float, int64_t count, uint32_t* out) {
    pack_query(row, dtype, count, out);
  }
};

struct Value_bf16 {
  using Dot = Dot_dpbf16;
  static constexpr int64_t kPer = 2;
  static constexpr bool kScalesRows = false;  // codes are exact as they are
  static constexpr const float (&kPower)[4] = kPower3;
  BK_INLINE void pack_together(const void* const (&row)[2], Dtype dtype, const float (&)[2], int64_t count,
                               uint32_t* out) {
    const __m512i low = _mm512_load_si512(kPairs), high = _mm512_load_si512(kPairs + 32);
    for (int64_t d = 0; d < count; d += 32) {
      const int64_t n = count - d;
      const __m512i a = values(row[0], dtype, d, n);
      const __m512i b = row[1] ? values(row[1], dtype, d, n) : _mm512_setzero_si512();
      _mm512_storeu_si512(out + d, _mm512_permutex2var_epi16(a, low, b));
      if (n > 16) _mm512_storeu_si512(out + d + 16, _mm512_permutex2var_epi16(a, high, b));
    }
  }
  BK_INLINE void store(uint32_t* out, const vf (&x)[2]) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(x[1], x[0]);
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(_mm512_load_si512(kHalves), both));
  }
};

}  // namespace
}  // namespace bertkern::cpu
