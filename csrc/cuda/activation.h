// The activations of epilogues, numbered as in csrc/cpu/rowwise/rowwise.h.
#pragma once

#include "cuda/ptx.h"

namespace bertkern::cuda {

enum class Activation : int32_t { none = 0, gelu = 1, gelu_tanh = 2, relu = 3, tanh = 4, silu = 5 };
constexpr int32_t kActivations = 6;

// NaN stays NaN. erff and tanhf are CUDA's, within 2 units in the last place; the others' errors stay below 4e-7 of
// max(1, |x|).
BK_DEVICE float activate(float x, Activation activation) {
  switch (activation) {
    case Activation::gelu:
      return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    case Activation::gelu_tanh: {
      const float inner = x * fma_rn(x * x, 2.0f * 0.79788456080286536f * 0.044715f, 2.0f * 0.79788456080286536f);
      return div_rn(x, 1.0f + expf(-inner));
    }
    case Activation::relu:
      return x < 0.0f ? 0.0f : x;
    case Activation::tanh:
      return tanhf(x);
    case Activation::silu:
      return div_rn(x, 1.0f + expf(-x));
    default:
      return x;
  }
}

}  // namespace bertkern::cuda
