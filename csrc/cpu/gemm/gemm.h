// Dense GEMM with packed weights: Y[m, n] = epilogue(sum_k X[m, k] * W[n, k]).
//
// Every data type runs through one loop over dwords (32-bit groups along K):
//
//   type   a dword holds          one step of the dot product
//   s8     4 codes along K        acc(int32) += sum of 4 products u8 x s8     exact, never saturates
//   bf16   2 values along K       acc(fp32)  += 2 products
//   f32    1 value                acc(fp32)  += 1 product
//
//   W packed: panels of kPanel = 32 output features; a panel is [KD][32] dwords, KD = ceil(K / values per dword).
//             K and N tails are zeros. (s8 is ordered where there is no dot product of bytes, see below.)
//   X packed: tiles of up to max_mr rows; a tile of mr rows is [KD][mr] dwords. Where 16-bit products do the work
//             it is [KD][2][mr], bytes 0 and 2 of each dword as 16-bit numbers, then bytes 1 and 3; for ordered weights
//             (below) [KD][mr] dwords, and for low bits, of which some are ordered, both, one after the other.
//             Where the processor multiplies matrices (AMX) it is [KD / 16][kMatrixRows][16] dwords, KD rounded up to
//             16, zeros at the end: rows lie as they are, in pieces. For sparse weights it is [KD][kMatrixRows] there.
//   A tile kernel computes the sums of mr rows and 32 features and, for s8, makes floats of them: TileOutput.
//
// Where tiles are small (16 registers), every operand is read often, and the L2 of such processors may hold no whole
// panel: sums of fp32 kinds are carried over blocks of K, whose part of the panel stays there while all rows pass. The
// sums are the same: what a block leaves off with, the next one goes on from.
//
// Activations are unsigned codes u with a zero point z, weights signed: sum (u - z) w = sum u w - z sum w. The second
// term needs nothing but z of the activations: it is the `init` of the accumulators.
//
// Every output is summed along K in one accumulator, in an order that the packed weights fix, in every tile of one
// kernel: a row's result does not depend on the rows beside it. (int32 sums are exact, hence equal on all ISAs.)
//
// Where there is no dot product of bytes (AVX2, AVX-512 F), vpmaddubsw adds two products u8 x s8 in 16 bits, and
// saturates beyond them. Weights bound these sums, whatever the activations: P of them positive and Q negative ones
// give 255 Q to 255 P, which 16 bits hold up to P, -Q = kOrderBound. Hence kListed features together list the dwords
// of K, in three parts:
//
//   fours   two dwords at a time: 4 products (of both dwords' lower halves, and upper ones) stay in bounds
//   pairs   one dword: 2 products do
//   wide    one dword, whose bytes become 16-bit numbers: vpmaddwd adds in 32 bits
//
// An ordered list is [count] entries of kListed dwords and their index. Dense weights list every dword of K.
//
// Sparse weights list the dwords of K at which they are not zero, and nothing else is stored or read:
//
//   panels   a panel lists dwords where its features have a nonzero: those of both halves of 16 features, then of the
//            first half alone, of the second alone. Lanes are features, as in the dense tile. Where s8 is ordered,
//            every ordered list lists the dwords of its own features.
//   tokens   every R = 1, 2 or 4 features have a list of their own: [entry][R] dwords. Lanes are rows of X, which lie
//            in groups of kTokens: [KD][planes][kTokens]. Lists are cut where a multiple of token_block(R) dwords of K
//            begins: the rows of X that all lists use by turns stay in the L1 meanwhile.
//
// Weights of few bits (group-wise) are stored as bit planes and become the dwords of the dense panel, s8 or floats,
// when a panel's turn comes; then its tiles run as if it were dense:
//
//   block    8 dwords of K x 32 features of centred codes c = q - 2^(bits - 1): 16 vectors of 16 dwords, vector
//            v = 2 * dword + half. Each plane of the code's bits lies in vectors of 64 bytes:
//            4 bits: 8 vectors, vector j holds v = j + 8 i at bit 4 i; 2 bits: 4 vectors, v = j + 4 i at bit 2 i;
//            1 bit: 2 vectors, v = j + 2 i at bit i. From the lowest bits on: 2 = 2; 3 = 2 + 1; 4 = 4; 5 = 4 + 1;
//            6 = 4 + 2; 7 = 4 + 2 + 1; 8: 16 vectors as they are.
//   groups along N: a feature's scale and zero point stand in the epilogue, beside the sum of the row's codes.
//   groups along K: int32 sums of a group, made floats of and scaled into fp32 sums:
//            c[m, n] = init[n] + sum_g (S_g[m, n] * scale[g, n] + R_g[m] * zero[g, n]),  S_g int32 products,
//            R_g = sum of (u - z) over the group, zero[g, n] = -scale * (zero point - 2^(bits - 1)).
#pragma once

#include <stdint.h>

#include "cpu/isa.h"

