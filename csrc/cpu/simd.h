// One vector vocabulary for every ISA, so that a row kernel is written once and compiled once per instruction set.
//
// Include it only from files compiled for one ISA: the width follows from the compiler's flags. Everything is
// static and forced inline, and nothing but <stdint.h>, <stddef.h> and the intrinsics is included: inline code of the
// standard library compiled here with AVX-512 flags could be picked by the linker for the portable path.
//
//   vf      kWidth floats          vload/vstore      kWidth lanes, unaligned
//   vi      kWidth int32           vload_n/vstore_n  the first n lanes, 0 <= n <= kWidth; the rest reads as 0
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define BK_INLINE static inline __attribute__((always_inline))

namespace bertkern::cpu {
namespace {

BK_INLINE float bits_to_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

BK_INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Round to nearest even; a NaN keeps its sign and stays quiet.
BK_INLINE uint16_t float_to_bf16(float value) {
  const uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

BK_INLINE float bf16_to_float(uint16_t value) { return bits_to_float(static_cast<uint32_t>(value) << 16); }

#if defined(__AVX512F__)
// ------------------------------------------------------------------------------------------------ AVX-512
constexpr int kWidth = 16;
using vf = __m512;
using vi = __m512i;

BK_INLINE __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }
BK_INLINE vf vset(float x) { return _mm512_set1_ps(x); }
BK_INLINE vi vseti(int32_t x) { return _mm512_set1_epi32(x); }
BK_INLINE vf vload(const float* p) { return _mm512_loadu_ps(p); }
BK_INLINE vf vload_n(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
BK_INLINE vi vloadi(const int32_t* p) { return _mm512_loadu_si512(p); }
BK_INLINE void vstore(float* p, vf x) { _mm512_storeu_ps(p, x); }
BK_INLINE void vstore_n(float* p, vf x, int64_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), x); }
BK_INLINE vf vadd(vf a, vf b) { return _mm512_add_ps(a, b); }
BK_INLINE vf vsub(vf a, vf b) { return _mm512_sub_ps(a, b); }
BK_INLINE vf vmul(vf a, vf b) { return _mm512_mul_ps(a, b); }
BK_INLINE vf vdiv(vf a, vf b) { return _mm512_div_ps(a, b); }
BK_INLINE vf vfma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
BK_INLINE vf vmin(vf a, vf b) { return _mm512_min_ps(a, b); }  // b where either is NaN
BK_INLINE vf vmax(vf a, vf b) { return _mm512_max_ps(a, b); }  // b where either is NaN
BK_INLINE vi vmaxi(vi a, vi b) { return _mm512_max_epi32(a, b); }
BK_INLINE vi vmini(vi a, vi b) { return _mm512_min_epi32(a, b); }
BK_INLINE vf vabs(vf a) { return _mm512_abs_ps(a); }
BK_INLINE vi as_int(vf a) { return _mm512_castps_si512(a); }
BK_INLINE vf as_float(vi a) { return _mm512_castsi512_ps(a); }
BK_INLINE vi vandi(vi a, vi b) { return _mm512_and_si512(a, b); }
BK_INLINE vi vaddi(vi a, vi b) { return _mm512_add_epi32(a, b); }
BK_INLINE vi vshift_left(vi a, int bits) { return _mm512_slli_epi32(a, static_cast<unsigned>(bits)); }
BK_INLINE vi vshift_right(vi a, int bits) { return _mm512_srli_epi32(a, static_cast<unsigned>(bits)); }
BK_INLINE vi vshift_right_signed(vi a, int bits) { return _mm512_srai_epi32(a, static_cast<unsigned>(bits)); }
BK_INLINE vi vori(vi a, vi b) { return _mm512_or_si512(a, b); }
BK_INLINE vi vmuli(vi a, vi b) { return _mm512_mullo_epi32(a, b); }
BK_INLINE vi vsub8(vi a, vi b) { return _mm512_sub_epi8(a, b); }
BK_INLINE void vstorei(int32_t* p, vi x) { _mm512_storeu_si512(p, x); }
BK_INLINE vi vload_two(const uint32_t* p) {  // again and again
  return _mm512_broadcastq_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
BK_INLINE vi vload_twice(const uint32_t* p) {  // half a vector, each lane twice
  const vi wide = _mm512_cvtepu32_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_shuffle_epi32(wide, static_cast<_MM_PERM_ENUM>(0xa0));
}
BK_INLINE vi veven_lanes(vi a, vi b) {  // of a, then of b
  const vi at = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  return _mm512_permutex2var_epi32(a, at, b);
}
BK_INLINE vi vodd_lanes(vi a, vi b) {
  const vi at = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  return _mm512_permutex2var_epi32(a, at, b);
}
BK_INLINE vi vload_four(const uint32_t* p) {  // again and again
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
template <int i>
BK_INLINE vi vspread_of_four(vi x) {  // lane i of each four lanes to all of them
  return _mm512_shuffle_epi32(x, static_cast<_MM_PERM_ENUM>(i * 0x55));
}
BK_INLINE vi vshift_left16(vi a, int bits) { return _mm512_slli_epi16(a, static_cast<unsigned>(bits)); }
BK_INLINE vi vshift_right16(vi a, int bits) { return _mm512_srai_epi16(a, static_cast<unsigned>(bits)); }
BK_INLINE vi vshift_right16_unsigned(vi a, int bits) { return _mm512_srli_epi16(a, static_cast<unsigned>(bits)); }
BK_INLINE vi vmadd16(vi a, vi b) { return _mm512_madd_epi16(a, b); }    // sums of neighbouring 16-bit products
BK_INLINE vi vmadd8(vi a, vi b) { return _mm512_maddubs_epi16(a, b); }  // of u8 x s8, saturated to 16 bits
BK_INLINE vi vadd16(vi a, vi b) { return _mm512_add_epi16(a, b); }
BK_INLINE vi vsum16(vi a) { return vmadd16(a, _mm512_set1_epi16(1)); }  // of neighbouring 16-bit lanes
BK_INLINE vf to_float(vi a) { return _mm512_cvtepi32_ps(a); }
BK_INLINE vi round_to_int(vf a) { return _mm512_cvtps_epi32(a); }
BK_INLINE vf vround(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
BK_INLINE vf select_lt(vf a, vf b, vf yes, vf no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}
BK_INLINE vf pow2(vf n) { return _mm512_scalef_ps(_mm512_set1_ps(1.0f), n); }
BK_INLINE float vsum(vf a) { return _mm512_reduce_add_ps(a); }
BK_INLINE float vmax_lane(vf a) { return _mm512_reduce_max_ps(a); }
BK_INLINE int32_t vmaxi_lane(vi a) { return _mm512_reduce_max_epi32(a); }

BK_INLINE vf vload_bf16_n(const uint16_t* p, int64_t n) {
  const __m256i h = _mm256_maskz_loadu_epi16(first_lanes(n), p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
BK_INLINE vf vload_f16_n(const uint16_t* p, int64_t n) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}
#if !defined(__AVX512BF16__)
BK_INLINE __m512i bf16_bits(vf x) {  // in the low half of each lane
  const __m512i bits = as_int(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), vseti(1));
  const __m512i up = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, vseti(0x7fff))), 16);
  const __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(bits, 16), vseti(0x40));
  return _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), up, quiet);
}
#endif
BK_INLINE void vstore_bf16_n(uint16_t* p, vf x, int64_t n) {
#if defined(__AVX512BF16__)  // the same but for denormals, which the instruction takes for zeros
  const __m256i h = (__m256i)_mm512_cvtneps_pbh(x);
#else
  const __m256i h = _mm512_cvtepi32_epi16(bf16_bits(x));
#endif
  if (n == 16) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), h);
  _mm256_mask_storeu_epi16(p, first_lanes(n), h);
}
BK_INLINE void vstore_f16_n(uint16_t* p, vf x, int64_t n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
BK_INLINE void vstore_u8_n(uint8_t* p, vi x, int64_t n) {  // lanes already in [0, 255]
  if (n == 16) return _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x));
  _mm_mask_storeu_epi8(p, first_lanes(n), _mm512_cvtepi32_epi8(x));
}
BK_INLINE vf vload_s8_n(const int8_t* p, int64_t n) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first_lanes(n), p)));
}

