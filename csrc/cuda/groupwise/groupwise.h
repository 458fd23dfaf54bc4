// A linear layer of group-wise low-bit weights for few tokens, on tensor cores (mma.sync), bound by the weights' bytes.
//
//   y[t, n] = activation(sum_g (scale[g, n] * sum_{k in g} c[n, k] x[t, k] - shift[g, n] * R[g, t]) + bias[n])
//             + residual[t, n],    R[g, t] = sum of x[t, k] over the columns of group g
//
// x fp16 or bf16; c = code - 2^(bits - 1), a small whole number that both hold exactly; scale and shift fp32, so that
// no weight is rounded. Groups are runs of columns (along K, scale and shift [G][n]) or there is one (along N, [1][n]).
//
// Codes are in the planes of bertkern/ops/groupwise_planes.py, which kernels/groupwise.py describes. A part of b bits
// has a plane of 8, 4 or 2 bits (b = 8, 4, 2), or one of 2 and then one of 1 (b = 3). Of a plane of p bits, with P
// features (filled up to 128) and S strips (of 32 columns; a multiple of 4; each group begins one):
//
//   plane [ceil(S p / 8)][P][32]    byte (i, n, j): bits p r .. p r + p - 1 are of the code (n, strip i * 8 / p + r, j)
//
// so a feature's tile i is 32 bytes, 16 features' tile 512 bytes in a run: a warp copies it by one cp.async of 16 bytes
// a lane. Lane 4 g + q of a warp then reads bytes 8 q .. 8 q + 7 of features g and g + 8. Shifted and masked, a word
// gives the codes of bytes 0 and 2, and of 1 and 3, in the low bits of two 16-bit halves: or'ed into the mantissa of
// 1024 (fp16) or 128 (bf16) they are numbers, and one fma makes c of them. Within a strip the order of the columns is
// free, as long as x comes in the same: lane 4 g + q takes x[g][32 s + 8 q .. + 7], 16 bytes, from global memory.
//
// A thread block of 8 warps computes 16 or 32 features x 8 tokens, or 32 x 16. Its warps share the columns: warp w
// takes the steps w, w + 8, ... of 4 strips (8 for 3 bits), behind a ring of stages of its own, without a barrier; then
// the 8 sums are added in the order of the warps. Where that leaves a GPU empty (few features, long rows) `splits`
// thread blocks share the columns too, or several parts (features or groups of other bits) are launched one after the
// other: each leaves its sums in a slot of `partial`, and launch_add_in_order adds the slots in order.
//
// Numerics: which columns a warp sums depends on n, k, bits and groups alone, never on the tokens: a row's result does
// not depend on what stands beside it, and is the same at every run. The order differs from that of
// kernels/groupwise.py.
//
// Floors: n k bits / 8 bytes of codes and 8 n G (4 n G without shift) of scales from memory, once for every 16 tokens;
// each thread block reads x, T k * 2 bytes, from L2. Decoding takes about 2 instructions for two codes.
#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

#include "cuda/finish.h"

namespace bertkern::cuda {

struct Groupwise {
  const void* x;         // [tokens][x_stride] fp16 or bf16
  const uint8_t* codes;  // the part's planes, aligned to 16 bytes
  const int* members;    // the part's features (along N) or groups (along K); null: all
  const float* scale;    // [G][n], along N [1][n]
  const float* shift;    // of scale's shape, or null: 0
  const float* bias;     // [n] or null
  const void* residual;  // [tokens][residual_stride] or null
  void* y;               // [tokens][y_stride]
  float* partial;        // [slots][tokens][n]; null where there is one slot, which then is y itself
  int64_t x_stride, residual_stride, y_stride;  // elements
  int tokens, n, k;
  int features;  // of the part
  int held;      // groups of the part, along K
  int group;     // columns of a group; 0: along N
  int bits, strips;
  int splits, slot;  // thread blocks that share the columns; the first one's slot
  bool bf16;         // x's type
  Type residual_type, y_type;
  Activation activation;
};

inline bool groupwise_supported(int bits) { return bits == 2 || bits == 3 || bits == 4 || bits == 8; }

// Thread blocks that share the columns of a layer, by its shape alone: 1 unless there are fewer than 512 features, up
// to 4 of at least 2,048 columns.
int groupwise_splits(int n, int strips);

// One part. tile_tokens: 8 or 16, which changes no bit; 0: by the number of tokens.
cudaError_t launch_groupwise(const Groupwise& p, cudaStream_t stream, int tile_tokens = 0);

// y = activation(partial[0] + partial[1] + ... + bias) + residual.
cudaError_t launch_add_in_order(const Groupwise& p, int slots, cudaStream_t stream);

}  // namespace bertkern::cuda
