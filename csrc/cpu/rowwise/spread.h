// Outputs whose columns of Y are not side by side: see Places.
#pragma once

#include "cpu/rowwise/rowwise.h"
#include "cpu/simd.h"

namespace bertkern::cpu {
namespace {

#if defined(__AVX512F__)
constexpr bool kHoles = true;

// 16 outputs from p on, each in a dword.
template <class T>
BK_INLINE vi load_outputs(const T* p) {
  if (sizeof(T) == 4) return _mm512_loadu_si512(p);
  if (sizeof(T) == 2) return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
template <class T>
BK_INLINE void store_outputs(T* p, __mmask16 mask, vi x) {
  if (sizeof(T) == 4)
    _mm512_mask_storeu_epi32(p, mask, x);
  else if (sizeof(T) == 2)
    _mm256_mask_storeu_epi16(p, mask, _mm512_cvtepi32_epi16(x));
  else
    _mm_mask_storeu_epi8(p, mask, _mm512_cvtepi32_epi8(x));
}
// Row by row: lines of many rows that lie 4 KiB apart would drive each other out of the L1. A row is loaded as it was
// stored, in whole vectors, which a load that begins within one would have to wait for.
template <class T>
void spread_as(const void* tile, int64_t rows, const Places* places, int64_t count, void* out, int64_t out_pitch) {
  vi source[kPanel];
  const vi lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int64_t i = 0; i < count; ++i)
    source[i] = _mm512_maskz_expand_epi32(static_cast<__mmask16>(places[i].mask), vaddi(lanes, vseti(places[i].from)));
  for (int64_t r = 0; r < rows; ++r) {
    const T* const row = static_cast<const T*>(tile) + r * kPanel;
    const vi low = load_outputs(row), high = load_outputs(row + 16);
    T* const to = static_cast<T*>(out) + r * out_pitch;
    for (int64_t i = 0; i < count; ++i)
      store_outputs(to + places[i].to, static_cast<__mmask16>(places[i].mask),
                    _mm512_permutex2var_epi32(low, source[i], high));
  }
}
BK_INLINE void collect_some(const float* y, const Places& some, float* row) {
  const __mmask16 mask = static_cast<__mmask16>(some.mask);
  vstore(row + some.from, _mm512_maskz_compress_ps(mask, _mm512_maskz_loadu_ps(mask, y + some.to)));
}
#else
constexpr bool kHoles = false;

template <class T>
BK_INLINE void copy_run(const T* from, T* to, uint32_t mask) {
  if (mask > 0xff) __builtin_memcpy(to, from, 8 * sizeof(T)), from += 8, to += 8, mask >>= 8;
  if (mask == 0xff) return static_cast<void>(__builtin_memcpy(to, from, 8 * sizeof(T)));
  if (mask > 0x7) __builtin_memcpy(to, from, 4 * sizeof(T)), from += 4, to += 4, mask >>= 4;
  if (mask > 0x1) __builtin_memcpy(to, from, 2 * sizeof(T)), from += 2, to += 2, mask >>= 2;
  if (mask) *to = *from;
}
template <class T>
void spread_as(const void* tile, int64_t rows, const Places* places, int64_t count, void* out, int64_t out_pitch) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < count; ++i)
      copy_run(static_cast<const T*>(tile) + r * kPanel + places[i].from,
               static_cast<T*>(out) + r * out_pitch + places[i].to, places[i].mask);
}
BK_INLINE void collect_some(const float* y, const Places& some, float* row) {
  copy_run(y + some.to, row + some.from, some.mask);
}
#endif

void spread(const void* tile, int64_t rows, const Places* places, int64_t count, int64_t bytes, void* out,
            int64_t out_pitch) {
  switch (bytes) {
    case 4:
      return spread_as<uint32_t>(tile, rows, places, count, out, out_pitch);
    case 2:
      return spread_as<uint16_t>(tile, rows, places, count, out, out_pitch);
    default:
      return spread_as<uint8_t>(tile, rows, places, count, out, out_pitch);
  }
}

void collect(const float* y, int64_t y_pitch, int64_t rows, const Places* places, int64_t count, float* tile) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < count; ++i) collect_some(y + r * y_pitch, places[i], tile + r * kPanel);
}

}  // namespace
}  // namespace bertkern::cpu