BK_INLINE void transpose_lanes(vf (&r)[16]) {
  vf t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(t[4 * i]), b = _mm512_castps_pd(t[4 * i + 1]);
    const __m512d c = _mm512_castps_pd(t[4 * i + 2]), d = _mm512_castps_pd(t[4 * i + 3]);
    r[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    r[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    r[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    r[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[0 + i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0x88);
    r[4 + i] = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0x88);
    r[8 + i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0xdd);
    r[12 + i] = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

#elif defined(__AVX2__)
// --------------------------------------------------------------------------------------------------- AVX2
constexpr int kWidth = 8;
using vf = __m256;
using vi = __m256i;

BK_INLINE __m256i first_lanes(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
BK_INLINE vf vset(float x) { return _mm256_set1_ps(x); }
BK_INLINE vi vseti(int32_t x) { return _mm256_set1_epi32(x); }
BK_INLINE vf vload(const float* p) { return _mm256_loadu_ps(p); }
// Whole vectors are told apart: on some processors a masked store is some forty operations.
BK_INLINE vf vload_n(const float* p, int64_t n) {
  if (n == 8) return vload(p);
  return _mm256_maskload_ps(p, first_lanes(n));
}
BK_INLINE vi vloadi(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
BK_INLINE void vstore(float* p, vf x) { _mm256_storeu_ps(p, x); }
BK_INLINE void vstore_n(float* p, vf x, int64_t n) {
  if (n == 8) return vstore(p, x);
  _mm256_maskstore_ps(p, first_lanes(n), x);
}
BK_INLINE vf vadd(vf a, vf b) { return _mm256_add_ps(a, b); }
BK_INLINE vf vsub(vf a, vf b) { return _mm256_sub_ps(a, b); }
BK_INLINE vf vmul(vf a, vf b) { return _mm256_mul_ps(a, b); }
BK_INLINE vf vdiv(vf a, vf b) { return _mm256_div_ps(a, b); }
BK_INLINE vf vfma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
BK_INLINE vf vmin(vf a, vf b) { return _mm256_min_ps(a, b); }
BK_INLINE vf vmax(vf a, vf b) { return _mm256_max_ps(a, b); }
BK_INLINE vi vmaxi(vi a, vi b) { return _mm256_max_epi32(a, b); }
BK_INLINE vi vmini(vi a, vi b) { return _mm256_min_epi32(a, b); }
BK_INLINE vf vabs(vf a) { return _mm256_and_ps(a, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff))); }
BK_INLINE vi as_int(vf a) { return _mm256_castps_si256(a); }
BK_INLINE vf as_float(vi a) { return _mm256_castsi256_ps(a); }
BK_INLINE vi vandi(vi a, vi b) { return _mm256_and_si256(a, b); }
BK_INLINE vi vaddi(vi a, vi b) { return _mm256_add_epi32(a, b); }
BK_INLINE vi vshift_left(vi a, int bits) { return _mm256_slli_epi32(a, bits); }
BK_INLINE vi vshift_right(vi a, int bits) { return _mm256_srli_epi32(a, bits); }
BK_INLINE vi vshift_right_signed(vi a, int bits) { return _mm256_srai_epi32(a, bits); }
BK_INLINE vi vori(vi a, vi b) { return _mm256_or_si256(a, b); }
BK_INLINE vi vmuli(vi a, vi b) { return _mm256_mullo_epi32(a, b); }
BK_INLINE vi vsub8(vi a, vi b) { return _mm256_sub_epi8(a, b); }
BK_INLINE void vstorei(int32_t* p, vi x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
BK_INLINE vi vload_two(const uint32_t* p) {
  return _mm256_broadcastq_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
BK_INLINE vi vload_twice(const uint32_t* p) {
  return _mm256_shuffle_epi32(_mm256_cvtepu32_epi64(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 0xa0);
}
BK_INLINE vi veven_lanes(vi a, vi b) {
  return _mm256_permute4x64_epi64(as_int(_mm256_shuffle_ps(as_float(a), as_float(b), 0x88)), 0xd8);
}
BK_INLINE vi vodd_lanes(vi a, vi b) {
  return _mm256_permute4x64_epi64(as_int(_mm256_shuffle_ps(as_float(a), as_float(b), 0xdd)), 0xd8);
}
BK_INLINE vi vshift_left16(vi a, int bits) { return _mm256_slli_epi16(a, bits); }
BK_INLINE vi vshift_right16(vi a, int bits) { return _mm256_srai_epi16(a, bits); }
BK_INLINE vi vshift_right16_unsigned(vi a, int bits) { return _mm256_srli_epi16(a, bits); }
BK_INLINE vi vmadd16(vi a, vi b) { return _mm256_madd_epi16(a, b); }
BK_INLINE vi vmadd8(vi a, vi b) { return _mm256_maddubs_epi16(a, b); }
BK_INLINE vi vadd16(vi a, vi b) { return _mm256_add_epi16(a, b); }
BK_INLINE vi vsum16(vi a) { return vmadd16(a, _mm256_set1_epi16(1)); }
BK_INLINE vf to_float(vi a) { return _mm256_cvtepi32_ps(a); }
BK_INLINE vi round_to_int(vf a) { return _mm256_cvtps_epi32(a); }
BK_INLINE vf vround(vf a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
BK_INLINE vf select_lt(vf a, vf b, vf yes, vf no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
BK_INLINE vf pow2(vf n) {  // n integral, -126 <= n <= 127
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
BK_INLINE float vsum(vf a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
BK_INLINE float vmax_lane(vf a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}
BK_INLINE int32_t vmaxi_lane(vi a) {
  __m128i s = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  s = _mm_max_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

BK_INLINE __m128i load_u16_n(const uint16_t* p, int64_t n) {
  uint16_t lanes[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  if (n == 8) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(lanes));
}
BK_INLINE void store_u16_n(uint16_t* p, __m128i x, int64_t n) {
  if (n == 8) return _mm_storeu_si128(reinterpret_cast<__m128i*>(p), x);
  uint16_t lanes[8];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(lanes), x);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}
BK_INLINE vf vload_bf16_n(const uint16_t* p, int64_t n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_u16_n(p, n)), 16));
}
BK_INLINE vf vload_f16_n(const uint16_t* p, int64_t n) { return _mm256_cvtph_ps(load_u16_n(p, n)); }
BK_INLINE __m256i bf16_bits(vf x) {
  const __m256i bits = as_int(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), vseti(1));
  const __m256i up = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, vseti(0x7fff))), 16);
  const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), vseti(0x40));
  return _mm256_blendv_epi8(up, quiet, _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
}
BK_INLINE void vstore_bf16_n(uint16_t* p, vf x, int64_t n) {
  const __m256i h = bf16_bits(x);
  store_u16_n(p, _mm_packus_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1)), n);
}
BK_INLINE void vstore_f16_n(uint16_t* p, vf x, int64_t n) {
  store_u16_n(p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), n);
}
BK_INLINE void vstore_u8_n(uint8_t* p, vi x, int64_t n) {
  const __m128i h = _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  const __m128i b = _mm_packus_epi16(h, h);
  if (n == 8) return _mm_storel_epi64(reinterpret_cast<__m128i*>(p), b);
  uint8_t lanes[16];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(lanes), b);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}
