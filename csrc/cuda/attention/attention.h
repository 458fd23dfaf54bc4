// Attention over packed sequences on tensor cores: heads and tokens that do not exist are not computed.
//
// Sequence b is the tokens cu_seqlens[b] .. cu_seqlens[b + 1] of q, k and v [T][heads][head_dim]. For query i and key j
// of it, both counted from its first token, and head h, whose original number is n = numbers[h]:
//
//   s[i, j] = scale q_i . k_j + bias[b, n, i, j]       -inf where j >= key_counts[b], or causal and j > i
//   out_i   = factors[b, n] sum_j p[i, j] v_j          p[i, j] = exp(s[i, j] - m[i]) / l[i]
//
// A factor of 0 skips the head: it reads nothing and gives zeros, as does a query that sees no key. cu_seqlens stays on
// the card: grids are sized for sequences x max_length, and blocks past the end of their sequence leave. Whatever it
// says, nothing outside of the tensors is touched; cu_seqlens[0] counts as 0; tokens past max_length in their sequence,
// or in none, get zeros.
//
//   block         16 queries a warp, 4 or 8 warps, of one head of one sequence
//   shared        Q, then chunks of 64 keys (32 where heads are wider than 64), K and V of each: all of them where they
//                 fit in kResidentBytes, and after two barriers no warp waits for another; else two, in turns. Rows
//                 are padded by 16 bytes, which spreads the 8 rows that ldmatrix reads over all banks
//   rows          in pieces of 16 bytes, or of 4 (heads of 26) by cp.async; of 2 by ordinary loads, at odd widths.
//                 Features beyond head_dim, up to 16, 32, 64, 96 or 128, are zeros in shared memory
//   numerics      scores, softmax and sums are fp32, powers by ex2.approx (relative error 2^-22), p is rounded to v's
//                 type before it multiplies v; l sums it unrounded. Keys are summed from the sequence's first one on,
//                 in chunks that depend on head_dim alone: a sequence's bits are those that it has in any batch,
//                 whatever max_length, the number of warps and the place of K and V
//   statistics    what a backward pass needs, as kernels/attention.py has it: [2][heads][T], m and 1 / l; m in units of
//                 log2 without a bias, natural ones with it. 0 where a query sees no key; of skipped heads not written
//
// The floor. A head of L tokens costs 4 L^2 head_dim operations, L^2 powers and 8 L head_dim bytes. For 64 sequences of
// 384 tokens and 12 heads of 64 that is 29 GFLOP, 113 M powers and 151 MB: with mma.sync at some 600 TFLOP/s, 16 powers
// a clock and multiprocessor and 4.3 TB/s (132 multiprocessors at 1.75 GHz) 48, 31 and 35 us. A whole chunk of 16 x 64
// scores is 305 instructions for heads of 64, 4.8 for each of its 64 products (sm_80, sm_90a), of which 36 us would be
// enough to issue all. So the products bound a kernel, at 48 us, if powers and loads hide beneath them, which warps
// that are at different places make possible. No card has run it yet.
#pragma once

#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>

#include "cuda/types.h"

namespace bertkern::cuda {

struct AttentionParams {
  const void *q, *k, *v;                 // features of a head side by side, all else at any stride, in elements
  void* out;                             // [T][heads][head_dim]
  float* statistics;                     // or null
  int64_t q_t, q_h, k_t, k_h, v_t, v_h;  // from token to token, from head to head
  const int32_t* cu_seqlens;             // [sequences + 1]
  const int32_t* key_counts;             // [sequences], or null: all tokens are keys
  const int32_t* numbers;                // [heads], or null: 0, 1, 2, ...
  const float* factors;                  // by sequence and original head, or null: ones
  int64_t factors_b, factors_h;
  const void* bias;                // by sequence, original head, query; keys side by side; or null
  int64_t bias_b, bias_h, bias_q;  // 0 where one is for all
  Type type, bias_type;            // f32: of a bias alone
  int32_t tokens, heads, sequences, max_length, head_dim;  // head_dim 1 .. 128
  int32_t causal;
  float scale;     // above 0
  int32_t warps;   // 4 or 8; 0: by the number of blocks
  int32_t places;  // of chunks in shared memory: 2, or as many as max_length has; 0: by what fits
};

constexpr size_t kResidentBytes = 80 * 1024;  // two such blocks share a multiprocessor of sm_80 and sm_90

cudaError_t launch_attention(const AttentionParams& params, cudaStream_t stream);

}  // namespace bertkern::cuda
