// cuda_qgemm: products of 8-bit codes over CUDA tensors.
#include <cmath>

#include "cuda/check.h"
#include "cuda/gemm/gemm.h"
#include "cuda/ops.h"

namespace bertkern::ops::cuda {

namespace {

using bertkern::cuda::Activation;
using bertkern::cuda::Code;
using bertkern::cuda::GemmParams;
using bertkern::cuda::Rows;
using bertkern::cuda::Type;

constexpr int64_t kLargestK = 65536;  // times 255 * 127: more could leave int32

bool is_code(ScalarType t) { return t == ScalarType::Char || t == ScalarType::Byte || t == ScalarType::Float8_e4m3fn; }

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check_launch("cuda_qgemm", cudaDeviceGetAttribute(&value, which, device));
  return value;
}

// A matrix whose rows begin at multiples of 16 bytes, as it is.
void expect_matrix(const char* op, const char* name, const Tensor& t, int64_t columns, int64_t& pitch) {
  require(t.dim() == 2 && t.size(1) >= columns, op, ": expected ", name, " of shape [rows, ", columns,
          " or more]. Got ", shape_of(t), ".");
  pitch = t.size(0) > 1 && columns > 0 ? t.stride(0) : (t.size(1) + 15) / 16 * 16;
  const bool aligned = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 && pitch % 16 == 0;
  require(aligned && (t.stride(1) == 1 || t.size(1) <= 1), op, ": expected rows of ", name,
          " that begin at multiples of 16 bytes.");
}

// [length] or [1] of one dtype; `step` is 0 for the latter.
Tensor expect_steps(const char* op, const char* name, const Tensor& t, ScalarType dtype, int64_t length,
                    const Tensor& beside, int32_t& step) {
  const Tensor in = expect_cuda(op, name, t, dtype, beside);
  require(in.numel() == 1 || in.numel() == length, op, ": expected ", name, " of ", length,
          " elements or one. Got shape ", shape_of(in), ".");
  step = in.numel() == 1 ? 0 : 1;
  return in;
}

template <class T>
Tensor expect_vector(const char* op, const char* name, const std::optional<Tensor>& t, ScalarType dtype, int64_t length,
                     const Tensor& beside, const T*& data) {
  if (!t) return beside;
  const Tensor in = expect_cuda(op, name, *t, dtype, beside);
  require(in.numel() == length, op, ": expected ", name, " of ", length, " elements. Got shape ", shape_of(in), ".");
  data = static_cast<const T*>(in.const_data_ptr());
  return in;
}

Rows rows_of(const Tensor& t, int64_t width) {
  Rows rows;
  rows.data = const_cast<void*>(t.const_data_ptr());
  rows.type = type_of(t.scalar_type());
  rows.pitch = width;
  return rows;
}

}  // namespace

