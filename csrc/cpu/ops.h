// The operators over torch tensors (stable ABI): checks, allocation, and the call into the torch-free kernels.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <tuple>
#include <vector>

namespace bertkern::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

int64_t cpu_isa();
Tensor pack_linear(const Tensor& weight, std::optional<Tensor> bias);
Tensor pack_qlinear(const Tensor& codes, const Tensor& scale, std::optional<Tensor> bias, double input_scale,
                    int64_t input_zero_point, double output_scale);
Tensor pack_sparse_linear(const Tensor& crow, const Tensor& col, const Tensor& values, int64_t n, int64_t k,
                          std::optional<Tensor> weight_scale, std::optional<Tensor> bias, double input_scale,
                          int64_t input_zero_point, double output_scale, int64_t form);
std::tuple<Tensor, Tensor, Tensor> unpack_linear(const Tensor& packed);
Tensor linear(const Tensor& x, const Tensor& packed, int64_t out_features, int64_t activation,
              std::optional<Tensor> residual, std::optional<ScalarType> out_dtype);
std::tuple<Tensor, Tensor> quantize_rows(const Tensor& x, double scale, int64_t zero_point, bool is_unsigned);
Tensor qgemm(const Tensor& codes, const Tensor& scale, int64_t zero_point, const Tensor& packed, int64_t out_features,
             int64_t activation, std::optional<Tensor> residual, std::optional<ScalarType> out_dtype);
std::tuple<Tensor, Tensor> qgemm_requantize(const Tensor& codes, const Tensor& scale, int64_t zero_point,
                                            const Tensor& packed, int64_t out_features, int64_t activation,
                                            double out_scale, int64_t out_zero_point);
Tensor qgemm_seconds(const Tensor& codes, const Tensor& scale, std::vector<Tensor> packed, int64_t out_features,
                     int64_t activation, bool requantize, ScalarType out_dtype, int64_t calls);
Tensor add_layernorm(const Tensor& x, std::optional<Tensor> residual, const Tensor& weight, const Tensor& bias,
                     double eps);
Tensor embed(std::vector<Tensor> ids, std::vector<Tensor> tables, std::vector<Tensor> scales, const Tensor& weight,
             const Tensor& bias, double eps, std::optional<ScalarType> out_dtype);
Tensor encoder(const Tensor& x, std::optional<Tensor> mask, std::optional<Tensor> position_bias,
               std::vector<Tensor> linears, const Tensor& norms, std::vector<int64_t> heads, int64_t activation,
               double eps, bool keep_padding, bool all_hidden_states, bool empty_attends);

}  // namespace bertkern::ops
