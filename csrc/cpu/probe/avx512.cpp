#include <immintrin.h>

#include "cpu/probe/chains.h"
#include "cpu/probe/probe.h"

namespace bertkern::cpu::probe::avx512 {
namespace {

void run_int8(std::int64_t iterations) {  // as in avx2.cpp, twice as wide
  const __m512i x = _mm512_set1_epi16(1);
  BERTKERN_CHAINS(__m512i);
  __m512i product;
  for (std::int64_t n = 0; n < iterations; ++n) {
#define UPDATE(a) __asm__ volatile("vpmaddwd %2, %2, %1\n\tvpaddd %1, %0, %0" : "+v"(a), "=&v"(product) : "v"(x));
    BERTKERN_ROUND(UPDATE)
#undef UPDATE
  }
}

void run_fp32(std::int64_t iterations) {
  const __m512 x = _mm512_set1_ps(0.5f);
  BERTKERN_CHAINS(__m512);
  for (std::int64_t n = 0; n < iterations; ++n) {
#define UPDATE(a) __asm__ volatile("vfmadd231ps %1, %1, %0" : "+v"(a) : "v"(x));
    BERTKERN_ROUND(UPDATE)
#undef UPDATE
  }
}

std::uint64_t read(const void* data, std::size_t bytes) {
  const __m512i* words = static_cast<const __m512i*>(data);
  __m512i sums[8] = {};
  for (std::size_t i = 0; i < bytes / 64; i += 8) {
    for (int lane = 0; lane < 8; ++lane) sums[lane] = _mm512_xor_si512(sums[lane], _mm512_load_si512(words + i + lane));
  }
  for (int lane = 1; lane < 8; ++lane) sums[0] = _mm512_xor_si512(sums[0], sums[lane]);
  return std::uint64_t(_mm_cvtsi128_si64(_mm512_castsi512_si128(sums[0])));
}

}  // namespace

Probes probes() { return {{run_int8, 32 * BERTKERN_CHAIN_COUNT}, {}, {run_fp32, 16 * BERTKERN_CHAIN_COUNT}, read}; }

}  // namespace bertkern::cpu::probe::avx512
