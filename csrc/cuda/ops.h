// The operators over CUDA tensors (stable ABI): checks, allocation, and the launch on torch's current stream.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <tuple>
#include <vector>

namespace bertkern::ops::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::tuple<Tensor, Tensor> quantize_rows(const Tensor& x, double scale, int64_t zero_point, bool is_unsigned);
std::tuple<Tensor, Tensor, Tensor> quantize_codes(const Tensor& x, std::optional<Tensor> live, double step,
                                                  int64_t zero_point);
Tensor add_layernorm(const Tensor& x, std::optional<Tensor> residual, const Tensor& weight, const Tensor& bias,
                     double eps);
Tensor add_layernorm_live(const Tensor& x, std::optional<Tensor> residual, const Tensor& weight, const Tensor& bias,
                          std::optional<Tensor> live, double eps);
std::tuple<Tensor, Tensor, Tensor, Tensor> add_layernorm_codes(const Tensor& x, std::optional<Tensor> residual,
                                                               const Tensor& weight, const Tensor& bias,
                                                               std::optional<Tensor> live, double eps, double step,
                                                               int64_t zero_point);
Tensor embed(std::vector<Tensor> ids, std::vector<Tensor> tables, std::vector<Tensor> scales, const Tensor& weight,
             const Tensor& bias, double eps, std::optional<ScalarType> out_dtype);
std::tuple<Tensor, Tensor> cuda_qgemm(const Tensor& codes, const Tensor& scale, std::optional<Tensor> zero_point,
                                      const Tensor& weight, const Tensor& weight_scale,
                                      std::optional<Tensor> weight_sums, std::optional<Tensor> bias,
                                      std::optional<Tensor> residual, std::optional<Tensor> count, int64_t activation,
                                      double output_scale, double out_scale, int64_t out_zero_point,
                                      ScalarType out_dtype);

Tensor block_sparse_linear_mma(const Tensor& x, const Tensor& values, std::optional<Tensor> bias, const Tensor& index,
                               int64_t n, int64_t activation, std::optional<Tensor> residual,
                               std::optional<ScalarType> out_dtype);
Tensor block_sparse_linear_int8_mma(const Tensor& codes, const Tensor& scale, std::optional<Tensor> zero,
                                    const Tensor& values, const Tensor& weight_scale, std::optional<Tensor> column_sum,
                                    std::optional<Tensor> bias, const Tensor& index, int64_t n, int64_t activation,
                                    std::optional<Tensor> residual, std::optional<ScalarType> out_dtype,
                                    std::optional<Tensor> count);
Tensor groupwise_linear_mma(const Tensor& x, std::vector<Tensor> codes, std::vector<Tensor> members,
                            const Tensor& scale, std::optional<Tensor> shift, std::optional<Tensor> bias,
                            std::optional<Tensor> residual, std::vector<int64_t> bits, int64_t group,
                            int64_t activation, std::optional<ScalarType> out_dtype);
std::tuple<Tensor, Tensor> attention_cuda_forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                                  const Tensor& cu_seqlens, std::optional<Tensor> key_counts,
                                                  std::optional<Tensor> numbers, std::optional<Tensor> factors,
                                                  std::optional<Tensor> bias, int64_t max_length, bool causal,
                                                  double scale);

}  // namespace bertkern::ops::cuda
