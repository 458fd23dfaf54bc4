// Four tiles of sums, two of X and two of W: every load serves two products.
//
//   tile   0 1   sums of rows 0..15  x features 0..15, 16..31       4 5   X: rows 0..15, rows 16..31
//          2 3   sums of rows 16..31                                6 7   W: features 0..15, 16..31
//
// A product of tiles takes the unit 16 cycles in which the rest of the core is free: the rows of the tile before are
// finished meanwhile, some at each step.
#include "cpu/amx.h"
#include "cpu/gemm/dot_vnni.h"
#include "cpu/gemm/tile.h"

namespace bertkern::cpu {
namespace {

#define BK_PRODUCTS(name, opcode, dot)                                \
  struct name {                                                       \
    using Dot = dot;                                                  \
    BK_INLINE void step0() { BK_TILE_PRODUCT(opcode, 0, 4, 6); }      \
    BK_INLINE void step1() { BK_TILE_PRODUCT(opcode, 1, 4, 7); }      \
    BK_INLINE void step2() { BK_TILE_PRODUCT(opcode, 2, 5, 6); }      \
    BK_INLINE void step3() { BK_TILE_PRODUCT(opcode, 3, 5, 7); }      \
  }
BK_PRODUCTS(Products_s8, "tdpbusd", Dot_vnni);
BK_PRODUCTS(Products_bf16, "tdpbf16ps", Dot_f32);

// 16 dwords of K.
template <class Products, bool kTwo>
BK_INLINE void step(const uint32_t* a, const uint32_t* b) {
  BK_TILE_LOAD(6, b, kPanel * 4);
  BK_TILE_LOAD(4, a, kTileBytes);
  Products::step0();
  BK_TILE_LOAD(7, b + kHalfPanel, kPanel * 4);
  Products::step1();
  if (kTwo) {
    BK_TILE_LOAD(5, a + kTileRows * kMatrixDwords, kTileBytes);
    Products::step2();
    Products::step3();
  }
}

// Rows [r, r + MR) of the sums, finished as those of any tile.
template <class Dot, int MR>
void finish_rows(const MatrixTile& tile, int64_t r) {
  TileOutput o = tile.output;
  if (o.row_zero) o.row_zero += r;
  if (o.row_sum) o.row_sum += r;
  if (o.row_scale) o.row_scale += r;
  if (o.residual) o.residual += r * o.residual_pitch;
  o.out = static_cast<char*>(o.out) + r * o.pitch * (o.bf16 ? 2 : 4);
  typename Dot::Acc acc[MR][kVectors];
  start<Dot, MR>(acc, 0, o);
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) acc[i][v] += Dot::init(tile.sums + (r + i) * kPanel + v * kWidth);
  finish<Dot, MR>(acc, 0, o);
  if (tile.rows_done) tile.rows_done(tile.context, r, MR);
}

constexpr int64_t kFinished = 8;  // rows at a time

// What remains to be done to a tile: nothing, where there is none.
template <class Dot>
struct Remaining {
  const MatrixTile* tile;
  int64_t done = 0;

  inline void some() {
    if (tile && done + kFinished <= tile->mr) finish_rows<Dot, kFinished>(*tile, done), done += kFinished;
  }
  inline void all() {
    if (!tile) return;
    for (; done + kFinished <= tile->mr; done += kFinished) finish_rows<Dot, kFinished>(*tile, done);
    for (; done < tile->mr; ++done) finish_rows<Dot, 1>(*tile, done);
  }
};

template <class Products, bool kTwo>
BK_INLINE void products(const uint32_t* a, const uint32_t* b, int64_t kd, const char* ahead, int64_t ahead_bytes,
                        uint32_t* sums, const MatrixTile* before) {
  Remaining<typename Products::Dot> remaining{before};
  const int64_t steps = (kd + kMatrixDwords - 1) / kMatrixDwords;
  const int64_t fetched = steps ? (ahead_bytes + steps - 1) / steps : 0;
  // Rows of the tile before, evenly over the steps.
  const int64_t every = steps * kFinished < kMatrixRows ? 1 : steps * kFinished / kMatrixRows;
  BK_TILE_ZERO(0);
  BK_TILE_ZERO(1);
  if (kTwo) {
    BK_TILE_ZERO(2);
    BK_TILE_ZERO(3);
  }
  int64_t k = 0, turn = every;
  for (; k + kMatrixDwords <= kd; k += kMatrixDwords) {
    for (const char* const next = ahead + fetched; ahead < next; ahead += 64) __builtin_prefetch(ahead, 0, 2);
    step<Products, kTwo>(a, b);
    a += kMatrixRows * kMatrixDwords, b += kMatrixDwords * kPanel;
    if (--turn == 0) remaining.some(), turn = every;
  }
  if (k < kd) {  // the rest of the panel, and zeros
    alignas(64) uint32_t rest[kMatrixDwords * kPanel];
    for (int64_t i = 0; i < kMatrixDwords * kPanel; i += kWidth)
      vstorei(reinterpret_cast<int32_t*>(rest + i),
              i < (kd - k) * kPanel ? vloadi(reinterpret_cast<const int32_t*>(b + i)) : vseti(0));
    step<Products, kTwo>(a, rest);
  }
  remaining.all();
  BK_TILE_STORE(0, sums, kPanel * 4);
  BK_TILE_STORE(1, sums + kHalfPanel, kPanel * 4);
  if (kTwo) {
    BK_TILE_STORE(2, sums + kHalfPanel * kPanel, kPanel * 4);
    BK_TILE_STORE(3, sums + kHalfPanel * kPanel + kHalfPanel, kPanel * 4);
  }
}

template <class Products>
void matrix_tile(const uint32_t* a, int64_t mr, const uint32_t* b, int64_t kd, const char* ahead, int64_t ahead_bytes,
                 uint32_t* sums, const MatrixTile* before) {
  if (mr > kTileRows)
    products<Products, true>(a, b, kd, ahead, ahead_bytes, sums, before);
  else
    products<Products, false>(a, b, kd, ahead, ahead_bytes, sums, before);
}

template <class Products>
void finish_tile(const MatrixTile& tile) {
  Remaining<typename Products::Dot>{&tile}.all();
}

}  // namespace

extern const MatrixKernels matrix_s8_amx, matrix_bf16_amx;
const MatrixKernels matrix_s8_amx = {&begin_tiles, &end_tiles, &matrix_tile<Products_s8>, &finish_tile<Products_s8>};
const MatrixKernels matrix_bf16_amx = {&begin_tiles, &end_tiles, &matrix_tile<Products_bf16>,
                                       &finish_tile<Products_bf16>};

}  // namespace bertkern::cpu
