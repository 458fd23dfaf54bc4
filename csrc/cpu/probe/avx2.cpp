#include <immintrin.h>

#include "cpu/probe/chains.h"
#include "cpu/probe/probe.h"

namespace bertkern::cpu::probe::avx2 {
namespace {

// int8 kernels widen to int16: pairs of products are added exactly, and sums stay in int32.
void run_int8(std::int64_t iterations) {
  const __m256i x = _mm256_set1_epi16(1);
  BERTKERN_CHAINS(__m256i);
  __m256i product;
  for (std::int64_t n = 0; n < iterations; ++n) {
#define UPDATE(a) __asm__ volatile("vpmaddwd %2, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(a), "=&x"(product) : "x"(x));
    BERTKERN_ROUND(UPDATE)
#undef UPDATE
  }
}

void run_fp32(std::int64_t iterations) {
  const __m256 x = _mm256_set1_ps(0.5f);
  BERTKERN_CHAINS(__m256);
  for (std::int64_t n = 0; n < iterations; ++n) {
#define UPDATE(a) __asm__ volatile("vfmadd231ps %1, %1, %0" : "+x"(a) : "x"(x));
    BERTKERN_ROUND(UPDATE)
#undef UPDATE
  }
}

std::uint64_t read(const void* data, std::size_t bytes) {
  const __m256i* words = static_cast<const __m256i*>(data);
  __m256i sums[8] = {};
  for (std::size_t i = 0; i < bytes / 32; i += 8) {
    for (int lane = 0; lane < 8; ++lane) sums[lane] = _mm256_xor_si256(sums[lane], _mm256_load_si256(words + i + lane));
  }
  for (int lane = 1; lane < 8; ++lane) sums[0] = _mm256_xor_si256(sums[0], sums[lane]);
  return std::uint64_t(_mm256_extract_epi64(sums[0], 0));
}

}  // namespace

Probes probes() { return {{run_int8, 16 * BERTKERN_CHAIN_COUNT}, {}, {run_fp32, 8 * BERTKERN_CHAIN_COUNT}, read}; }

}  // namespace bertkern::cpu::probe::avx2
