#include "cpu/mobilebert/body.h"

BERTKERN_DEFINE_AFFINE(avx512)
