// Where packed weights live: one after another in chunks of huge pages. A single matrix of a BERT is smaller than a
// huge page, so pages of its own would stay small.
#pragma once

#include "cpu/check.h"

namespace bertkern::ops {

// A uint8 tensor of `bytes`, aligned to 64. A chunk is freed with the last tensor in it. On torch 2.10 pages are small.
Tensor empty_weights(int64_t bytes);

}  // namespace bertkern::ops
