// The score half of an operand of codes: vpdpbusd multiplies signed bytes of q by unsigned ones of k, which are
// therefore stored with 128 added; 128 times the sum of q is taken off before the first product.
#pragma once

#include "cpu/attention/attention.h"
#include "cpu/gemm/dot_vnni.h"

namespace bertkern::cpu {
namespace {

struct Score_s8 {
  using Dot = Dot_vnni;
  static constexpr int64_t kPer = 4;
  BK_INLINE void pack_query(const void* row, Dtype, int64_t count, uint32_t* out) { copy(row, count, 0, out); }
  BK_INLINE void pack_key(const void* row, Dtype, float, int64_t count, uint32_t* out) {
    copy(row, count, static_cast<char>(0x80), out);
  }
  BK_INLINE void starts(const uint32_t* q, int64_t steps, int64_t lanes, int32_t* out) {
    const Dot::Act all = (Dot::Act)_mm512_set1_epi8(static_cast<char>(0x80));
    for (int64_t i = 0; i < lanes; i += kWidth) {
      Dot::Acc sum{};
      for (int64_t d = 0; d < steps; ++d) Dot::step(sum, all, Dot::load(q + d * kQueries + i));
      _mm512_store_si512(out + i, (__m512i)(-sum));
    }
  }

 private:
  BK_INLINE void copy(const void* row, int64_t count, char flip, uint32_t* out) {
    const __m512i mask = _mm512_set1_epi8(flip);
    const char* from = static_cast<const char*>(row);
    for (int64_t d = 0; d < count; d += 64) {
      const int64_t n = count - d < 64 ? count - d : 64;
      const __m512i x = _mm512_maskz_loadu_epi8(~uint64_t{0} >> (64 - n), from + d);
      _mm512_mask_storeu_epi32(out + d / 4, first_lanes((n + 3) / 4), _mm512_xor_si512(x, mask));
    }
  }
};

}  // namespace
}  // namespace bertkern::cpu
