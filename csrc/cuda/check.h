// Checks at the edge of the CUDA operators, and what stands around a launch: device, stream, errors.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include "cuda/types.h"
#include "edge.h"

namespace bertkern::ops {

// Makes a tensor's device the current one for a scope, and finds the stream that torch runs there.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& t);
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

// After a launch: throws with what CUDA says. A card that the build has no code for is told apart.
void check_launch(const char* op, cudaError_t error);

inline void require_cuda(const char* op, const char* name, const Tensor& t, const Tensor& beside) {
  require(t.is_cuda() && t.get_device_index() == beside.get_device_index(), op, ": expected ", name,
          " on the device of the other tensors, cuda:", beside.get_device_index(), ". Got another device.");
}

// A contiguous tensor of one dtype on the device of `beside`.
inline Tensor expect_cuda(const char* op, const char* name, const Tensor& t, ScalarType dtype, const Tensor& beside) {
  require_cuda(op, name, t, beside);
  require(t.scalar_type() == dtype, op, ": expected ", name, " of dtype ", dtype_name(dtype), ". Got ",
          dtype_name(t.scalar_type()), ".");
  return dense(t);
}

inline Tensor expect_cuda_float(const char* op, const char* name, const Tensor& t, const Tensor& beside) {
  require_cuda(op, name, t, beside);
  require(is_activation_dtype(t.scalar_type()), op, ": expected ", name, " of dtype float32, bfloat16 or float16. Got ",
          dtype_name(t.scalar_type()), ".");
  return dense(t);
}

// Of the dtypes that kernels tell apart at run time; any other is taken for fp32.
inline bertkern::cuda::Type type_of(ScalarType t) {
  switch (t) {
    case ScalarType::BFloat16:
      return bertkern::cuda::Type::bf16;
    case ScalarType::Half:
      return bertkern::cuda::Type::f16;
    case ScalarType::Char:
      return bertkern::cuda::Type::s8;
    case ScalarType::Byte:
      return bertkern::cuda::Type::u8;
    default:
      return bertkern::cuda::Type::f32;
  }
}

inline Tensor empty_beside(const Tensor& t, std::vector<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_empty(t, torch::headeronly::IntHeaderOnlyArrayRef(shape.data(), shape.size()), dtype);
}

}  // namespace bertkern::ops
