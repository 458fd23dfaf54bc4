// Any processor: GNU vectors of four lanes.
#include "cpu/attention/body.h"

BERTKERN_DEFINE_ATTENTION(f32, portable, 4)