namespace bertkern::cpu {

constexpr int64_t kPanel = 32, kHalfPanel = 16;
constexpr int kMaxRows = 14;
constexpr int64_t kTokens = 16;  // rows of X in a group where lanes are rows
constexpr int64_t token_block(int64_t features) { return features == 1 ? 192 : 384; }  // dwords of K

enum class WeightKind : int32_t { f32 = 0, bf16 = 1, s8 = 2 };

// y[m, n] = c[m, n]                                                   c = init[n] + sum over KD, fp32 kinds
// y[m, n] = float(c[m, n]) * (row_scale[m] * weight_scale[n]) + bias[n]   s8
//           (float(c[m, n]) - row_sum[m] * weight_zero[n]) * ...          where there is a zero point
//           c[m, n] * row_scale[m] + bias[n]                              groups along K
// y += residual[m, n]                                                 where there is one
struct TileOutput {
  const void* init;         // [32] int32 for s8, else fp32; null: zeros
  const int32_t* row_zero;  // s8: each row's zero point, times which `init` is taken away; null: `init` as it is
  const float* weight_scale;
  const float* weight_zero;  // null: none
  const float* row_sum;
  const float* bias;
  const float* row_scale;
  const float* residual;
  int64_t residual_pitch;
  void* out;  // fp32 or bf16; 32 columns of every row are written
  int64_t pitch;
  bool bf16;
  float* carry;          // fp32 kinds: [mr][32] sums of a block of K
  bool resume, suspend;  // whether sums begin with `carry`, and end there instead of in `out`
  const char* ahead;     // fetched into the L2 cache meanwhile, `ahead_step` <= 64 bytes a step of KD
  int64_t ahead_step;
};

constexpr int32_t kOrderBound = 128;
constexpr int64_t kListed = 8;  // features that share a list in packed weights: more of them, more dwords are wide
constexpr int64_t kMostLists = kPanel / kListed;
constexpr int64_t kMostOrdered = 8192;  // dwords of K: sums of more could overflow int32 in any case
struct OrderedList {
  const uint16_t* index;    // [count]: a dword of K each
  const uint32_t* weights;  // [count] entries, `step` dwords apart
  int64_t step;
  int64_t count, fours, wide;  // dwords: all, those in fours, an even number, and wide ones, the last of them
};
struct PanelOrder {
  OrderedList list[kMostLists];  // [32 / features]
  int64_t features;              // that share a list: kListed, or `ordered` of the tiles
};

using TileFn = void (*)(const uint32_t* a, int64_t lda, const uint32_t* b, int64_t kd, const TileOutput& output);

using OrderedTileFn = void (*)(const uint32_t* a, int64_t lda, const PanelOrder& order, const TileOutput& output);

struct SparsePanel {
  const uint32_t* index;    // [both + half[0] + half[1]], ascending within each of the three
  const uint32_t* weights;  // [both][32], [half[0]][16], [half[1]][16] dwords
  int64_t both, half[2];
};

using SparseTileFn = void (*)(const uint32_t* a, int64_t lda, const SparsePanel& b, const TileOutput& output);

struct TokenPanel {       // of one block of K
  const uint32_t* begin;  // [32 / R + 1]: where each list begins, and the last one ends
  const uint16_t* index;
  const uint32_t* weights;  // [entry][R]
};

// sums[n][row] = init[n] + the dot products over a block, for `groups` groups of kTokens rows, `group_dwords` apart;
// with null for init sums[n][row] += them. Sums are int32 (s8) or fp32.
using TokensFn = void (*)(const uint32_t* a, int64_t group_dwords, int64_t groups, const TokenPanel& b,
                          const void* init, uint32_t* sums, int64_t pitch);
// What TileOutput says, for up to kTokens rows of fp32: the sums, made floats of and transposed. No residual.
using FinishTokensFn = void (*)(const uint32_t* sums, int64_t pitch, int64_t rows, const TileOutput& output);

// A run of K with one scale a feature.
struct Group {
  uint32_t first, count;  // dwords of the s8 operand
  uint32_t k, length;     // elements of K
  uint32_t bits;          // groups along K; along N the panel has them
};

// Groups along K of one panel.
struct GroupPanel {
  const Group* groups;
  int64_t count;
  const float* scale;  // [count][32]
  const float* zero;
  const float* row_sum;  // [count][row_sum_pitch]
  int64_t row_sum_pitch;
};

using GroupTileFn = void (*)(const uint32_t* a, int64_t lda, const uint32_t* b, const GroupPanel& groups,
                             const TileOutput& output);
// Blocks of planes -> dwords [8 * blocks][32] of centred codes.
using DecodeFn = void (*)(int bits, const uint32_t* planes, int64_t blocks, uint32_t* codes);
// Centred codes of one group, from its first dword on, -> rows of K: values [length][32] = (c - zero) * scale.
using DequantizeFn = void (*)(const uint32_t* codes, int64_t length, const float* scale, const float* zero,
                              float* values);

// The same sums straight from the planes of 2 to 7 bits, for few rows, which wait for memory. Codes are not centred
// here: `shift` takes the middle away, -2^(bits - 1) * (sum of the row's codes less their zero point), [rows] or
// [groups][rows]; `init` of groups along N is that of codes that are not centred. Groups along K: whole blocks.
using NarrowTileFn = void (*)(const uint32_t* a, int64_t lda, const uint32_t* planes, int64_t dwords,
                              const int32_t* shift, const TileOutput& output);
using NarrowGroupTileFn = void (*)(const uint32_t* a, int64_t lda, const uint32_t* planes, const GroupPanel& groups,
                                   const int32_t* shift, const TileOutput& output);

// The sums of up to kMatrixRows rows of X, as they lie for the matrix unit, and 32 features. They come to memory, and
// are finished there while the unit multiplies the next tile: what a tile kernel gives, and `rows_done` for every few
// rows of it.
constexpr int64_t kMatrixRows = 32, kMatrixDwords = 16;
struct MatrixTile {
  uint32_t* sums;  // [kMatrixRows][32]
  bool turned;     // features are the rows of `sums`, and rows of X its columns
  char* rows;      // of Y, `rows_pitch` bytes apart: another core may have them, so they are asked for early
  int64_t rows_pitch;
  int64_t mr;
  TileOutput output;
  void (*rows_done)(void* context, int64_t r, int64_t rows);  // null: none
  void* context;
};
// The sums of `tile`; `before`: to be finished meanwhile, or null. `ahead_bytes` from `ahead` on are fetched into the
// L2.
using MatrixTileFn = void (*)(const uint32_t* a, const uint32_t* b, int64_t kd, const char* ahead, int64_t ahead_bytes,
                              const MatrixTile& tile, const MatrixTile* before);
// Lists of a sparse panel for the unit: features are rows and listed dwords of K columns, 16 x 16 of them together, the
// last ones of a list zeros. X lies as [KD][kMatrixRows]: a tile of its listed dwords is gathered in whole vectors.
struct SparseMatrixPanel {
  SparsePanel lists;
  const uint32_t* tiles;  // [both / 16][2][16][16], [half[0] / 16][16][16], [half[1] / 16][16][16]
};
using TurnListsFn = void (*)(const SparsePanel& lists, uint32_t* tiles);
static inline int64_t list_tile_dwords(const SparsePanel& lists) {
  const auto tiles = [](int64_t count) { return (count + kMatrixDwords - 1) / kMatrixDwords; };
  return (2 * tiles(lists.both) + tiles(lists.half[0]) + tiles(lists.half[1])) * kHalfPanel * kMatrixDwords;
}
// As MatrixTileFn, but for sums that are turned.
using SparseMatrixTileFn = void (*)(const uint32_t* a, const SparseMatrixPanel& b, const char* ahead,
                                    int64_t ahead_bytes, const MatrixTile& tile, const MatrixTile* before);
// All calls of a thread stand between begin() and end(), which give it the unit and take it away.
struct MatrixKernels {
  void (*begin)();
  void (*end)();
  MatrixTileFn tile;
  TurnListsFn turn_lists;  // null, as sparse_tile: sparse weights are not for this unit
  SparseMatrixTileFn sparse_tile;
  void (*finish)(const MatrixTile& tile);
};

constexpr int64_t kBlockDwords = 8;
constexpr int kNarrowBits = 7;      // at most
constexpr int kNarrowTiles = 3;     // of 1, 2 and 4 rows
constexpr int64_t kNarrowRows = 8;  // in all, at most
constexpr int kGroupRows = 6;       // at most, of a group tile

struct TileKernels {
  int max_mr;
  int64_t pitch;                           // of X, rows of a group
  int64_t k_block;                         // dwords of K that sums of fp32 kinds are carried over; 0: K is one block
  int planes;                              // of X, beside the dwords that ordered tiles take
  TileFn tile[kMaxRows + 1];               // by mr; [0] is null
  SparseTileFn sparse_tile[kMaxRows + 1];  // by mr; [0] is null
  TokensFn tokens[3];                      // R = 1, 2, 4
  FinishTokensFn finish_tokens;
  int ordered;  // features of a vector, which can share a list as those of kListed do; 0: this kernel takes none
  int ordered_mr;
  OrderedTileFn ordered_tile[kMaxRows + 1];  // by mr; [0] is null
  int group_mr;                              // s8 alone has these
  GroupTileFn group_tile[kGroupRows + 1];
  DecodeFn decode;
  DequantizeFn dequantize;
  NarrowTileFn narrow_tile[kNarrowBits + 1][kNarrowTiles];  // by bits, by the logarithm of the rows
  NarrowGroupTileFn narrow_group_tile[kNarrowBits + 1][kNarrowTiles];
};

const TileKernels& tile_kernels(WeightKind kind);           // of active_isa()
const TileKernels* tile_kernels(WeightKind kind, Isa isa);  // null where kernels.inc has no such row
const MatrixKernels* matrix_kernels(WeightKind kind);       // null where active_isa() has no matrix unit

}  // namespace bertkern::cpu
