// block_sparse_linear_mma and block_sparse_linear_int8_mma over CUDA tensors.
#include "cuda/block_sparse/block_sparse.h"

#include "cuda/check.h"
#include "cuda/linear_ops.h"
#include "cuda/ops.h"

namespace bertkern::ops::cuda {

namespace {

using bertkern::cuda::BlockSparse;
using bertkern::cuda::Operand;

// What both operators have: a pattern as bertkern.ops.block_sparse.block_index makes it, of which a forward pass reads
// crow [R + 1] and col [nnzb], the first of its parts.
struct Call {
  BlockSparse p = {};
  Rows x;
  Tensor values, index, bias, residual, y;

  Call(const char* op, const Tensor& x_, const char* x_name, const Tensor& values_, const Tensor& index_, int64_t n,
       std::optional<Tensor> bias_, int64_t activation, std::optional<Tensor> residual_, ScalarType out_dtype)
      : x(op, x_name, x_, true), values(x_), index(x_), bias(x_), residual(x_), y(x_) {
    values = expect_cuda(op, "values", values_, x_.scalar_type(), x_);
    require(values.dim() == 3, op, ": expected values of shape [nnzb, br, bc]. Got ", shape_of(values), ".");
    const int64_t kept = values.size(0), br = values.size(1), bc = values.size(2), k = x.width;
    require(bertkern::cuda::block_sparse_supported(static_cast<int>(br), static_cast<int>(bc)), op,
            ": expected blocks of 32, 64 or 128 a side. Got [", br, ", ", bc, "].");
    require(n >= 0 && n <= 0x7fffffff, op, ": expected n from 0 to 2147483647. Got ", n, ".");
    index = expect_cuda(op, "index", index_, ScalarType::Int, x_);
    const int64_t down = (n + br - 1) / br, across = (k + bc - 1) / bc, size = down + across + 2 + 4 * kept;
    require(index.dim() == 1 && index.size(0) == size, op, ": expected index int32 of shape [", size, "]. Got ",
            shape_of(index), ".");
    p.x = x.data(), p.x_stride = x.stride, p.tokens = static_cast<int>(x.rows);
    p.values = values.const_data_ptr();
    p.crow = static_cast<const int*>(index.const_data_ptr());
    p.col = p.crow + down + 1;
    p.n = static_cast<int>(n), p.k = static_cast<int>(k);
    p.block_rows = static_cast<int>(br), p.block_columns = static_cast<int>(bc);
    p.activation = checked_gpu_activation(op, activation);
    if (bias_) {
      bias = expect_cuda_float(op, "bias", *bias_, x_);
      require(bias.dim() == 1 && bias.size(0) == n, op, ": expected bias of shape [", n, "]. Got ", shape_of(bias),
              ".");
      p.bias = bias.const_data_ptr(), p.bias_type = type_of(bias.scalar_type());
    }
    std::vector<int64_t> shape = shape_vector(x_);
    shape.back() = n;
    if (residual_) {
      residual = expect_residual(op, *residual_, x_, shape);
      p.residual = residual.const_data_ptr(), p.residual_type = type_of(residual.scalar_type());
      p.residual_stride = n;
    }
    require(is_activation_dtype(out_dtype), op, ": expected out_dtype to be float32, bfloat16 or float16. Got ",
            dtype_name(out_dtype), ".");
    y = empty_beside(x_, shape, out_dtype);
    p.y = y.mutable_data_ptr(), p.y_type = type_of(out_dtype), p.y_stride = n;
  }

  Tensor launch(const char* op) {
    const OnDevice device(y);
    check_launch(op, bertkern::cuda::launch_block_sparse(p, device.stream()));
    return y;
  }
};

}  // namespace

Tensor block_sparse_linear_mma(const Tensor& x, const Tensor& values, std::optional<Tensor> bias, const Tensor& index,
                               int64_t n, int64_t activation, std::optional<Tensor> residual,
                               std::optional<ScalarType> out_dtype) {
  const char* op = "block_sparse_linear_mma";
  const ScalarType type = x.scalar_type();
  require(type == ScalarType::Half || type == ScalarType::BFloat16, op,
          ": expected x of dtype float16 or bfloat16. Got ", dtype_name(type), ".");
  Call call(op, x, "x", values, index, n, bias, activation, residual, out_dtype.value_or(type));
  call.p.operand = type == ScalarType::Half ? Operand::f16 : Operand::bf16;
  return call.launch(op);
}

Tensor block_sparse_linear_int8_mma(const Tensor& codes, const Tensor& scale, std::optional<Tensor> zero,
                                    const Tensor& values, const Tensor& weight_scale, std::optional<Tensor> column_sum,
                                    std::optional<Tensor> bias, const Tensor& index, int64_t n, int64_t activation,
                                    std::optional<Tensor> residual, std::optional<ScalarType> out_dtype,
                                    std::optional<Tensor> count) {
  const char* op = "block_sparse_linear_int8_mma";
  require(codes.scalar_type() == ScalarType::Char, op, ": expected codes of dtype int8. Got ",
          dtype_name(codes.scalar_type()), ".");
  Call call(op, codes, "codes", values, index, n, bias, activation, residual, out_dtype.value_or(ScalarType::Float));
  const auto vector = [&](const char* name, const Tensor& t, ScalarType dtype, int64_t size) {
    const Tensor made = expect_cuda(op, name, t, dtype, codes);
    require(made.numel() == size, op, ": expected ", name, " of ", size, " elements. Got ", shape_of(made), ".");
    return made;
  };
  require(zero.has_value() == column_sum.has_value(), op, ": expected column_sum beside zero. Got one of them.");
  const Tensor x_scale = vector("scale", scale, ScalarType::Float, call.x.rows);
  const Tensor w_scale = vector("weight_scale", weight_scale, ScalarType::Float, n);
  call.p.x_scale = static_cast<const float*>(x_scale.const_data_ptr());
  call.p.weight_scale = static_cast<const float*>(w_scale.const_data_ptr());
  Tensor x_zero = x_scale, sums = x_scale;
  if (zero) {
    x_zero = vector("zero", *zero, ScalarType::Int, call.x.rows);
    sums = vector("column_sum", *column_sum, ScalarType::Int, n);
    call.p.x_zero = static_cast<const int*>(x_zero.const_data_ptr());
    call.p.column_sum = static_cast<const int*>(sums.const_data_ptr());
  }
  Tensor live = x_scale;
  if (count) {
    live = vector("count", *count, ScalarType::Int, 1);
    call.p.live = static_cast<const int*>(live.const_data_ptr());
  }
  call.p.operand = Operand::s8;
  return call.launch(op);
}

}  // namespace bertkern::ops::cuda
