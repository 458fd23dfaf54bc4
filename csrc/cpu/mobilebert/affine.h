// affine_row   out[i] = x[i] * gamma[i] + beta[i], which MobileBERT has for a norm
#pragma once

#include <stdint.h>

namespace bertkern::cpu {

using AffineFn = void (*)(const float* x, int64_t n, const float* gamma, const float* beta, float* out);

AffineFn affine_row();  // of active_isa()

}  // namespace bertkern::cpu
