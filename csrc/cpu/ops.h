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
Tensor pack_groupwise(const Tensor& codes, const Tensor& scale, std::optional<Tensor> zero, const Tensor& bits,
                      int64_t n, int64_t k, int64_t axis, int64_t group_size, std::optional<Tensor> bias,
                      ScalarType operand, double input_scale, int64_t input_zero_point);
Tensor unpack_groupwise(const Tensor& packed, const Tensor& bits);
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
Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens,
                 std::optional<Tensor> key_counts, std::optional<Tensor> bias, std::optional<Tensor> head_mask,
                 double scale, bool causal);
Tensor qattention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& q_scale, const Tensor& k_scale,
                  const Tensor& v_scale, const Tensor& cu_seqlens, std::optional<Tensor> key_counts,
                  std::optional<Tensor> bias, std::optional<Tensor> head_mask, double scale, bool causal,
                  std::optional<ScalarType> out_dtype);
std::tuple<Tensor, Tensor> attention_requantize(const Tensor& q, const Tensor& k, const Tensor& v,
                                                std::optional<Tensor> q_scale, std::optional<Tensor> k_scale,
                                                std::optional<Tensor> v_scale, const Tensor& cu_seqlens,
                                                std::optional<Tensor> key_counts, std::optional<Tensor> bias,
                                                std::optional<Tensor> head_mask, double scale, bool causal,
                                                double out_scale, int64_t out_zero_point);
Tensor encoder(const Tensor& x, std::optional<Tensor> mask, std::optional<Tensor> position_bias,
               std::vector<Tensor> linears, const Tensor& norms, std::vector<int64_t> heads, int64_t activation,
               double eps, bool keep_padding, bool all_hidden_states, bool empty_attends, bool exact_attention,
               std::optional<Tensor> head_mask, bool packed);
Tensor mobilebert_encoder(const Tensor& x, std::optional<Tensor> mask, std::vector<Tensor> linears, const Tensor& norms,
                          std::optional<Tensor> eps, std::vector<int64_t> heads, int64_t bottleneck, int64_t activation,
                          bool keep_padding, bool all_hidden_states, bool empty_attends, bool exact_attention,
                          std::optional<Tensor> head_mask, bool packed);
Tensor trigram_embed(std::vector<Tensor> ids, std::vector<Tensor> tables, std::vector<Tensor> scales,
                     std::optional<Tensor> packed, const Tensor& weight, const Tensor& bias, std::optional<double> eps,
                     bool trigram, std::optional<ScalarType> out_dtype);

}  // namespace bertkern::ops
