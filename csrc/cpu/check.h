// Checks at the edge of the CPU's operators.
#pragma once

#include "cpu/rowwise/rowwise.h"
#include "edge.h"

namespace bertkern::ops {

// A contiguous CPU tensor of one dtype.
inline Tensor expect(const char* op, const char* name, const Tensor& t, ScalarType dtype) {
  require(t.is_cpu(), op, ": expected ", name, " on the CPU. Got another device.");
  require(t.scalar_type() == dtype, op, ": expected ", name, " of dtype ", dtype_name(dtype), ". Got ",
          dtype_name(t.scalar_type()), ".");
  return dense(t);
}

inline Tensor expect_float(const char* op, const char* name, const Tensor& t) {
  require(t.is_cpu(), op, ": expected ", name, " on the CPU. Got another device.");
  require(is_activation_dtype(t.scalar_type()), op, ": expected ", name, " of dtype float32, bfloat16 or float16. Got ",
          dtype_name(t.scalar_type()), ".");
  return dense(t);
}

inline cpu::Dtype kernel_dtype(ScalarType t) {
  switch (t) {
    case ScalarType::BFloat16:
      return cpu::Dtype::bf16;
    case ScalarType::Half:
      return cpu::Dtype::f16;
    case ScalarType::Char:
      return cpu::Dtype::s8;
    case ScalarType::Byte:
      return cpu::Dtype::u8;
    default:
      return cpu::Dtype::f32;
  }
}

inline Tensor empty(std::vector<int64_t> shape, ScalarType dtype) {
  return torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(shape.data(), shape.size()), dtype);
}

inline cpu::Activation checked_activation(const char* op, int64_t activation) {
  require(activation >= 0 && activation < cpu::kActivations, op, ": expected activation 0 (none), 1 (gelu), 2 ",
          "(gelu_tanh), 3 (relu), 4 (tanh) or 5 (silu). Got ", activation, ".");
  return static_cast<cpu::Activation>(activation);
}

// Contiguous fp32 copy of rows [rows][columns] where x is not fp32; `hold` keeps it alive.
inline const float* as_float_rows(const Tensor& x, int64_t rows, int64_t columns, Tensor& hold) {
  if (x.scalar_type() == ScalarType::Float) return static_cast<const float*>(x.const_data_ptr());
  hold = empty({rows, columns}, ScalarType::Float);
  float* out = static_cast<float*>(hold.mutable_data_ptr());
  cpu::row_kernels().load_row(x.const_data_ptr(), kernel_dtype(x.scalar_type()), rows * columns, out);
  return out;
}

}  // namespace bertkern::ops
