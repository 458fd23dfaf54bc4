// Element types of tensors whose type is known at run time alone, of all kernels.
#pragma once

#include <stdint.h>

namespace bertkern::cuda {

enum class Type : int32_t { f32 = 0, bf16 = 1, f16 = 2, s8 = 3, u8 = 4 };

}  // namespace bertkern::cuda
