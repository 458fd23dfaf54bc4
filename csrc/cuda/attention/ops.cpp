// attention_cuda_forward over CUDA tensors: packed sequences, any strides between tokens and heads.
#include "cuda/attention/attention.h"

#include <cmath>

#include "cuda/check.h"
#include "cuda/ops.h"

namespace bertkern::ops::cuda {

namespace {

using bertkern::cuda::AttentionParams;

// [T, H, d] with features side by side: heads and tokens may lie anywhere.
Tensor expect_heads(const char* op, const char* name, const Tensor& t, const Tensor& q) {
  require_cuda(op, name, t, q);
  require((t.scalar_type() == ScalarType::Half || t.scalar_type() == ScalarType::BFloat16) &&
              t.scalar_type() == q.scalar_type(),
          op, ": expected ", name, " of dtype float16 or bfloat16, as q is. Got ", dtype_name(t.scalar_type()), ".");
  require(t.dim() == 3, op, ": expected ", name, " of shape [T, H, d]. Got ", shape_of(t), ".");
  require(shape_vector(t) == shape_vector(q), op, ": expected ", name, " of shape [T, H, d] = ", shape_of(q), ". Got ",
          shape_of(t), ".");
  return t.stride(2) == 1 || t.size(2) <= 1 ? t : torch::stable::contiguous(t);
}

int32_t narrow(const char* op, const char* name, int64_t n) {
  require(n >= 0 && n <= 0x7fffffff, op, ": expected ", name, " in [0, 2147483647]. Got ", n, ".");
  return static_cast<int32_t>(n);
}

// A vector of int32 of so many elements; n < 0: any number.
Tensor expect_integers(const char* op, const char* name, const Tensor& t, int64_t n, const Tensor& q) {
  const Tensor in = expect_cuda(op, name, t, ScalarType::Int, q);
  require(in.dim() == 1 && (n < 0 ? in.size(0) > 0 : in.size(0) == n), op, ": expected ", name, " of shape [",
          n < 0 ? "sequences + 1" : std::to_string(n), "]. Got ", shape_of(in), ".");
  return in;
}

}  // namespace

std::tuple<Tensor, Tensor> attention_cuda_forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                                  const Tensor& cu_seqlens, std::optional<Tensor> key_counts,
                                                  std::optional<Tensor> numbers, std::optional<Tensor> factors,
                                                  std::optional<Tensor> bias, int64_t max_length, bool causal,
                                                  double scale) {
  const char* op = "attention_cuda_forward";
  AttentionParams p{};
  const Tensor queries = expect_heads(op, "q", q, q), keys = expect_heads(op, "k", k, q);
  const Tensor values = expect_heads(op, "v", v, q);
  p.tokens = narrow(op, "T", q.size(0)), p.heads = narrow(op, "H", q.size(1));
  require(q.size(2) >= 1 && q.size(2) <= 128, op, ": expected heads of 1 to 128 features. Got ", q.size(2), ".");
  p.head_dim = static_cast<int32_t>(q.size(2));
  p.max_length = narrow(op, "max_length", max_length);
  p.type = type_of(q.scalar_type());
  p.scale = static_cast<float>(scale), p.causal = causal;
  require(p.scale > 0.0f && std::isfinite(p.scale), op, ": expected scale above 0. Got ", scale, ".");
  p.q = queries.const_data_ptr(), p.k = keys.const_data_ptr(), p.v = values.const_data_ptr();
  p.q_t = queries.stride(0), p.k_t = keys.stride(0), p.v_t = values.stride(0);
  p.q_h = queries.stride(1), p.k_h = keys.stride(1), p.v_h = values.stride(1);

  const Tensor ends = expect_integers(op, "cu_seqlens", cu_seqlens, -1, q);
  p.sequences = narrow(op, "sequences", ends.size(0) - 1);
  p.cu_seqlens = static_cast<const int32_t*>(ends.const_data_ptr());
  Tensor counts, originals, scales, added;
  if (key_counts) {
    counts = expect_integers(op, "key_counts", *key_counts, p.sequences, q);
    p.key_counts = static_cast<const int32_t*>(counts.const_data_ptr());
  }
  if (numbers) {
    originals = expect_integers(op, "numbers", *numbers, p.heads, q);
    p.numbers = static_cast<const int32_t*>(originals.const_data_ptr());
  }
  // The numbers of heads are on the card: with them, tables may be of any width, and whoever gave them has looked.
  if (factors) {
    require_cuda(op, "factors", *factors, q);
    require(factors->scalar_type() == ScalarType::Float && factors->dim() == 2 && factors->size(0) == p.sequences &&
                (p.numbers ? factors->size(1) >= p.heads : factors->size(1) == p.heads),
            op, ": expected factors float32 [sequences, heads] = [", p.sequences, ", ", p.heads, "]. Got ",
            dtype_name(factors->scalar_type()), " of shape ", shape_of(*factors), ".");
    scales = *factors;
    p.factors = static_cast<const float*>(scales.const_data_ptr());
    p.factors_b = scales.stride(0), p.factors_h = scales.stride(1);
  }
  if (bias) {
    require_cuda(op, "bias", *bias, q);
    require(is_activation_dtype(bias->scalar_type()), op, ": expected bias of dtype float32, bfloat16 or float16. Got ",
            dtype_name(bias->scalar_type()), ".");
    require(bias->dim() == 4 && (bias->size(0) == 1 || bias->size(0) == p.sequences) &&
                (bias->size(1) == 1 || (p.numbers ? bias->size(1) >= p.heads : bias->size(1) == p.heads)) &&
                bias->size(2) >= max_length && bias->size(3) >= max_length,
            op, ": expected bias [1 or sequences, 1 or heads, L, L] = [", p.sequences, ", ", p.heads, ", ", max_length,
            ", ", max_length, "] or longer. Got ", shape_of(*bias), ".");
    added = bias->stride(3) == 1 || bias->size(3) <= 1 ? *bias : torch::stable::contiguous(*bias);
    p.bias = added.const_data_ptr(), p.bias_type = type_of(added.scalar_type());
    p.bias_b = added.size(0) == 1 ? 0 : added.stride(0), p.bias_h = added.size(1) == 1 ? 0 : added.stride(1);
    p.bias_q = added.stride(2);
  }

  Tensor out = empty_beside(q, shape_vector(q), q.scalar_type());
  Tensor statistics = empty_beside(q, {2, q.size(1), q.size(0)}, ScalarType::Float);
  if (p.sequences == 0 || p.max_length == 0) {
    torch::stable::zero_(out);
    return {out, statistics};
  }
  p.out = out.mutable_data_ptr(), p.statistics = static_cast<float*>(statistics.mutable_data_ptr());
  const OnDevice device(q);
  check_launch(op, bertkern::cuda::launch_attention(p, device.stream()));
  return {out, statistics};
}

}  // namespace bertkern::ops::cuda
