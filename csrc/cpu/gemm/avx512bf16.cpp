// AVX-512 BF16: vdpbf16ps, two products a lane and step. The instruction flushes denormals and rounds to nearest even
// whatever MXCSR says.
#include "cpu/gemm/tile.h"

namespace bertkern::cpu {
namespace {

struct Dot_bf16 {
  using Acc = __m512;
  using Vec = __m512i;
  using Act = __m512i;
  static constexpr int kLanes = 16, kVectors = 2;
  static __attribute__((always_inline)) Acc init(const void* p, int64_t j) {
    return p ? _mm512_loadu_ps(static_cast<const float*>(p) + j) : _mm512_setzero_ps();
  }
  static __attribute__((always_inline)) Vec load(const uint32_t* b) { return _mm512_loadu_si512(b); }
  static __attribute__((always_inline)) Act broadcast(const uint32_t* a) {
    return _mm512_set1_epi32(static_cast<int>(*a));
  }
  static __attribute__((always_inline)) void step(Acc& acc, Act x, Vec w) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(x), "v"(w));
  }
  static __attribute__((always_inline)) void store(void* c, Acc acc) { _mm512_storeu_ps(c, acc); }
};

}  // namespace
}  // namespace bertkern::cpu

BERTKERN_DEFINE_TILES(bf16, avx512bf16, 14)
