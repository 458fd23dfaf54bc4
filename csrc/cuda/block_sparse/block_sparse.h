// A linear layer whose weight is a grid of blocks of which some are kept, on tensor cores (mma.sync).
//
//   y[t, n] = activation(sum over kept blocks of x[t, k] w[n, k] + bias[n]) + residual[t, n]
//
// and for int8 operands, x = (a - x_zero[t]) * x_scale[t] and w = code * weight_scale[n],
//
//   sum = (sum of a code - x_zero[t] * column_sum[n]) * (x_scale[t] * weight_scale[n]),  column_sum[n] = sum of code
//
// The weight is in block-sparse rows (bertkern/formats/bsr.py): values [nnzb][br][bc], full blocks in the order of
// (block row, block column), zero where they reach over the edge of W; crow [ceil(n / br) + 1], col [nnzb], int32. br
// and bc are 32, 64 or 128 each.
//
// A thread block computes 32 or 128 tokens x the br features of a block row. The kept blocks of the row, side by side,
// are one sum of kept * bc products: it is taken in steps of 128 bytes, whatever bc is, behind a ring of 3 or 4 stages
// in shared memory that cp.async fills 16 bytes at a time. What is not kept is never read: its 0 x Inf is 0. A block
// row without blocks gives activation(bias) + residual.
//
// Numerics: products are summed in fp32 (int32 for int8, which wraps) in the order of the list, 16 (32) by 16 (32), by
// the same instruction in every tile: a row's result depends neither on the number of tokens nor on its neighbours. An
// int8 sum is rounded to fp32 once.
//
// Floors, for d kept blocks of N K elements of b bytes, T tokens: 2 d br bc T operations on tensor cores; d br bc b
// bytes of weights, T K b of activations and T N of the result from memory once. L2 gives each block row its columns of
// x: d bc T b, and the weights once for every 128 tokens (32 where there are few).
//
// Limits: x begins, and its rows, at multiples of 16 bytes; n, k and tokens are any. crow and col are trusted: whoever
// made them has checked them.
#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

#include "cuda/finish.h"

namespace bertkern::cuda {

enum class Operand : int { f16, bf16, s8 };

struct BlockSparse {
  const void* x;  // [tokens][x_stride]
  const void* values;
  const int* crow;
  const int* col;
  const void* bias;      // [n] or null
  const void* residual;  // [tokens][residual_stride] or null
  void* y;               // [tokens][y_stride]
  // Of int8 operands alone.
  const float* x_scale;       // [tokens]
  const int* x_zero;          // [tokens] or null: 0
  const float* weight_scale;  // [n]
  const int* column_sum;      // [n], beside x_zero
  const int* live;            // how many of the tokens are there; the others' results are not written; null: all
  int64_t x_stride, residual_stride, y_stride;  // elements
  int tokens, n, k, block_rows, block_columns;
  Operand operand;
  Type bias_type, residual_type, y_type;
  Activation activation;
};

// Whether there is a kernel for blocks of this shape.
inline bool block_sparse_supported(int block_rows, int block_columns) {
  const auto side = [](int size) { return size == 32 || size == 64 || size == 128; };
  return side(block_rows) && side(block_columns);
}

// tile_tokens: 32 or 128, which changes no bit; 0: by the size.
cudaError_t launch_block_sparse(const BlockSparse& p, cudaStream_t stream, int tile_tokens = 0);

}  // namespace bertkern::cuda
