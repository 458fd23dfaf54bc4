// AVX-512 VNNI.
#include "cpu/gemm/dot_vnni.h"
#include "cpu/gemm/tiles.h"

BERTKERN_DEFINE_TILES(vnni, s8, avx512vnni, 14)
