// A whole post-LayerNorm encoder (BERT and its relatives) over packed tokens, layer by layer:
//
//   c = factor softmax(q k^T / sqrt(d) + bias) v      q, k, v = x Wq^T + bq, ...      per head of each sequence
//   y = LayerNorm(c Wo^T + bo + x)
//   x = LayerNorm(act(y W1^T + b1) W2^T + b2 + y)
//
// Hidden states are fp32 between the layers. Many tokens: a task takes a block of rows from the attention's output to
// the next layer's q, k, v, all in its L2. Few tokens: each product's columns are split, so that weights are read once.
// Both ways give every element the same operations in the same order, hence the same bits.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/attention/attention.h"
#include "cpu/gemm/linear.h"

namespace bertkern::cpu {

struct EncoderLayer {
  Linear q, k, v, o, ffn1, ffn2;
  const float* norms;  // [4][hidden]: attention gamma, beta, output gamma, beta
  int64_t heads;
};

struct EncoderCall {
  const EncoderLayer* layers;
  int64_t layer_count;
  int64_t hidden;
  Activation activation;
  float eps;
  const Sequence* sequences;
  int64_t sequence_count;
  int64_t sequences_pitch;  // from those of a layer to those of the next; 0: the same
  int64_t tokens;
  const int32_t* positions;  // of each packed token in its sequence; null: consecutive
  int64_t bias_length;
  bool exact_attention;  // in fp32, even where the layer is not that exact itself
  float* x;              // [tokens][hidden], in and out
  // After each layer, on the calling thread: x holds its output.
  void (*layer_done)(void* context, int64_t layer, const float* x);
  void* context;
};

void encode(const EncoderCall& call);

}  // namespace bertkern::cpu
