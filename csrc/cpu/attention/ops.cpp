// attention over torch tensors: packed sequences, any strides between tokens and heads.
#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "cpu/attention/attention.h"
#include "cpu/check.h"
#include "cpu/ops.h"

namespace bertkern::ops {

namespace {

// [T, H, d] on the CPU, with features side by side: heads and tokens may lie anywhere.
Tensor expect_heads(const char* op, const char* name, const Tensor& t, const Tensor& like, bool codes) {
  require(t.is_cpu(), op, ": expected ", name, " on the CPU. Got another device.");
  if (codes)
    require(t.scalar_type() == ScalarType::Char, op, ": expected ", name, " of dtype int8 beside scales. Got ",
            dtype_name(t.scalar_type()), ".");
  else
    require(is_activation_dtype(t.scalar_type()) && t.scalar_type() == like.scalar_type(), op, ": expected ", name,
            " of dtype float32, bfloat16 or float16, as q is. Got ", dtype_name(t.scalar_type()), ".");
  require(t.dim() == 3, op, ": expected ", name, " of shape [T, H, d]. Got ", shape_of(t), ".");
  require(t.size(0) == like.size(0) && t.size(1) == like.size(1) && t.size(2) == like.size(2), op, ": expected ", name,
          " of shape [T, H, d] = ", shape_of(like), ". Got ", shape_of(t), ".");
  return t.stride(2) == 1 || t.size(2) <= 1 ? t : torch::stable::contiguous(t);
}

int64_t integer(const Tensor& t, int64_t i) {
  return t.scalar_type() == ScalarType::Int ? static_cast<const int32_t*>(t.const_data_ptr())[i]
                                            : static_cast<const int64_t*>(t.const_data_ptr())[i];
}

Tensor expect_integers(const char* op, const char* name, const Tensor& t) {
  require(t.is_cpu() && t.dim() == 1 && (t.scalar_type() == ScalarType::Int || t.scalar_type() == ScalarType::Long), op,
          ": expected ", name, " as one row of int32 or int64 on the CPU. Got ", shape_of(t), " of dtype ",
          dtype_name(t.scalar_type()), ".");
  return dense(t);
}

// The scale of each token, or of all: a tensor without a dimension, because the bits of a lone token depend on which it
// is. NaN says that a token's row was not finite, and spreads as that row would.
cpu::CodeScale code_scale(const char* op, const char* name, const Tensor& t, int64_t tokens) {
  require(t.dim() == 0 || (t.dim() == 1 && t.size(0) == tokens), op, ": expected ", name, " of shape [T] = [", tokens,
          "] or []. Got ", shape_of(t), ".");
  const float* data = static_cast<const float*>(t.const_data_ptr());
  float least = 0.0f;
  for (int64_t i = 0; i < t.numel(); ++i) least = data[i] < least ? data[i] : least;
  require(least == 0.0f, op, ": expected ", name, " of at least 0. Got ", least, ".");
  cpu::CodeScale scale;
  if (t.dim() == 0)
    scale.step = data[0];
  else
    scale.rows = data;
  return scale;
}

// What every form of attention is asked, checked; holds what `call` points to.
struct Attention {
  cpu::AttentionCall call{};
  cpu::WeightKind values;
  int64_t tokens, heads, head_dim;

