// AMX: eight tiles of 16 rows x 64 bytes, and products of them that are added to a third:
//
//   tdpbusd     c[i][j] += sum of 4 products u8 x s8       a: 16 rows of X, 16 dwords of K each
//   tdpbsud     the same of s8 x u8, tdpbssd of s8 x s8     b: 16 dwords of K, 16 columns each
//   tdpbf16ps   c[i][j] += 2 products of bf16              c: 16 x 16 sums
//
// The compiler knows nothing of these registers: all that touches them is assembly, between begin_tiles() and
// end_tiles(). Whatever memory a tile is loaded from was written before: the clobbers order both.
#pragma once

#include "cpu/simd.h"

namespace bertkern::cpu {
namespace {

constexpr int64_t kTileRows = 16, kTileDwords = 16, kTileBytes = 64;

#define BK_TILE_LOAD(tile, from, pitch) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #tile : : "r"(from), "r"(static_cast<int64_t>(pitch)) : "memory")
#define BK_TILE_STORE(tile, to, pitch) \
  asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" : : "r"(to), "r"(static_cast<int64_t>(pitch)) : "memory")
#define BK_TILE_ZERO(tile) asm volatile("tilezero %tmm" #tile)
#define BK_TILE_PRODUCT(opcode, c, a, b) asm volatile(opcode " %tmm" #b ", %tmm" #a ", %tmm" #c)

// Two by two tiles of sums: 0 1 of rows 4, 2 3 of rows 5, by columns 6 and 7.
#define BK_TILE_PRODUCTS(name, opcode)                           \
  struct name {                                                  \
    BK_INLINE void step0() { BK_TILE_PRODUCT(opcode, 0, 4, 6); } \
    BK_INLINE void step1() { BK_TILE_PRODUCT(opcode, 1, 4, 7); } \
    BK_INLINE void step2() { BK_TILE_PRODUCT(opcode, 2, 5, 6); } \
    BK_INLINE void step3() { BK_TILE_PRODUCT(opcode, 3, 5, 7); } \
  }
BK_TILE_PRODUCTS(Products_u8s8, "tdpbusd");
BK_TILE_PRODUCTS(Products_s8u8, "tdpbsud");
BK_TILE_PRODUCTS(Products_s8s8, "tdpbssd");
BK_TILE_PRODUCTS(Products_bf16, "tdpbf16ps");

void begin_tiles() {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } const config;
  static_assert(sizeof config == 64, "as the processor reads it");
  asm volatile("ldtilecfg %0" : : "m"(config));
}

// Tiles in use cost every switch of threads 8 KiB.
void end_tiles() { asm volatile("tilerelease"); }

}  // namespace
}  // namespace bertkern::cpu
