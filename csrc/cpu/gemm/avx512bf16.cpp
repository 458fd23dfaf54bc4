// AVX-512 BF16: two products a lane and step. int8 is here once more because its tile rounds to bf16.
#include "cpu/gemm/dot_bf16.h"
#include "cpu/gemm/dot_vnni.h"
#include "cpu/gemm/tiles.h"

BERTKERN_DEFINE_TILES(dpbf16, bf16, avx512bf16, 14)
BERTKERN_DEFINE_TILES(vnni, s8, avx512bf16, 14)
