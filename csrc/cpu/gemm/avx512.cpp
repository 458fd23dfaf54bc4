// AVX-512 without VNNI: 14 x 32 fp32; int8 by vpmaddwd on 16-bit halves (exact: no saturation anywhere).
#include "cpu/gemm/tile.h"

namespace bertkern::cpu {
namespace {

struct Dot_f32 {
  using Acc = __m512;
  using Vec = __m512;
  using Act = __m512;
  static constexpr int kLanes = 16, kVectors = 2;
  static __attribute__((always_inline)) Acc init(const void* p, int64_t j) {
    return p ? _mm512_loadu_ps(static_cast<const float*>(p) + j) : _mm512_setzero_ps();
  }
  static __attribute__((always_inline)) Vec load(const uint32_t* b) { return _mm512_loadu_ps(b); }
  static __attribute__((always_inline)) Act broadcast(const uint32_t* a) {
    return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(*a)));
  }
  static __attribute__((always_inline)) void step(Acc& acc, Act x, Vec w) { acc = _mm512_fmadd_ps(x, w, acc); }
  static __attribute__((always_inline)) void store(void* c, Acc acc) { _mm512_storeu_ps(c, acc); }
};

struct Dot_bf16 : Dot_f32 {  // the low half of a dword is the earlier k
  struct Vec {
    __m512 low, high;
  };
  using Act = Vec;
  static __attribute__((always_inline)) Vec split(__m512i x) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
  }
  static __attribute__((always_inline)) Vec load(const uint32_t* b) { return split(_mm512_loadu_si512(b)); }
  static __attribute__((always_inline)) Act broadcast(const uint32_t* a) {
    return split(_mm512_set1_epi32(static_cast<int>(*a)));
  }
  static __attribute__((always_inline)) void step(Acc& acc, Act x, Vec w) {
    acc = _mm512_fmadd_ps(x.low, w.low, acc);
    acc = _mm512_fmadd_ps(x.high, w.high, acc);
  }
};

struct Dot_s8 {
  using Acc = __m512i;
  struct Vec {
    __m512i even, odd;
  };
  using Act = Vec;
  static constexpr int kLanes = 16, kVectors = 2;
  static __attribute__((always_inline)) Acc init(const void* p, int64_t j) {
    return p ? _mm512_loadu_si512(static_cast<const int32_t*>(p) + j) : _mm512_setzero_si512();
  }
  static __attribute__((always_inline)) Vec load(const uint32_t* b) {
    const __m512i w = _mm512_loadu_si512(b);
    return {_mm512_srai_epi16(_mm512_slli_epi16(w, 8), 8), _mm512_srai_epi16(w, 8)};
  }
  static __attribute__((always_inline)) Act broadcast(const uint32_t* a) {
    const __m512i x = _mm512_set1_epi32(static_cast<int>(*a));
    return {_mm512_and_si512(x, _mm512_set1_epi16(0xff)), _mm512_srli_epi16(x, 8)};
  }
  static __attribute__((always_inline)) void step(Acc& acc, Act x, Vec w) {
    acc = _mm512_add_epi32(acc, _mm512_add_epi32(_mm512_madd_epi16(x.even, w.even), _mm512_madd_epi16(x.odd, w.odd)));
  }
  static __attribute__((always_inline)) void store(void* c, Acc acc) { _mm512_storeu_si512(c, acc); }
};

}  // namespace
}  // namespace bertkern::cpu

BERTKERN_DEFINE_TILES(f32, avx512, 14)
BERTKERN_DEFINE_TILES(bf16, avx512, 12)
BERTKERN_DEFINE_TILES(s8, avx512, 12)