  Attention(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor* const (&scales)[3],
            const Tensor& cu_seqlens, const std::optional<Tensor>& key_counts, const std::optional<Tensor>& bias,
            const std::optional<Tensor>& head_mask, double scale, bool causal) {
    const bool codes = scales[0] || scales[1] || scales[2];
    held_.reserve(8);
    const Tensor& queries = hold(expect_heads(op, "q", q, q, codes));
    const Tensor& keys = hold(expect_heads(op, "k", k, q, codes));
    const Tensor& contents = hold(expect_heads(op, "v", v, q, codes));
    tokens = q.size(0), heads = q.size(1), head_dim = q.size(2);
    const double factor = scale == 0.0 ? 1.0 / std::sqrt(static_cast<double>(head_dim)) : scale;
    require(std::isfinite(scale) && scale >= 0.0, op, ": expected scale > 0, or 0 for 1 / sqrt(d). Got ", scale, ".");
    if (codes) {
      static const char* const kNames[3] = {"q_scale", "k_scale", "v_scale"};
      cpu::CodeScale* const targets[3] = {&call.q_scale, &call.k_scale, &call.v_scale};
      for (int i = 0; i < 3; ++i) {
        require(scales[i] != nullptr, op, ": expected q_scale, k_scale and v_scale, or none of them. Got no ",
                kNames[i], ".");
        *targets[i] = code_scale(op, kNames[i], hold(expect(op, kNames[i], *scales[i], ScalarType::Float)), tokens);
      }
    }

    const Tensor ends = expect_integers(op, "cu_seqlens", cu_seqlens);
    const int64_t count = ends.numel() - 1;
    require(count >= 0, op, ": expected cu_seqlens of shape [B + 1], to begin with 0 and to end with T = ", tokens,
            ". Got an empty one.");
    require(integer(ends, 0) == 0 && integer(ends, count) == tokens, op,
            ": expected cu_seqlens to begin with 0 and to end with T = ", tokens, ". Got ", integer(ends, 0), " and ",
            integer(ends, count), ".");
    int64_t longest = 0;
    for (int64_t b = 0; b < count; ++b) {
      const int64_t length = integer(ends, b + 1) - integer(ends, b);
      require(length >= 0, op, ": expected cu_seqlens to rise. Got ", integer(ends, b), " and then ",
              integer(ends, b + 1), ".");
      longest = std::max(longest, length);
    }
    std::optional<Tensor> attended;
    if (key_counts) {
      attended = expect_integers(op, "key_counts", *key_counts);
      require(attended->numel() == count, op, ": expected key_counts of shape [B] = [", count, "]. Got ",
              shape_of(*attended), ".");
    }
    const float *table = nullptr, *factors = nullptr;
    int64_t next_table = 0;  // from sequence to sequence
    if (bias) {
      const Tensor& added = hold(expect(op, "bias", *bias, ScalarType::Float));
      require(added.dim() == 4 && (added.size(0) == 1 || added.size(0) == count) &&
                  (added.size(1) == 1 || added.size(1) == heads) && added.size(2) >= longest &&
                  added.size(3) >= longest,
              op, ": expected bias of shape [1 or B, 1 or H, L, L] = [", count, ", ", heads, ", ", longest, ", ",
              longest, "] or longer. Got ", shape_of(added), ".");
      table = static_cast<const float*>(added.const_data_ptr());
      const int64_t size = added.size(2) * added.size(3);
      call.bias_pitch = added.size(3), call.bias_head = added.size(1) == 1 ? 0 : size;
      next_table = added.size(0) == 1 ? 0 : added.size(1) * size;
    }
    if (head_mask) {
      const Tensor& mask = hold(expect(op, "head_mask", *head_mask, ScalarType::Float));
      require(mask.dim() == 2 && mask.size(0) == count && mask.size(1) == heads, op,
              ": expected head_mask of shape [B, H] = [", count, ", ", heads, "]. Got ", shape_of(mask), ".");
      factors = static_cast<const float*>(mask.const_data_ptr());
    }

    sequences_.resize(static_cast<size_t>(count));
    for (int64_t b = 0; b < count; ++b) {
      cpu::Sequence& s = sequences_[static_cast<size_t>(b)];
      s.begin = integer(ends, b), s.tokens = s.keys = integer(ends, b + 1) - s.begin;
      if (attended) s.keys = integer(*attended, b);
      require(s.keys >= 0 && s.keys <= s.tokens, op, ": expected key_counts from 0 to the ", s.tokens,
              " tokens of sequence ", b, ". Got ", s.keys, ".");
      s.bias = table ? table + b * next_table : nullptr, s.factor = factors ? factors + b * heads : nullptr;
    }

    call.q = queries.const_data_ptr(), call.k = keys.const_data_ptr(), call.v = contents.const_data_ptr();
    call.dtype = kernel_dtype(q.scalar_type());
    call.q_pitch = queries.stride(0), call.k_pitch = keys.stride(0), call.v_pitch = contents.stride(0);
    call.q_head = queries.stride(1), call.k_head = keys.stride(1), call.v_head = contents.stride(1);
    call.heads = heads, call.head_dim = head_dim, call.scale = static_cast<float>(factor), call.causal = causal;
    call.sequences = sequences_.data(), call.sequence_count = count;
    const bool narrow =
        (codes || call.dtype == cpu::Dtype::bf16) && cpu::attention_kernel(cpu::WeightKind::bf16, call.dtype);
    values = narrow ? cpu::WeightKind::bf16 : cpu::WeightKind::f32;
  }
  Attention(const Attention&) = delete;
  Attention& operator=(const Attention&) = delete;

