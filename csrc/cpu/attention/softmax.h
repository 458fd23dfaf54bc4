// What every softmax of attention is made of: powers of 2, what is known of each query, and the output as codes.
#pragma once

#include "cpu/attention/attention.h"
#include "cpu/rowwise/codes.h"
#include "cpu/simd.h"

namespace bertkern::cpu {
namespace {

constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLowest = -3.402823466e38f;
constexpr float kSmallest = 1.17549435e-38f;

// c0 + c1 r + ... by Horner's rule.
template <int kTerms>
BK_INLINE vf polynomial(const float (&c)[kTerms], vf r) {
  vf p = vset(c[kTerms - 1]);
#pragma GCC unroll 8
  for (int i = kTerms - 2; i >= 0; --i) p = vfma(p, r, vset(c[i]));
  return p;
}

// 2^x for x <= 0: minimax polynomials of 2^r, relative error 7.5e-5 (degree 3) and 7.5e-8 (degree 5) beside rounding.
// NaN stays NaN, -inf gives 0.
#if defined(__AVX512F__)  // r in [0, 1), from instructions that split and join floats
constexpr float kPower3[] = {9.999251962e-1f, 6.958335638e-1f, 2.260671556e-1f, 7.802452147e-2f};
constexpr float kPower5[] = {9.999999404e-1f, 6.931530833e-1f, 2.401536107e-1f,
                             5.582631752e-2f, 8.989339694e-3f, 1.877576695e-3f};
template <class Power>
BK_INLINE vf exp2_negative(const Power& power, vf x) {
  const vf r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  return _mm512_scalef_ps(polynomial(power, r), x);
}
#else  // r in [-1/2, 1/2]; below -126.5 the result is 0
constexpr float kPower3[] = {9.999280572e-1f, 6.932609677e-1f, 2.426111251e-1f, 5.517166853e-2f};
constexpr float kPower5[] = {1.0f, 6.931469440e-1f, 2.402212024e-1f, 5.550713092e-2f, 9.675540961e-3f, 1.327647245e-3f};
template <class Power>
BK_INLINE vf exp2_negative(const Power& power, vf x) {
  const vf clamped = vmax(vset(-127.0f), x);    // the second operand survives a NaN
  const vf magic = vset(12582912.0f + 127.0f);  // 1.5 * 2^23: the sum's low bits are round(x) + 127
  const vf shifted = vadd(clamped, magic);
  const vf p = polynomial(power, vsub(clamped, vsub(shifted, magic)));
  return vmul(p, as_float(vshift_left(as_int(shifted), 23)));
}
#endif

// What a softmax knows of each query, and keeps of the keys so far.
struct Running {
  alignas(64) float scale[kQueries];    // of the products
  alignas(64) float base[kQueries];     // of scores, in exponents of 2
  alignas(64) int32_t start[kQueries];  // of integer products
  alignas(64) float top[kQueries];      // largest score of the running chunk
  alignas(64) float most[kQueries];     // and of all so far
  alignas(64) float total[kQueries];    // sum of p
  alignas(64) float rescale[kQueries];  // of what was summed before the running chunk
  alignas(64) float inverse[kQueries];  // factor / total
};

// Scales of `lanes` queries from q0 on. None is zero, or -inf times it were not a number; NaN stays NaN.
BK_INLINE void begin_queries(const AttentionHead& h, int64_t q0, int64_t count, int64_t lanes, Running& run) {
  for (int64_t i = 0; i < lanes; i += kWidth) {
    const int64_t left = count - i < kWidth ? count - i : kWidth;
    vf scale = vset(h.scale);
    if (h.q_scale) scale = vmul(scale, vload_n(h.q_scale + q0 + i, left));
    if (h.finite) scale = vfma(vset(0.0f), vload_n(h.finite + q0 + i, left), scale);
    scale = vmax(vset(kSmallest), scale);
    vstore(run.scale + i, scale), vstore(run.base + i, h.bias ? vset(kLog2e) : vmul(scale, vset(kLog2e)));
    vstore(run.most + i, vset(kLowest)), vstore(run.total + i, vset(0.0f));
  }
}

// Of a head without keys: zeros.
void store_nothing(const AttentionHead& h) {
  const int64_t size = dtype_size(h.out_dtype);
  for (int64_t i = 0; i < h.queries; ++i)
    __builtin_memset(static_cast<char*>(h.out) + i * h.out_pitch * size, h.out_dtype >= Dtype::s8 ? h.out_zero : 0,
                     static_cast<size_t>(h.head_dim * size));
}

// Keys that a chunk has at most, `multiple` of them together: even chunks, which follow from the number of keys alone.
BK_INLINE int64_t keys_of_chunk(int64_t keys, int64_t multiple) {
  const int64_t chunks = (keys + kMostKeys - 1) / kMostKeys;
  return ((keys + chunks - 1) / chunks + multiple - 1) / multiple * multiple;
}

// Keys up to which the queries [q0, q0 + count) see any: at least one, so that there is something to write.
BK_INLINE int64_t keys_seen(const AttentionHead& h, int64_t q0, int64_t count) {
  if (!h.causal || h.query_position || h.key_position) return h.keys;
  const int64_t seen = h.first_query + q0 + count;
  return seen < 1 ? 1 : seen < h.keys ? seen : h.keys;
}

// Rows of outputs [count][pitch] as codes of out_step, from row q0 on. A code cannot say that it is none: out_finite
// does.
void store_code_rows(const AttentionHead& h, int64_t q0, int64_t count, const float* y, int64_t pitch) {
  const CodeGrid grid = code_grid(h.out_step, h.out_zero, h.out_dtype == Dtype::s8);
  const vi magnitude = vseti(0x7fffffff);
  for (int64_t i = 0; i < count; ++i, y += pitch) {
    uint8_t* out = static_cast<uint8_t*>(h.out) + (q0 + i) * h.out_pitch;
    vi top = vseti(0);  // the bits of |y| are ordered like the values, Inf and NaN on top
    for (int64_t d = 0; d < h.head_dim; d += kWidth) {
      const int64_t n = h.head_dim - d < kWidth ? h.head_dim - d : kWidth;
      const vf x = vload(y + d);  // zeros beyond head_dim
      top = vmaxi(top, vandi(as_int(x), magnitude));
      store_codes(out + d, x, grid, n);
    }
    if (vmaxi_lane(top) < 0x7f800000 || !h.out_finite) continue;
    // Heads of a row may be different threads'.
    __atomic_store_n(reinterpret_cast<uint32_t*>(h.out_finite) + q0 + i, 0x7fc00000u, __ATOMIC_RELAXED);
  }
}

}  // namespace
}  // namespace bertkern::cpu
