// The activations of epilogues, numbered as in csrc/cpu/rowwise/rowwise.h.
#pragma once

#include "cuda/ptx.h"

namespace bertkern::cuda {

enum class Activation : int32_t { none = 0, gelu = 1, gelu_tanh = 2, relu = 3, tanh = 4, silu = 5 };
constexpr int32_t kActivations = 6;

BK_DEVICE float exp_approx(float x) { return exp2_approx(x * 1.4426950408889634f); }

// Within 3e-7.
BK_DEVICE float tanh_approx(float x) {
  const float e = exp_approx(-2.0f * fabsf(x));
  const float size = div_full(1.0f - e, 1.0f + e);
  return x < 0.0f ? -size : size;
}

// x / (1 + e^-t)
BK_DEVICE float gated(float x, float t) { return div_full(x, 1.0f + exp_approx(-t)); }

// x of N numbers in place; the branch is taken once for all of them. NaN stays NaN. erff is CUDA's, within 2 units in
// the last place; the others' errors stay below 1e-6 of max(1, |x|).
template <int N>
BK_DEVICE void activate(float (&x)[N], Activation activation) {
  switch (activation) {
    case Activation::gelu:
      BK_UNROLL
      for (int i = 0; i < N; ++i) x[i] = 0.5f * x[i] * (1.0f + erff(x[i] * 0.70710678118654752f));
      break;
    case Activation::gelu_tanh:
      BK_UNROLL
      for (int i = 0; i < N; ++i)
        x[i] = gated(x[i],
                     x[i] * fma_rn(x[i] * x[i], 2.0f * 0.79788456080286536f * 0.044715f, 2.0f * 0.79788456080286536f));
      break;
    case Activation::relu:
      BK_UNROLL
      for (int i = 0; i < N; ++i) x[i] = x[i] < 0.0f ? 0.0f : x[i];
      break;
    case Activation::tanh:
      BK_UNROLL
      for (int i = 0; i < N; ++i) x[i] = tanh_approx(x[i]);
      break;
    case Activation::silu:
      BK_UNROLL
      for (int i = 0; i < N; ++i) x[i] = gated(x[i], x[i]);
      break;
    default:
      break;
  }
}

}  // namespace bertkern::cuda
