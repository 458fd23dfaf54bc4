#include <immintrin.h>

#include "cpu/probe/chains.h"
#include "cpu/probe/probe.h"

namespace bertkern::cpu::probe::avx512vnni {
namespace {

void run_int8(std::int64_t iterations) {
  const __m512i x = _mm512_set1_epi8(1);
  BERTKERN_CHAINS(__m512i);
  for (std::int64_t n = 0; n < iterations; ++n) {
#define UPDATE(a) __asm__ volatile("vpdpbusd %1, %1, %0" : "+v"(a) : "v"(x));
    BERTKERN_ROUND(UPDATE)
#undef UPDATE
  }
}

}  // namespace

Probes probes() { return {{run_int8, 64 * BERTKERN_CHAIN_COUNT}, {}, {}, nullptr}; }

}  // namespace bertkern::cpu::probe::avx512vnni
