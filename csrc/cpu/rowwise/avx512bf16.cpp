// AVX-512 BF16: the same with the processor's own rounding to bf16.
#include "cpu/rowwise/body.h"

BERTKERN_DEFINE_ROWS(avx512bf16)
