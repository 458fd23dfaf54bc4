// pack_linear, pack_qlinear, pack_sparse_linear, unpack_linear over torch tensors.
#include <cmath>

#include "cpu/check.h"
#include "cpu/gemm/linear.h"
#include "cpu/gemm/pack_ops.h"
#include "cpu/gemm/weights.h"
#include "cpu/ops.h"

namespace bertkern::ops {

namespace {

using cpu::Linear;

struct Layer {
  cpu::LinearHeader header{};
  Tensor bias, bias_rows;
  const float* bias_data = nullptr;
};

Layer layer_of(const char* op, cpu::WeightKind kind, int64_t n, int64_t k, const std::optional<Tensor>& bias,
               double input_scale, int64_t input_zero, double output_scale) {
  Layer layer;
  cpu::LinearHeader& header = layer.header;
  header.magic = cpu::kLinearMagic;
  header.kind = static_cast<int32_t>(kind);
  header.n = n, header.k = k;
  header.input_scale = static_cast<float>(input_scale);
  header.input_zero = static_cast<int32_t>(input_zero);
  header.output_scale = static_cast<float>(output_scale);
  header.has_bias = bias.has_value();
  if (bias) {
    layer.bias = expect_float(op, "bias", *bias);
    require(layer.bias.dim() == 1 && layer.bias.size(0) == n, op, ": expected bias of shape [N] = [", n, "]. Got ",
            shape_of(layer.bias), ".");
    layer.bias_data = as_float_rows(layer.bias, 1, n, layer.bias_rows);
  }
  return layer;
}

Tensor pack(const char* op, cpu::WeightKind kind, const Tensor& weight, const Tensor* scale,
            const std::optional<Tensor>& bias, double input_scale, int64_t input_zero, double output_scale) {
  Layer layer = layer_of(op, kind, weight.size(0), weight.size(1), bias, input_scale, input_zero, output_scale);
  layer.header.weight_dwords = cpu::dense_dwords(kind, layer.header.n, layer.header.k);
  std::optional<cpu::OrderedWeights> ordered;
  if (cpu::takes_order(layer.header)) {
    ordered = cpu::order_weights(layer.header, weight.const_data_ptr());
    ordered->measure(layer.header);
  }
  Tensor out = empty_weights(cpu::packed_bytes(layer.header));
  cpu::pack_linear(layer.header, weight.const_data_ptr(), ordered ? &*ordered : nullptr,
                   scale ? static_cast<const float*>(scale->const_data_ptr()) : nullptr, scale ? scale->numel() : 0,
                   layer.bias_data, out.mutable_data_ptr());
  return out;
}

// What int8 weights ask of their scale and of the static activation's parameters.
void check_int8(const char* op, const Tensor& scale, int64_t n, int64_t k, double input_scale, int64_t input_zero_point,
                double output_scale) {
  require(scale.numel() == 1 || (scale.dim() == 1 && scale.size(0) == n), op,
          ": expected weight_scale of shape [N] = [", n, "] or [1]. Got ", shape_of(scale), ".");
  // 127 * 255 * K must fit int32 with the correction of the zero point.
  require(k <= 32768, op, ": expected K <= 32768, beyond which an int32 sum could overflow. Got ", k, ".");
  check_input(op, input_scale, input_zero_point);
  require(std::isfinite(output_scale) && output_scale >= 0.0, op, ": expected output_scale >= 0 (0: none). Got ",
          output_scale, ".");
}

void check_codes(const char* op, const char* name, const Tensor& codes) {
  const int8_t* values = static_cast<const int8_t*>(codes.const_data_ptr());
  for (int64_t i = 0; i < codes.numel(); ++i)
    require(values[i] != -128, op, ": expected ", name, " in [-127, 127]. Got -128 at element ", i, ".");
}

// fp16 as fp32, for which there are kernels.
Tensor widened(const Tensor& weight) {
  if (weight.scalar_type() != ScalarType::Half) return weight;
  Tensor wide = empty(shape_vector(weight), ScalarType::Float);
  cpu::row_kernels().load_row(weight.const_data_ptr(), cpu::Dtype::f16, weight.numel(),
                              static_cast<float*>(wide.mutable_data_ptr()));
  return wide;
}

}  // namespace

Tensor pack_linear(const Tensor& weight, std::optional<Tensor> bias) {
  const char* op = "pack_linear";
  require(weight.dim() == 2, op, ": expected weight of shape [N, K]. Got ", shape_of(weight), ".");
  const Tensor w = widened(expect_float(op, "weight", weight));
  const bool bf16 = w.scalar_type() == ScalarType::BFloat16;
  return pack(op, bf16 ? cpu::WeightKind::bf16 : cpu::WeightKind::f32, w, nullptr, bias, 0.0, cpu::kSignedZero, 0.0);
}

Tensor pack_qlinear(const Tensor& codes, const Tensor& scale, std::optional<Tensor> bias, double input_scale,
                    int64_t input_zero_point, double output_scale) {
  const char* op = "pack_qlinear";
  require(codes.dim() == 2, op, ": expected weight_codes of shape [N, K]. Got ", shape_of(codes), ".");
  const Tensor c = expect(op, "weight_codes", codes, ScalarType::Char);
  const Tensor s = expect(op, "weight_scale", scale, ScalarType::Float);
  check_int8(op, s, c.size(0), c.size(1), input_scale, input_zero_point, output_scale);
  check_codes(op, "weight_codes", c);
  return pack(op, cpu::WeightKind::s8, c, &s, bias, input_scale, input_zero_of(input_scale, input_zero_point),
              output_scale);
}

std::tuple<Tensor, Tensor, Tensor> unpack_linear(const Tensor& packed) {
  const Tensor p = expect("unpack_linear", "packed", packed, ScalarType::Byte);
  Linear w;
  require(cpu::view_linear(p.const_data_ptr(), p.numel(), w),
          "unpack_linear: expected packed weights from pack_linear, pack_qlinear or pack_sparse_linear. Got ",
          p.numel(), " other bytes.");
  Tensor bias = empty({w.n}, ScalarType::Float);
  if (w.layout == cpu::Layout::grouped) {
    Tensor weight = empty({w.n, w.k}, ScalarType::Float);
    cpu::dequantize_groupwise(w, static_cast<float*>(weight.mutable_data_ptr()));
    float* const data = static_cast<float*>(bias.mutable_data_ptr());
    for (int64_t i = 0; i < w.n; ++i) data[w.column ? w.column[i] : i] = w.bias[i];
    return {weight, empty({0}, ScalarType::Float), bias};
  }
  const ScalarType dtype = w.kind == cpu::WeightKind::s8     ? ScalarType::Char
                           : w.kind == cpu::WeightKind::bf16 ? ScalarType::BFloat16
                                                             : ScalarType::Float;
  Tensor weight = empty({w.n, w.k}, dtype);
  Tensor scale = empty({w.kind == cpu::WeightKind::s8 ? w.n : 0}, ScalarType::Float);
  cpu::unpack_linear(w, weight.mutable_data_ptr(), static_cast<float*>(scale.mutable_data_ptr()),
                     static_cast<float*>(bias.mutable_data_ptr()));
  return {weight, scale, bias};
}

namespace {

// Rows of blocks and the blocks in each, as a file may hold them.
void check_index(const char* op, const Tensor& crow, const Tensor& col, int64_t block_rows, int64_t block_columns,
                 int64_t blocks) {
  require(crow.dim() == 1 && crow.size(0) == block_rows + 1, op, ": expected crow of shape [ceil(N / rows) + 1] = [",
          block_rows + 1, "]. Got ", shape_of(crow), ".");
  require(col.dim() == 1 && col.size(0) == blocks, op, ": expected col of shape [blocks] = [", blocks, "]. Got ",
          shape_of(col), ".");
  const int32_t* begin = static_cast<const int32_t*>(crow.const_data_ptr());
  const int32_t* at = static_cast<const int32_t*>(col.const_data_ptr());
  require(begin[0] == 0 && begin[block_rows] == blocks, op, ": expected crow from 0 to ", blocks, ". Got ", begin[0],
          " to ", begin[block_rows], ".");
  for (int64_t i = 0; i < block_rows; ++i)
    require(begin[i] <= begin[i + 1] && begin[i + 1] <= blocks, op, ": expected crow to ascend. Got ", begin[i],
            " before ", begin[i + 1], " at row ", i, ".");
  for (int64_t i = 0; i < block_rows; ++i)
    for (int64_t b = begin[i]; b < begin[i + 1]; ++b) {
      require(at[b] >= 0 && at[b] < block_columns, op, ": expected col in [0, ", block_columns, "). Got ", at[b],
              " in row ", i, ".");
      require(b == begin[i] || at[b - 1] < at[b], op, ": expected col to ascend within a row. Got ", at[b],
              " twice or after ", b == begin[i] ? 0 : at[b - 1], " in row ", i, ".");
    }
}

}  // namespace

Tensor pack_sparse_linear(const Tensor& crow, const Tensor& col, const Tensor& values, int64_t n, int64_t k,
                          std::optional<Tensor> weight_scale, std::optional<Tensor> bias, double input_scale,
                          int64_t input_zero_point, double output_scale, int64_t form) {
  const char* op = "pack_sparse_linear";
  require(n >= 0 && k >= 0 && n <= INT32_MAX && k <= INT32_MAX, op, ": expected n and k in [0, 2^31). Got ", n, " and ",
          k, ".");
  require(values.dim() == 3 && values.size(1) > 0 && values.size(2) > 0 && values.size(1) <= INT32_MAX &&
              values.size(2) <= INT32_MAX,
          op, ": expected values of shape [blocks, rows, columns] with rows and columns in [1, 2^31). Got ",
          shape_of(values), ".");
  require(form >= 0 && form <= 2, op, ": expected form 0 (by rule), 1 (panels) or 2 (tokens). Got ", form, ".");
  const Tensor begin = expect(op, "crow", crow, ScalarType::Int), at = expect(op, "col", col, ScalarType::Int);
  const bool integer = values.scalar_type() == ScalarType::Char;
  require(values.is_cpu(), op, ": expected values on the CPU. Got another device.");
  require(integer || is_activation_dtype(values.scalar_type()), op,
          ": expected values of dtype float32, bfloat16, float16 or int8. Got ", dtype_name(values.scalar_type()), ".");
  const Tensor v = widened(dense(values));
  const bool bf16 = v.scalar_type() == ScalarType::BFloat16;
  const int64_t rows = v.size(1), columns = v.size(2);
  check_index(op, begin, at, (n + rows - 1) / rows, (k + columns - 1) / columns, v.size(0));
  const cpu::WeightKind kind = integer ? cpu::WeightKind::s8 : bf16 ? cpu::WeightKind::bf16 : cpu::WeightKind::f32;
  Tensor scale;
  require(integer == weight_scale.has_value(), op, ": expected weight_scale with int8 values, and only there. Got ",
          weight_scale ? "one" : "none", ".");
  if (integer) {
    scale = expect(op, "weight_scale", *weight_scale, ScalarType::Float);
    check_int8(op, scale, n, k, input_scale, input_zero_point, output_scale);
    check_codes(op, "values", v);
  } else {
    require(input_scale == 0.0 && input_zero_point == 0 && output_scale == 0.0, op,
            ": expected input_scale, input_zero_point and output_scale with int8 values only. Got float values.");
  }
  Layer layer = layer_of(op, kind, n, k, bias, input_scale, input_zero_of(input_scale, input_zero_point), output_scale);
  require(cpu::dword_count(kind, k) <= cpu::kSparseDwords, op, ": expected K <= ", cpu::kSparseDwords * (bf16 ? 2 : 1),
          ". Got ", k, ".");
  const bool tall = rows % cpu::kHalfPanel == 0;
  const cpu::Layout layout = form ? static_cast<cpu::Layout>(form) : tall ? cpu::Layout::panels : cpu::Layout::tokens;
  layer.header.layout = static_cast<int16_t>(layout);
  if (layout == cpu::Layout::tokens) layer.header.features = rows % 4 == 0 ? 4 : rows % 2 == 0 ? 2 : 1;
  const cpu::Blocks blocks{static_cast<const int32_t*>(begin.const_data_ptr()),
                           static_cast<const int32_t*>(at.const_data_ptr()), v.const_data_ptr(), rows, columns};
  std::optional<cpu::OrderedWeights> ordered;
  if (layout == cpu::Layout::panels && cpu::takes_order(layer.header)) {
    ordered = cpu::order_blocks(layer.header, blocks);
    ordered->measure(layer.header);
  } else {
    cpu::measure_sparse(layer.header, blocks);
  }
  require(layer.header.entries <= UINT32_MAX, op, ": expected fewer than 2^32 stored steps of K. Got ",
          layer.header.entries, ".");
  Tensor out = empty_weights(cpu::packed_bytes(layer.header));
  cpu::pack_sparse(layer.header, blocks, ordered ? &*ordered : nullptr,
                   integer ? static_cast<const float*>(scale.const_data_ptr()) : nullptr, integer ? scale.numel() : 0,
                   layer.bias_data, out.mutable_data_ptr());
  return out;
}

}  // namespace bertkern::ops
