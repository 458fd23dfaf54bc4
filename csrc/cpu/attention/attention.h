// Attention of one head of one sequence, keys by the chunk, no matrix of scores in memory:
//
//   s[i, j] = scale * sum_d q[i, d] k[j, d] + bias[i, j]            -inf where causal and key j comes after query i
//   o[i, d] = factor / l[i] * sum_j p[i, j] v[j, d]                 p[i, j] = exp(s[i, j] - m[i]),  l[i] = sum_j p[i,
//   j]
//
// m[i] is the maximum of the keys seen so far; a chunk that raises it scales what was summed before by
// exp(m_old - m_new) (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018).
//
//   values    products     p before the second product    error of exp, relative
//   f32       fp32 FMA     fp32                           below 3e-7
//   bf16      vdpbf16ps    rounded to bf16                below 1e-4, a twentieth of that rounding
//
// Sums and l are fp32. What is f32 and comes as bf16 or fp16 is widened; bf16 operands are rounded where they are not
// bf16 already.
//
// q, k and v may also be int8 codes, x = code * scale, with a scale for each token or for all. Where the processor has
// vpdpbusd, sums of products of queries and keys are exact: int32, and as floats too up to d = 1024. (bf16 would be as
// exact. Measured with heads of 64, 128 and 384 tokens: vpdpbusd takes 0.78 and 0.73 of the time of a kernel all in
// bf16, and before fp32 values 0.65 and 0.64 of one all in fp32.) The scales of queries and keys are their scores', v's
// go to p before it is rounded, and one for all tokens is part of `scale` or `factor`. fp32 operands, keys and values,
// take theirs on where they are packed.
//
// The output may be codes too, of one step: fp32 rows of a head, still in the L1 cache, are rounded to them. A scale
// for each token is known only when all of its heads are: attend_rows.
//
// Both products are tiles of dot products over dwords (gemm/dot.h). The first has queries for lanes and keys for rows,
// so that maximum and sum run down the lanes without a horizontal step; the second has features for lanes and queries
// for rows, and writes rows of the output. A query is a lane and then a row of its own, and its keys are summed from
// the first, in chunks that follow from n_keys alone: its bits depend on no other query. A query without a key (all
// of them -inf) gives zeros.
#pragma once

#include <stdint.h>

#include "cpu/gemm/gemm.h"
#include "cpu/rowwise/rowwise.h"

namespace bertkern::cpu {

constexpr int64_t kQueries = 32;    // of a block: lanes of the first product
constexpr int64_t kMostKeys = 160;  // of a chunk: its scores stay in the L1 cache beside the operands

// Rows of q, k, v and out are tokens, `pitch` elements apart.
struct AttentionHead {
  const void* q;
  const void* k;
  const void* v;
  Dtype dtype;  // of q, k, v: f32, bf16, f16 or s8
  int64_t q_pitch, k_pitch, v_pitch;
  const float *q_scale, *k_scale, *v_scale;  // of each token's codes, at least 0 or NaN; null: 1
  const float* finite;                       // of each query: NaN where its output is to be; null: nowhere
  void* out;
  Dtype out_dtype;  // f32, bf16, f16, s8 or u8
  int64_t out_pitch;
  float out_step;     // of s8 and u8
  int32_t out_zero;   // 0 for s8
  float* out_finite;  // null, or of each query: set to NaN where its output is not finite and hence no code
  int64_t queries, keys, head_dim;
  float scale, factor;
  const float* bias;  // [queries][bias_pitch] or null
  int64_t bias_pitch;
  const int32_t* query_position;  // bias row of each query, and its place where causal; null: first_query + 0, 1, ...
  const int32_t* key_position;    // bias column of each key, and its place; null: 0, 1, 2, ...
  int64_t first_query;
  bool causal;
  uint32_t* scratch;  // attention_scratch(keys, head_dim) dwords
};

static inline int64_t attention_scratch(int64_t keys, int64_t head_dim) {
  const int64_t d = (head_dim + 15) / 16 * 16;
  return 2 * (keys + 32) * d + kQueries * (kMostKeys + 2 + 3 * d + 16) + 64;
}

using AttentionFn = void (*)(const AttentionHead& head);

// For q, k, v of `dtype` and values multiplied as `values` says, of active_isa(); null: bf16 where the processor has no
// such product.
AttentionFn attention_kernel(WeightKind values, Dtype dtype);

struct Sequence {
  int64_t begin;        // first packed token
  int64_t tokens;       // its tokens: keys first
  int64_t keys;         // attended tokens; 0: the output is zero
  const float* bias;    // [heads][...][bias_pitch], `bias_head` floats from head to head; null: none
  const float* factor;  // [heads]; null: ones. A head with a 0 is not computed, its output is zero
};

// x = code * step, or code * rows[token].
struct CodeScale {
  float step = 1.0f;
  const float* rows = nullptr;
};

// All heads of all sequences. Element (t, h, d) of q is q[t * q_pitch + h * q_head + d], and so on.
struct AttentionCall {
  const void *q, *k, *v;
  Dtype dtype;
  int64_t q_pitch, k_pitch, v_pitch, q_head, k_head, v_head;
  CodeScale q_scale, k_scale, v_scale;  // of s8
  const float* finite;                  // of each token: NaN where its q, k and v are, though codes; null: nowhere
  void* out;
  Dtype out_dtype;
  int64_t out_pitch, out_head;
  int64_t out_begin;  // the token of its row 0
  float out_step;     // of s8 and u8
  int32_t out_zero;
  float* out_finite;  // null, or of each token: set to NaN where its output is not finite and hence no code
  int64_t heads, head_dim;
  float scale;
  bool causal;
  const Sequence* sequences;
  int64_t sequence_count;
  int64_t bias_pitch, bias_head;
  const int32_t* positions;  // of each packed token in its sequence; null: consecutive
};

void attend(const AttentionCall& call, WeightKind values);
// The same to codes s8 [tokens][out_pitch] with scales[token], as quantize_row gives them for a row of all heads.
void attend_rows(const AttentionCall& call, WeightKind values, int64_t tokens, float* scales);
// Queries [q0, q1) of one head of one sequence, on the calling thread.
void attend_head(const AttentionCall& call, AttentionFn kernel, const Sequence& s, int64_t head, int64_t q0,
                 int64_t q1);

}  // namespace bertkern::cpu
