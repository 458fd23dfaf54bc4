// AVX-512 without VNNI: up to 14 x 32 fp32, one pass over a panel.
#include "cpu/gemm/tiles.h"

BERTKERN_DEFINE_TILES(f32, f32, avx512, 14)
BERTKERN_DEFINE_TILES(bf16, bf16, avx512, 12)
BERTKERN_DEFINE_TILES(madd, s8, avx512, 12)
