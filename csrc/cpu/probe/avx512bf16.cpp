#include <immintrin.h>

#include "cpu/probe/chains.h"
#include "cpu/probe/probe.h"

namespace bertkern::cpu::probe::avx512bf16 {
namespace {

void run_bf16(std::int64_t iterations) {
  const __m512i x = _mm512_set1_epi16(0x3f00);  // 0.5
  BERTKERN_CHAINS(__m512);
  for (std::int64_t n = 0; n < iterations; ++n) {
#define UPDATE(a) __asm__ volatile("vdpbf16ps %1, %1, %0" : "+v"(a) : "v"(x));
    BERTKERN_ROUND(UPDATE)
#undef UPDATE
  }
}

}  // namespace

Probes probes() { return {{}, {run_bf16, 32 * BERTKERN_CHAIN_COUNT}, {}, nullptr}; }

}  // namespace bertkern::cpu::probe::avx512bf16
