// AMX: eight tiles of 16 rows x 64 bytes; tdpbusd and tdpbf16ps add the product of 16 rows of X and 16 features over 16
// dwords of K to 16 x 16 sums. Four tiles of sums, two of X and two of W: every load serves two products.
//
//   tile   0 1   sums of rows 0..15  x features 0..15, 16..31       4 5   X: rows 0..15, rows 16..31
//          2 3   sums of rows 16..31                                6 7   W: features 0..15, 16..31
//
// The compiler knows nothing of these registers: all that touches them is assembly here, between begin() and end().
#include "cpu/gemm/dot_vnni.h"
#include "cpu/gemm/tile.h"

namespace bertkern::cpu {
namespace {

constexpr int64_t kTileBytes = 64;

#define BK_TILE_LOAD(tile, from, pitch) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #tile : : "r"(from), "r"(static_cast<int64_t>(pitch)) : "memory")
#define BK_TILE_STORE(tile, to, pitch) \
  asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" : : "r"(to), "r"(static_cast<int64_t>(pitch)) : "memory")
#define BK_TILE_ZERO(tile) asm volatile("tilezero %tmm" #tile)

void begin() {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } const config;
  static_assert(sizeof config == 64, "as the processor reads it");
  asm volatile("ldtilecfg %0" : : "m"(config));
}

// Tiles in use cost every switch of threads 8 KiB.
void end() { asm volatile("tilerelease"); }

#define BK_PRODUCTS(name, opcode, dot)                                      \
  struct name {                                                             \
    using Dot = dot;                                                        \
    BK_INLINE void step0() { asm volatile(opcode " %tmm6, %tmm4, %tmm0"); } \
    BK_INLINE void step1() { asm volatile(opcode " %tmm7, %tmm4, %tmm1"); } \
    BK_INLINE void step2() { asm volatile(opcode " %tmm6, %tmm5, %tmm2"); } \
    BK_INLINE void step3() { asm volatile(opcode " %tmm7, %tmm5, %tmm3"); } \
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
    BK_TILE_LOAD(5, a + kMatrixDwords * kMatrixDwords, kTileBytes);
    Products::step2();
    Products::step3();
  }
}

template <class Products, bool kTwo>
BK_INLINE void products(const uint32_t* a, const uint32_t* b, int64_t kd, const TileOutput& o, uint32_t* sums) {
  BK_TILE_ZERO(0);
  BK_TILE_ZERO(1);
  if (kTwo) {
    BK_TILE_ZERO(2);
    BK_TILE_ZERO(3);
  }
  const char* ahead = o.ahead;
  int64_t k = 0;
  for (; k + kMatrixDwords <= kd; k += kMatrixDwords) {
    for (const char* const next = ahead + kMatrixDwords * o.ahead_step; ahead < next; ahead += 64)
      __builtin_prefetch(ahead, 0, 2);
    step<Products, kTwo>(a, b);
    a += kMatrixRows * kMatrixDwords, b += kMatrixDwords * kPanel;
  }
  if (k < kd) {  // the rest of the panel, and zeros
    alignas(64) uint32_t rest[kMatrixDwords * kPanel];
    for (int64_t i = 0; i < kMatrixDwords * kPanel; i += kWidth)
      vstorei(reinterpret_cast<int32_t*>(rest + i),
              i < (kd - k) * kPanel ? vloadi(reinterpret_cast<const int32_t*>(b + i)) : vseti(0));
    step<Products, kTwo>(a, rest);
  }
  BK_TILE_STORE(0, sums, kPanel * 4);
  BK_TILE_STORE(1, sums + kHalfPanel, kPanel * 4);
  if (kTwo) {
    BK_TILE_STORE(2, sums + kHalfPanel * kPanel, kPanel * 4);
    BK_TILE_STORE(3, sums + kHalfPanel * kPanel + kHalfPanel, kPanel * 4);
  }
}

// Rows [r, r + MR) of the sums, finished as those of any tile.
template <class Dot, int MR>
BK_INLINE void finish_rows(const uint32_t* sums, int64_t r, const TileOutput& tile) {
  TileOutput o = tile;
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
    for (int v = 0; v < kVectors; ++v) acc[i][v] += Dot::init(sums + (r + i) * kPanel + v * kWidth);
  finish<Dot, MR>(acc, 0, o);
}

template <class Products>
void matrix_tile(const uint32_t* a, int64_t mr, const uint32_t* b, int64_t kd, const TileOutput& o) {
  using Dot = typename Products::Dot;
  alignas(64) uint32_t sums[kMatrixRows * kPanel];
  if (mr > kHalfPanel)
    products<Products, true>(a, b, kd, o, sums);
  else
    products<Products, false>(a, b, kd, o, sums);
  int64_t r = 0;
  for (; r + 4 <= mr; r += 4) finish_rows<Dot, 4>(sums, r, o);
  for (; r < mr; ++r) finish_rows<Dot, 1>(sums, r, o);
}

}  // namespace

extern const MatrixKernels matrix_s8_amx, matrix_bf16_amx;
const MatrixKernels matrix_s8_amx = {&begin, &end, &matrix_tile<Products_s8>};
const MatrixKernels matrix_bf16_amx = {&begin, &end, &matrix_tile<Products_bf16>};

}  // namespace bertkern::cpu
