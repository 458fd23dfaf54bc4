// What the linear operators over CUDA tensors share at their edge.
#pragma once

#include "cuda/check.h"
#include "cuda/finish.h"

namespace bertkern::ops::cuda {

inline bertkern::cuda::Activation checked_gpu_activation(const char* op, int64_t activation) {
  require(activation >= 0 && activation < bertkern::cuda::kActivations, op,
          ": expected activation 0 (none), 1 (gelu), ", "2 (gelu_tanh), 3 (relu), 4 (tanh) or 5 (silu). Got ",
          activation, ".");
  return static_cast<bertkern::cuda::Activation>(activation);
}

inline Tensor expect_residual(const char* op, const Tensor& residual, const Tensor& x,
                              const std::vector<int64_t>& shape) {
  const Tensor made = expect_cuda_float(op, "residual", residual, x);
  require(shape_vector(made) == shape, op, ": expected residual of the result's shape, x's with N for K. Got ",
          shape_of(made), ".");
  return made;
}

// x [..., K] as rows; those of a matrix may stand apart, where their elements do not.
struct Rows {
  Tensor held;
  int64_t rows = 0, width = 0, stride = 0;

  // `aligned`: rows must begin at multiples of 16 bytes.
  Rows(const char* op, const char* name, const Tensor& x, bool aligned) : held(x) {
    require_cuda(op, name, x, x);
    require(x.dim() >= 1, op, ": expected ", name, " of shape [..., K]. Got a scalar.");
    width = x.size(x.dim() - 1);
    rows = 1;
    for (int64_t i = 0; i + 1 < x.dim(); ++i) rows *= x.size(i);
    require(rows <= 0x7fffffff && width <= 0x7fffffff, op, ": expected ", name,
            " of at most 2147483647 rows and columns. Got ", shape_of(x), ".");
    const bool apart = x.dim() == 2 && x.stride(1) == 1 && x.stride(0) >= width;
    if (!apart) held = dense(x);
    stride = apart ? x.stride(0) : width;
    const int64_t bytes = x.scalar_type() == ScalarType::Char ? 1 : 2;
    const bool fits = reinterpret_cast<uintptr_t>(data()) % 16 == 0 && (rows <= 1 || stride * bytes % 16 == 0);
    require(!aligned || fits, op, ": expected ", name, " whose rows begin at multiples of 16 bytes. Got a row of ",
            stride * bytes, " bytes.");
  }
  const void* data() const { return held.const_data_ptr(); }
};

}  // namespace bertkern::ops::cuda
