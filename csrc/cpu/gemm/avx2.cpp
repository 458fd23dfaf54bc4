// AVX2: 6 x 16 fp32 in two passes over a panel; int8 by vpmaddwd on 16-bit halves (exact, where vpmaddubsw saturates).
#include "cpu/gemm/tile.h"

namespace bertkern::cpu {
namespace {

struct Dot_f32 {
  using Acc = __m256;
  using Vec = __m256;
  using Act = __m256;
  static constexpr int kLanes = 8, kVectors = 2;
  static __attribute__((always_inline)) Acc init(const void* p, int64_t j) {
    return p ? _mm256_loadu_ps(static_cast<const float*>(p) + j) : _mm256_setzero_ps();
  }
  static __attribute__((always_inline)) Vec load(const uint32_t* b) {
    return _mm256_loadu_ps(reinterpret_cast<const float*>(b));
  }
  static __attribute__((always_inline)) Act broadcast(const uint32_t* a) {
    return _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(*a)));
  }
  static __attribute__((always_inline)) void step(Acc& acc, Act x, Vec w) { acc = _mm256_fmadd_ps(x, w, acc); }
  static __attribute__((always_inline)) void store(void* c, Acc acc) { _mm256_storeu_ps(static_cast<float*>(c), acc); }
};

struct Dot_bf16 : Dot_f32 {  // the low half of a dword is the earlier k
  struct Vec {
    __m256 low, high;
  };
  using Act = Vec;
  static __attribute__((always_inline)) Vec split(__m256i x) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(x, 16)),
            _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(static_cast<int>(0xffff0000u))))};
  }
  static __attribute__((always_inline)) Vec load(const uint32_t* b) {
    return split(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)));
  }
  static __attribute__((always_inline)) Act broadcast(const uint32_t* a) {
    return split(_mm256_set1_epi32(static_cast<int>(*a)));
  }
  static __attribute__((always_inline)) void step(Acc& acc, Act x, Vec w) {
    acc = _mm256_fmadd_ps(x.low, w.low, acc);
    acc = _mm256_fmadd_ps(x.high, w.high, acc);
  }
};

struct Dot_s8 {
  using Acc = __m256i;
  struct Vec {
    __m256i even, odd;
  };
  using Act = Vec;
  static constexpr int kLanes = 8, kVectors = 2;
  static __attribute__((always_inline)) Acc init(const void* p, int64_t j) {
    return p ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const int32_t*>(p) + j))
             : _mm256_setzero_si256();
  }
  static __attribute__((always_inline)) Vec load(const uint32_t* b) {
    const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b));
    return {_mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8), _mm256_srai_epi16(w, 8)};
  }
  static __attribute__((always_inline)) Act broadcast(const uint32_t* a) {
    const __m256i x = _mm256_set1_epi32(static_cast<int>(*a));
    return {_mm256_and_si256(x, _mm256_set1_epi16(0xff)), _mm256_srli_epi16(x, 8)};
  }
  static __attribute__((always_inline)) void step(Acc& acc, Act x, Vec w) {
    acc = _mm256_add_epi32(acc, _mm256_add_epi32(_mm256_madd_epi16(x.even, w.even), _mm256_madd_epi16(x.odd, w.odd)));
  }
  static __attribute__((always_inline)) void store(void* c, Acc acc) {
    _mm256_storeu_si256(static_cast<__m256i*>(c), acc);
  }
};

}  // namespace
}  // namespace bertkern::cpu

BERTKERN_DEFINE_TILES(f32, avx2, 6)
BERTKERN_DEFINE_TILES(bf16, avx2, 4)
BERTKERN_DEFINE_TILES(s8, avx2, 4)
