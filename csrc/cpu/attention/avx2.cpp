// AVX2: 6 x 16 fp32.
#include "cpu/attention/body.h"

BERTKERN_DEFINE_ATTENTION(f32, avx2, 6)