std::tuple<Tensor, Tensor> cuda_qgemm(const Tensor& codes, const Tensor& scale, std::optional<Tensor> zero_point,
                                      const Tensor& weight, const Tensor& weight_scale,
                                      std::optional<Tensor> weight_sums, std::optional<Tensor> bias,
                                      std::optional<Tensor> residual, std::optional<Tensor> count, int64_t activation,
                                      double output_scale, double out_scale, int64_t out_zero_point,
                                      ScalarType out_dtype) {
  const char* op = "cuda_qgemm";
  const bool float8 = codes.scalar_type() == ScalarType::Float8_e4m3fn;
  require(codes.is_cuda() && is_code(codes.scalar_type()), op,
          ": expected codes of dtype int8, uint8 or float8_e4m3fn, on a GPU.");
  require(codes.dim() == 2, op, ": expected codes of shape [M, K]. Got ", shape_of(codes), ".");
  GemmParams p;
  p.m = codes.size(0);
  const int64_t k = codes.size(1), n = weight.dim() == 2 ? weight.size(0) : 0;
  require(k <= kLargestK, op, ": expected K of at most ", kLargestK, ". Got ", k, ".");
  require(!float8 || k % 16 == 0, op, ": expected K to be a multiple of 16 for float8 codes. Got ", k, ".");
  require(n <= 0x40000000, op, ": expected N of at most 1073741824. Got ", n, ".");
  p.k = static_cast<int32_t>(k), p.n = static_cast<int32_t>(n);
  expect_matrix(op, "codes", codes, k, p.a_pitch);
  require_cuda(op, "weight", weight, codes);
  require(weight.scalar_type() == (float8 ? ScalarType::Float8_e4m3fn : ScalarType::Char), op,
          ": expected weight of dtype ", float8 ? "float8_e4m3fn" : "int8", " beside these codes.");
  expect_matrix(op, "weight", weight, (k + 15) / 16 * 16, p.weight_pitch);
  p.code = float8 ? Code::e4m3 : codes.scalar_type() == ScalarType::Byte ? Code::u8 : Code::s8;
  p.a = codes.const_data_ptr(), p.weight = weight.const_data_ptr();

  const Tensor steps = expect_steps(op, "scale", scale, ScalarType::Float, p.m, codes, p.scale_step);
  p.scale = static_cast<const float*>(steps.const_data_ptr());
  const Tensor weight_steps =
      expect_steps(op, "weight_scale", weight_scale, ScalarType::Float, n, codes, p.weight_step);
  p.weight_scale = static_cast<const float*>(weight_steps.const_data_ptr());
  Tensor zeros = codes;
  if (zero_point) {
    require(!float8 && weight_sums, op, ": expected zero_point beside integer codes and weight_sums alone.");
    zeros = expect_steps(op, "zero_point", *zero_point, ScalarType::Int, p.m, codes, p.zero_step);
    p.zero = static_cast<const int32_t*>(zeros.const_data_ptr());
  }
  const Tensor sums = expect_vector(op, "weight_sums", weight_sums, ScalarType::Int, n, codes, p.weight_sums);
  const Tensor added = expect_vector(op, "bias", bias, ScalarType::Float, n, codes, p.bias);
  const Tensor live = expect_vector(op, "count", count, ScalarType::Int, 1, codes, p.live);
  require(activation >= 0 && activation < bertkern::cuda::kActivations, op, ": expected activation from 0 to ",
          bertkern::cuda::kActivations - 1, ". Got ", activation, ".");
  p.activation = static_cast<Activation>(activation);
  require(std::isfinite(output_scale) && output_scale >= 0.0, op, ": expected output_scale >= 0 (0: none). Got ",
          output_scale, ".");
  p.output_step = static_cast<float>(output_scale);
  Tensor beside = codes;
  if (residual) {
    beside = expect_cuda_float(op, "residual", *residual, codes);
    require(shape_vector(beside) == std::vector<int64_t>{p.m, n}, op, ": expected residual of shape [", p.m, ", ", n,
            "]. Got ", shape_of(beside), ".");
    p.residual = rows_of(beside, n);
  }
  const bool coded = out_dtype == ScalarType::Char || out_dtype == ScalarType::Byte;
  require(coded || is_activation_dtype(out_dtype), op,
          ": expected out_dtype float32, bfloat16, float16, int8 or uint8. Got ", dtype_name(out_dtype), ".");
  if (coded) {
    const int64_t low = out_dtype == ScalarType::Char ? -128 : 0;
    require(std::isfinite(out_scale) && out_scale > 0.0, op,
            ": expected out_scale > 0 beside an out_dtype of codes. Got ", out_scale, ".");
    require(out_zero_point >= low && out_zero_point <= low + 255, op, ": expected out_zero_point in [", low, ", ",
            low + 255, "]. Got ", out_zero_point, ".");
    p.out_step = static_cast<float>(out_scale), p.out_zero = static_cast<int32_t>(out_zero_point);
  }
  Tensor y = empty_beside(codes, {p.m, n}, out_dtype);
  Tensor made = empty_beside(codes, {coded ? p.m : 0}, ScalarType::Float);
  p.y = rows_of(y, n);
  if (coded) p.steps = static_cast<float*>(made.mutable_data_ptr());
  const OnDevice device(codes);
  const int number = codes.get_device_index();
  require(!float8 || attribute(cudaDevAttrComputeCapabilityMajor, number) >= 12, op,
          ": expected a GPU of compute capability 12.0 or newer for float8 codes.");
  p.processors = attribute(cudaDevAttrMultiProcessorCount, number);
  check_launch(op, bertkern::cuda::launch_gemm(p, device.stream()));
  return {y, made};
}

}  // namespace bertkern::ops::cuda
