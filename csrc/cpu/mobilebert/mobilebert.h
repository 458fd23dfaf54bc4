// A whole MobileBERT encoder over packed tokens (arXiv 2004.02984), layer by layer. x has H features, a has W:
//
//   a = N(x Win^T + bin)                              without bottlenecks: a = x, W = H
//   s = N(x Wsh^T + bsh)                              only where queries and keys share a bottleneck
//   c = softmax(q k^T / sqrt(d)) v                    q, k, v of s, s, x; of x, x, x; or of a, a, a
//   a = N(c Wo^T + bo + a)
//   a = N(act(a W1^T + b1) W2^T + b2 + a)             F times, each with weights of its own
//   x = N(a Wout^T + bout + x)                        without bottlenecks: x = a
//
// Each N is another norm: y = x * gamma + beta (NoNorm), or LayerNorm. Hidden states are fp32 between the layers. A
// task takes a block of rows from the attention's output to the next layer's q, k, v, however few the rows: the
// matrices are small, and to split their columns would take a dozen stages a layer. A row's bits depend on no other
// row.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/attention/attention.h"
#include "cpu/gemm/linear.h"
#include "cpu/mobilebert/affine.h"

namespace bertkern::cpu {

// What bottlenecks there are before the attention, and what q, k, v are made of.
enum class Bottleneck : int32_t { none = 0, input = 1, shared = 2, all = 3 };  // of x, x, x; s, s, x; a, a, a
constexpr int32_t kBottlenecks = 4;

struct MobileLayer {
  Linear input, shared, q, k, v, o, out;
  std::vector<Linear> ffn;  // up, down, up, down, ...
  const float* norms;       // gamma and beta of each, in the order of the formulas
  int64_t heads;
};

struct MobileCall {
  const MobileLayer* layers;
  int64_t layer_count;
  int64_t hidden, width;  // H, W
  Bottleneck bottleneck;
  Activation activation;
  const float* eps;  // of each of a layer's norms; null: NoNorm
  const Sequence* sequences;
  int64_t sequences_pitch;  // from those of a layer to those of the next; 0: the same
  int64_t sequence_count;
  int64_t tokens;
  const int32_t* positions;  // of each packed token in its sequence; null: consecutive
  int64_t bias_length;
  bool exact_attention;
  float* x;  // [tokens][hidden], in and out
  // After each layer, on the calling thread: x holds its output.
  void (*layer_done)(void* context, int64_t layer, const float* x);
  void* context;
};

void encode(const MobileCall& call);

// Rows of fp32 as the operand of a product, on the calling thread and valid until its next call.
Rows pack_block(const Linear& linear, const float* x, int64_t pitch, int64_t rows);
// N over one row of n; eps: null for NoNorm.
void norm_row(const float* x, int64_t n, const float* gamma_beta, const float* eps, float* out);

}  // namespace bertkern::cpu
