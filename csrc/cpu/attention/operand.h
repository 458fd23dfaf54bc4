// What the two products of attention read. An Operand has two halves, which say what the dot products of scores and of
// values read:
//
//   Score, Value                       both:
//   Dot                                policy of the products, see gemm/dot.h
//   kPer                               values in a dword, along the dimension that is summed over
//
//   Score                              dwords of n values of a row; what is left of q's last dword is zero:
//   pack_query(row, dtype, n, out)
//   pack_key(row, dtype, scale, n, out)   times `scale`, but for integer products: the tile multiplies their sums
//   starts(q, steps, lanes, out)       of integer products: what the sum of each lane begins with
//
//   Value
//   kPower                             polynomial of exp
//   kScalesRows                        whether rows of v are scaled where they are packed; else p is
//   pack_together(rows[kPer], dtype, scales[kPer], n, out)   n dwords, each of a value of every row of v (null: zeros),
//                                      and zeros up to a multiple of kWidth
//   store(out, x[kPer])                kWidth dwords, each of a value of every vector
#pragma once

#include "cpu/attention/softmax.h"
#include "cpu/gemm/dot.h"

namespace bertkern::cpu {
namespace {

BK_INLINE vf load_values(const void* row, Dtype dtype, int64_t at, int64_t n) {
  if (dtype == Dtype::bf16) return vload_bf16_n(static_cast<const uint16_t*>(row) + at, n);
  if (dtype == Dtype::f16) return vload_f16_n(static_cast<const uint16_t*>(row) + at, n);
  if (dtype == Dtype::s8) return vload_s8_n(static_cast<const int8_t*>(row) + at, n);
  return vload_n(static_cast<const float*>(row) + at, n);
}

BK_INLINE const void* row_of(const void* rows, Dtype dtype, int64_t pitch, int64_t r) {
  return static_cast<const char*>(rows) + r * pitch * dtype_size(dtype);
}

struct Score_f32 {
  using Dot = Dot_f32;
  static constexpr int64_t kPer = 1;
  BK_INLINE void pack_query(const void* row, Dtype dtype, int64_t count, uint32_t* out) {
    pack_key(row, dtype, 1.0f, count, out);
  }
  BK_INLINE void pack_key(const void* row, Dtype dtype, float scale, int64_t count, uint32_t* out) {
    for (int64_t d = 0; d < count; d += kWidth) {
      const int64_t n = count - d < kWidth ? count - d : kWidth;
      vstore_n(reinterpret_cast<float*>(out) + d, vmul(load_values(row, dtype, d, n), vset(scale)), n);
    }
  }
};

struct Value_f32 {
  using Dot = Dot_f32;
  static constexpr int64_t kPer = 1;
  static constexpr bool kScalesRows = true;
  static constexpr const float (&kPower)[6] = kPower5;
  BK_INLINE void pack_together(const void* const (&row)[1], Dtype dtype, const float (&scale)[1], int64_t count,
                               uint32_t* out) {
    for (int64_t d = 0; d < count; d += kWidth) {
      const vf x = load_values(row[0], dtype, d, count - d < kWidth ? count - d : kWidth);
      vstore(reinterpret_cast<float*>(out) + d, vmul(x, vset(scale[0])));
    }
  }
  BK_INLINE void store(uint32_t* out, const vf (&x)[1]) { vstore(reinterpret_cast<float*>(out), x[0]); }
};

struct Operand_f32 {
  using Score = Score_f32;
  using Value = Value_f32;
};

// Rows of one head lie a row of all heads apart, where no processor's own fetching finds them: those that come are
// asked for a few rows before.
constexpr int64_t kRowsAhead = 8;
BK_INLINE void fetch_row(const void* rows, Dtype dtype, int64_t pitch, int64_t r, int64_t width) {
  const char* const row = static_cast<const char*>(row_of(rows, dtype, pitch, r));
  for (int64_t byte = 0; byte < width * dtype_size(dtype); byte += 64) __builtin_prefetch(row + byte);
}

template <class Score>
void pack_keys(const AttentionHead& h, int64_t steps, uint32_t* out) {
  for (int64_t j = 0; j < h.keys; ++j, out += steps) {
    if (j + kRowsAhead < h.keys) fetch_row(h.k, h.dtype, h.k_pitch, j + kRowsAhead, h.head_dim);
    Score::pack_key(row_of(h.k, h.dtype, h.k_pitch, j), h.dtype, h.k_scale ? h.k_scale[j] : 1.0f, h.head_dim, out);
  }
}

// V as panels of kFeatures, the last one of `pitch` % kFeatures: [steps][kFeatures] dwords, zeros beyond head_dim and
// after the last key. A tile of queries reads one panel, from end to end.
constexpr int64_t kFeatures = 2 * kWidth;
BK_INLINE int64_t panel_width(int64_t pitch, int64_t d) { return pitch - d < kFeatures ? pitch - d : kFeatures; }

template <class Value>
void pack_values(const AttentionHead& h, int64_t pitch, int64_t steps, uint32_t* out) {
  const int64_t taken = (h.keys + Value::kPer - 1) / Value::kPer;
  for (int64_t d = 0; d < pitch; d += kFeatures) {
    const int64_t width = panel_width(pitch, d);
    __builtin_memset(out + d * steps + taken * width, 0, static_cast<size_t>((steps - taken) * width) * 4);
  }
  for (int64_t step = 0; step < taken; ++step) {
    const void* rows[Value::kPer];
    float scales[Value::kPer];
    for (int64_t i = 0; i < Value::kPer; ++i) {
      const int64_t j = step * Value::kPer + i;
      const bool there = j < h.keys;
      rows[i] = there ? row_of(h.v, h.dtype, h.v_pitch, j) : nullptr;
      scales[i] = there && h.v_scale ? h.v_scale[j] : 1.0f;
      if (j + kRowsAhead < h.keys) fetch_row(h.v, h.dtype, h.v_pitch, j + kRowsAhead, h.head_dim);
    }
    for (int64_t d = 0; d < h.head_dim; d += kFeatures) {
      const void* from[Value::kPer];
      for (int64_t i = 0; i < Value::kPer; ++i) from[i] = rows[i] ? row_of(rows[i], h.dtype, d, 1) : nullptr;
      Value::pack_together(from, h.dtype, scales, h.head_dim - d < kFeatures ? h.head_dim - d : kFeatures,
                           out + d * steps + step * panel_width(pitch, d));
    }
  }
}

// Q as [steps][kQueries] dwords; lanes without a query are zero. stage: [kQueries][stage_pitch], zeros beyond `steps`.
template <class Score>
void pack_queries(const AttentionHead& h, int64_t q0, int64_t count, int64_t lanes, uint32_t* stage,
                  int64_t stage_pitch, uint32_t* out) {
  for (int64_t i = 0; i < count; ++i) {
    if (q0 + i + kRowsAhead < h.queries) fetch_row(h.q, h.dtype, h.q_pitch, q0 + i + kRowsAhead, h.head_dim);
    Score::pack_query(row_of(h.q, h.dtype, h.q_pitch, q0 + i), h.dtype, h.head_dim, stage + i * stage_pitch);
  }
  for (int64_t i = count; i < lanes; ++i)
    for (int64_t d = 0; d < stage_pitch; d += kWidth)
      vstore(reinterpret_cast<float*>(stage + i * stage_pitch + d), vset(0.0f));
  transpose(reinterpret_cast<const float*>(stage), stage_pitch, lanes, stage_pitch, reinterpret_cast<float*>(out),
            kQueries);
}

}  // namespace
}  // namespace bertkern::cpu