  // [T, H, d], for the kernel to write.
  Tensor output(ScalarType dtype) {
    Tensor out = empty({tokens, heads, head_dim}, dtype);
    call.out = out.mutable_data_ptr(), call.out_dtype = kernel_dtype(dtype);
    call.out_pitch = heads * head_dim, call.out_head = head_dim;
    return out;
  }

 private:
  const Tensor& hold(Tensor t) {
    held_.push_back(std::move(t));
    return held_.back();
  }

  std::vector<Tensor> held_;  // its 8 places are reserved: references stay
  std::vector<cpu::Sequence> sequences_;
};

}  // namespace

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens,
                 std::optional<Tensor> key_counts, std::optional<Tensor> bias, std::optional<Tensor> head_mask,
                 double scale, bool causal) {
  Attention a("attention", q, k, v, {nullptr, nullptr, nullptr}, cu_seqlens, key_counts, bias, head_mask, scale,
              causal);
  Tensor out = a.output(q.scalar_type());
  if (out.numel() > 0) cpu::attend(a.call, a.values);
  return out;
}

Tensor qattention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& q_scale, const Tensor& k_scale,
                  const Tensor& v_scale, const Tensor& cu_seqlens, std::optional<Tensor> key_counts,
                  std::optional<Tensor> bias, std::optional<Tensor> head_mask, double scale, bool causal,
                  std::optional<ScalarType> out_dtype) {
  const char* op = "qattention";
  Attention a(op, q, k, v, {&q_scale, &k_scale, &v_scale}, cu_seqlens, key_counts, bias, head_mask, scale, causal);
  const ScalarType dtype = out_dtype.value_or(ScalarType::Float);
  require(is_activation_dtype(dtype), op, ": expected out_dtype float32, bfloat16 or float16. Got ", dtype_name(dtype),
          ".");
  Tensor out = a.output(dtype);
  if (out.numel() > 0) cpu::attend(a.call, a.values);
  return out;
}

std::tuple<Tensor, Tensor> attention_requantize(const Tensor& q, const Tensor& k, const Tensor& v,
                                                std::optional<Tensor> q_scale, std::optional<Tensor> k_scale,
                                                std::optional<Tensor> v_scale, const Tensor& cu_seqlens,
                                                std::optional<Tensor> key_counts, std::optional<Tensor> bias,
                                                std::optional<Tensor> head_mask, double scale, bool causal,
                                                double out_scale, int64_t out_zero_point) {
  const char* op = "attention_requantize";
  const auto pointer = [](const std::optional<Tensor>& t) { return t ? &*t : nullptr; };
  Attention a(op, q, k, v, {pointer(q_scale), pointer(k_scale), pointer(v_scale)}, cu_seqlens, key_counts, bias,
              head_mask, scale, causal);
  const float step = static_cast<float>(out_scale);
  require(out_scale == 0.0 || (std::isfinite(step) && step >= std::numeric_limits<float>::min()), op,
          ": expected out_scale 0 (a scale per row) or a step that fp32 holds. Got ", out_scale, ".");
  require(out_zero_point >= 0 && out_zero_point <= 255 && (out_zero_point == 0 || step > 0.0f), op,
          ": expected out_zero_point 0 (signed codes), or in [1, 255] beside an out_scale. Got ", out_zero_point, ".");
  Tensor out = a.output(out_zero_point ? ScalarType::Byte : ScalarType::Char);
  Tensor scales = empty({a.tokens}, ScalarType::Float);
  float* steps = static_cast<float*>(scales.mutable_data_ptr());
  std::fill_n(steps, a.tokens, step > 0.0f ? step : 1.0f);
  if (out.numel() == 0) return {out, scales};
  if (step > 0.0f) {
    a.call.out_step = step, a.call.out_zero = static_cast<int32_t>(out_zero_point);
    a.call.out_finite = steps;
    cpu::attend(a.call, a.values);
  } else {
    cpu::attend_rows(a.call, a.values, a.tokens, steps);
  }
  return {out, scales};
}

}  // namespace bertkern::ops