BK_INLINE vf vload_s8_n(const int8_t* p, int64_t n) {
  int8_t lanes[16] = {0};
  if (n == 8) return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(lanes))));
}

BK_INLINE void transpose_lanes(vf (&r)[8]) {
  vf t[8], u[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    u[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    u[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    u[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    u[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2f128_ps(u[i], u[4 + i], 0x20);
    r[4 + i] = _mm256_permute2f128_ps(u[i], u[4 + i], 0x31);
  }
}

#else
// ----------------------------------------------------------------------------------- any processor (GNU vectors)
constexpr int kWidth = 4;
typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));

BK_INLINE vf vset(float x) { return vf{x, x, x, x}; }
BK_INLINE vi vseti(int32_t x) { return vi{x, x, x, x}; }
BK_INLINE vf vload(const float* p) {
  vf x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
BK_INLINE vf vload_n(const float* p, int64_t n) {
  vf x = vset(0.0f);
  __builtin_memcpy(&x, p, static_cast<size_t>(n) * 4);
  return x;
}
BK_INLINE vi vloadi(const int32_t* p) {
  vi x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
BK_INLINE void vstore(float* p, vf x) { __builtin_memcpy(p, &x, sizeof x); }
BK_INLINE void vstore_n(float* p, vf x, int64_t n) { __builtin_memcpy(p, &x, static_cast<size_t>(n) * 4); }
BK_INLINE vi as_int(vf a) { return reinterpret_cast<vi>(a); }
BK_INLINE vf as_float(vi a) { return reinterpret_cast<vf>(a); }
BK_INLINE vf vadd(vf a, vf b) { return a + b; }
BK_INLINE vf vsub(vf a, vf b) { return a - b; }
BK_INLINE vf vmul(vf a, vf b) { return a * b; }
BK_INLINE vf vdiv(vf a, vf b) { return a / b; }
BK_INLINE vf vfma(vf a, vf b, vf c) { return a * b + c; }  // two roundings: there is no FMA to rely on
BK_INLINE vf select(vi mask, vf yes, vf no) { return as_float((as_int(yes) & mask) | (as_int(no) & ~mask)); }
BK_INLINE vf vmin(vf a, vf b) { return select(a < b, a, b); }
BK_INLINE vf vmax(vf a, vf b) { return select(a > b, a, b); }
BK_INLINE vi vmaxi(vi a, vi b) {
  const vi mask = a > b;
  return (a & mask) | (b & ~mask);
}
BK_INLINE vi vmini(vi a, vi b) {
  const vi mask = a < b;
  return (a & mask) | (b & ~mask);
}
BK_INLINE vf vabs(vf a) { return as_float(as_int(a) & 0x7fffffff); }
BK_INLINE vi vandi(vi a, vi b) { return a & b; }
BK_INLINE vi vaddi(vi a, vi b) { return a + b; }
BK_INLINE vi vori(vi a, vi b) { return a | b; }
BK_INLINE vi vmuli(vi a, vi b) { return a * b; }
BK_INLINE vi vshift_left(vi a, int bits) { return a << bits; }
BK_INLINE vi vshift_right(vi a, int bits) {
  typedef uint32_t vu __attribute__((vector_size(16)));
  return reinterpret_cast<vi>(reinterpret_cast<vu>(a) >> static_cast<uint32_t>(bits));
}
BK_INLINE vi vshift_right_signed(vi a, int bits) { return a >> bits; }
BK_INLINE vi vsub8(vi a, vi b) {
  typedef uint8_t vb __attribute__((vector_size(16)));
  return reinterpret_cast<vi>(reinterpret_cast<vb>(a) - reinterpret_cast<vb>(b));
}
BK_INLINE void vstorei(int32_t* p, vi x) { __builtin_memcpy(p, &x, sizeof x); }
BK_INLINE vi vload_two(const uint32_t* p) {
  const int32_t a = static_cast<int32_t>(p[0]), b = static_cast<int32_t>(p[1]);
  return vi{a, b, a, b};
}
BK_INLINE vi vload_twice(const uint32_t* p) {
  const int32_t a = static_cast<int32_t>(p[0]), b = static_cast<int32_t>(p[1]);
  return vi{a, a, b, b};
}
BK_INLINE vi veven_lanes(vi a, vi b) { return vi{a[0], a[2], b[0], b[2]}; }
BK_INLINE vi vodd_lanes(vi a, vi b) { return vi{a[1], a[3], b[1], b[3]}; }
BK_INLINE vf to_float(vi a) { return __builtin_convertvector(a, vf); }
// Adding and taking away 1.5 * 2^23 rounds to nearest even for |a| < 2^22; larger values are integral already.
BK_INLINE vf vround(vf a) {
  const vf magic = vset(12582912.0f);
  return select(vabs(a) < vset(4194304.0f), (a + magic) - magic, a);
}
BK_INLINE vi round_to_int(vf a) { return __builtin_convertvector(vround(a), vi); }
BK_INLINE vf select_lt(vf a, vf b, vf yes, vf no) { return select(a < b, yes, no); }
BK_INLINE vf pow2(vf n) { return as_float((round_to_int(n) + 127) << 23); }
BK_INLINE float vsum(vf a) { return (a[0] + a[2]) + (a[1] + a[3]); }
BK_INLINE float vmax_lane(vf a) {
  const float x = a[0] > a[1] ? a[0] : a[1], y = a[2] > a[3] ? a[2] : a[3];
  return x > y ? x : y;
}
BK_INLINE int32_t vmaxi_lane(vi a) {
  const int32_t x = a[0] > a[1] ? a[0] : a[1], y = a[2] > a[3] ? a[2] : a[3];
  return x > y ? x : y;
}

BK_INLINE float f16_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, exponent = (h >> 10) & 31u, mantissa = h & 0x3ffu;
  if (exponent == 31u) return bits_to_float(sign | 0x7f800000u | (mantissa << 13));
  if (exponent != 0u) return bits_to_float(sign | ((exponent + 112u) << 23) | (mantissa << 13));
  const float tiny = static_cast<float>(mantissa) * 5.9604644775390625e-8f;  // 2^-24
  return sign ? -tiny : tiny;
}
BK_INLINE uint16_t float_to_f16(float value) {
  const uint32_t bits = float_to_bits(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {  // subnormal: let the float adder round at 2^-24
    const float shifted = bits_to_float(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (float_to_bits(shifted) - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | ((magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13));
}
BK_INLINE vf vload_bf16_n(const uint16_t* p, int64_t n) {
  vf x = vset(0.0f);
  for (int64_t i = 0; i < n; ++i) x[i] = bf16_to_float(p[i]);
  return x;
}
BK_INLINE vf vload_f16_n(const uint16_t* p, int64_t n) {
  vf x = vset(0.0f);
  for (int64_t i = 0; i < n; ++i) x[i] = f16_to_float(p[i]);
  return x;
}
BK_INLINE void vstore_bf16_n(uint16_t* p, vf x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = float_to_bf16(x[i]);
}
BK_INLINE void vstore_f16_n(uint16_t* p, vf x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = float_to_f16(x[i]);
}
BK_INLINE void vstore_u8_n(uint8_t* p, vi x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = static_cast<uint8_t>(x[i]);
}
BK_INLINE vf vload_s8_n(const int8_t* p, int64_t n) {
  vf x = vset(0.0f);
  for (int64_t i = 0; i < n; ++i) x[i] = static_cast<float>(p[i]);
  return x;
}
BK_INLINE void transpose_lanes(vf (&r)[4]) {
  const vf t[4] = {r[0], r[1], r[2], r[3]};
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) r[j][i] = t[i][j];
}
#endif

// exp(x), relative error below 1.2e-7 * 2: Cody-Waite reduction by ln 2 in two parts, degree-6 polynomial.
// x <= -87.3 gives 0 (no denormals), x >= 88.3 saturates near 2.3e38, NaN stays NaN.
BK_INLINE vf vexp(vf x) {
  const vf low = vset(-87.3f);
  const vf clamped = vmin(vset(88.3f), vmax(low, x));  // the second operand survives a NaN
  const vf n = vround(vmul(clamped, vset(1.44269504088896341f)));
  vf r = vfma(n, vset(-0.693359375f), clamped);
  r = vfma(n, vset(2.12194440e-4f), r);
  vf p = vset(1.9875691500e-4f);
  p = vfma(p, r, vset(1.3981999507e-3f));
  p = vfma(p, r, vset(8.3334519073e-3f));
  p = vfma(p, r, vset(4.1665795894e-2f));
  p = vfma(p, r, vset(1.6666665459e-1f));
  p = vfma(p, r, vset(5.0000001201e-1f));
  p = vadd(vfma(p, vmul(r, r), r), vset(1.0f));
  return select_lt(x, low, vset(0.0f), vmul(p, pow2(n)));
}

// dst[j][i] = src[i][j] for kWidth x kWidth elements.
BK_INLINE void transpose_block(const float* src, int64_t ld_src, float* dst, int64_t ld_dst) {
  vf r[kWidth];
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) r[i] = vload(src + i * ld_src);
  transpose_lanes(r);
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) vstore(dst + i * ld_dst, r[i]);
}

// dst[j][i] = src[i][j], any size; the tails go element by element.
BK_INLINE void transpose(const float* src, int64_t ld_src, int64_t rows, int64_t cols, float* dst, int64_t ld_dst) {
  int64_t i = 0;
  for (; i + kWidth <= rows; i += kWidth) {
    int64_t j = 0;
    for (; j + kWidth <= cols; j += kWidth) transpose_block(src + i * ld_src + j, ld_src, dst + j * ld_dst + i, ld_dst);
    for (; j < cols; ++j)
      for (int64_t k = i; k < i + kWidth; ++k) dst[j * ld_dst + k] = src[k * ld_src + j];
  }
  for (; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j) dst[j * ld_dst + i] = src[i * ld_src + j];
}

}  // namespace
}  // namespace bertkern::cpu
