// AVX-512 VNNI: vpdpbusd, 14 x 32 int8 tile, 28 accumulators + 2 weight vectors + 1 broadcast in 32 registers.
#include "cpu/gemm/tile.h"

namespace bertkern::cpu {
namespace {

struct Dot_s8 {
  // Not __m512i: gcc 12 copies 64-bit-lane accumulators around _mm512_dpbusd_epi32 and spills them (half the speed).
  typedef int32_t Acc __attribute__((vector_size(64)));
  using Vec = Acc;
  using Act = Acc;
  static constexpr int kLanes = 16, kVectors = 2;
  static __attribute__((always_inline)) Acc init(const void* p, int64_t j) {
    return p ? (Acc)_mm512_loadu_si512(static_cast<const int32_t*>(p) + j) : Acc{};
  }
  static __attribute__((always_inline)) Vec load(const uint32_t* b) { return (Vec)_mm512_loadu_si512(b); }
  static __attribute__((always_inline)) Act broadcast(const uint32_t* a) {
    return (Act)_mm512_set1_epi32(static_cast<int>(*a));
  }
  static __attribute__((always_inline)) void step(Acc& acc, Act x, Vec w) {
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(x), "v"(w));
  }
  static __attribute__((always_inline)) void store(void* c, Acc acc) { _mm512_storeu_si512(c, (__m512i)acc); }
};

}  // namespace
}  // namespace bertkern::cpu

BERTKERN_DEFINE_TILES(s8, avx512vnni, 14)
