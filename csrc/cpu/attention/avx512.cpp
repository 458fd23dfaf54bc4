// AVX-512: 14 x 32 fp32.
#include "cpu/attention/body.h"

BERTKERN_DEFINE_ATTENTION(f32, avx512, 14)
