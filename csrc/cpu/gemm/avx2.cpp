// AVX2: up to 6 x 16 fp32, two passes over a panel.
#include "cpu/gemm/tiles.h"

BERTKERN_DEFINE_TILES(f32, f32, avx2, 6)
BERTKERN_DEFINE_TILES(bf16, bf16, avx2, 4)
BERTKERN_DEFINE_TILES(madd, s8, avx2, 4)
