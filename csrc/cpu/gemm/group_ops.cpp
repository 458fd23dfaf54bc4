// pack_groupwise, unpack_groupwise over torch tensors.
#include <cmath>

#include "cpu/check.h"
#include "cpu/gemm/linear.h"
#include "cpu/gemm/pack_ops.h"
#include "cpu/gemm/weights.h"
#include "cpu/ops.h"

namespace bertkern::ops {

namespace {

struct Checked {
  Tensor codes, scale, zero, bits;
  cpu::GroupwiseWeight weight{};
};

// All but the codes.
Checked checked_grouping(const char* op, const Tensor& bits, int64_t n, int64_t k, int64_t axis, int64_t group_size) {
  require(n >= 0 && k >= 0 && n <= INT32_MAX && k <= INT32_MAX, op, ": expected n and k in [0, 2^31). Got ", n, " and ",
          k, ".");
  require(axis == 0 || axis == 1, op, ": expected axis 0 (groups along N) or 1 (along K). Got ", axis, ".");
  require(group_size >= 1 && group_size <= INT32_MAX, op, ": expected group_size in [1, 2^31). Got ", group_size, ".");
  Checked c;
  c.weight.along_k = axis == 1, c.weight.group_size = group_size;
  const int64_t groups = c.weight.groups(n, k);
  c.bits = expect(op, "bits", bits, ScalarType::Byte);
  require(c.bits.dim() == 1 && c.bits.size(0) == groups, op, ": expected bits of shape [G] = [", groups, "]. Got ",
          shape_of(c.bits), ".");
  c.weight.bits = static_cast<const uint8_t*>(c.bits.const_data_ptr());
  for (int64_t g = 0; g < groups; ++g)
    require(c.weight.bits[g] >= 2 && c.weight.bits[g] <= 8, op, ": expected bits from 2 to 8. Got ",
            static_cast<int>(c.weight.bits[g]), " in group ", g, ".");
  return c;
}

void check_finite(const char* op, const char* name, const Tensor& tensor, bool above_zero) {
  const float* values = static_cast<const float*>(tensor.const_data_ptr());
  for (int64_t i = 0; i < tensor.numel(); ++i)
    require(std::isfinite(values[i]) && (!above_zero || values[i] > 0.0f), op, ": expected finite ", name,
            above_zero ? " above 0" : "", ". Got ", values[i], " at element ", i, ".");
}

}  // namespace

Tensor pack_groupwise(const Tensor& codes, const Tensor& scale, std::optional<Tensor> zero, const Tensor& bits,
                      int64_t n, int64_t k, int64_t axis, int64_t group_size, std::optional<Tensor> bias,
                      ScalarType operand, double input_scale, int64_t input_zero_point) {
  const char* op = "pack_groupwise";
  Checked c = checked_grouping(op, bits, n, k, axis, group_size);
  const bool integer = operand == ScalarType::Char;
  require(integer || operand == ScalarType::Float || operand == ScalarType::BFloat16, op,
          ": expected operand int8, float32 or bfloat16. Got ", dtype_name(operand), ".");
  require(!integer || k <= 32768, op, ": expected K <= 32768, beyond which an int32 sum could overflow. Got ", k, ".");
  check_input(op, input_scale, input_zero_point);
  require(integer || input_scale == 0.0, op, ": expected input_scale with operand int8 only. Got ", input_scale, ".");
  const int64_t bytes = cpu::groupwise_code_bytes(c.weight, n, k), groups = c.weight.groups(n, k);
  c.codes = expect(op, "codes", codes, ScalarType::Byte);
  require(c.codes.dim() == 1 && c.codes.size(0) == bytes, op, ": expected codes of shape [", bytes,
          "], as bits say. Got ", shape_of(c.codes), ".");
  c.scale = expect(op, "scale", scale, ScalarType::Float);
  const bool fits =
      axis == 0 ? c.scale.dim() == 1 && c.scale.size(0) == groups
                : c.scale.dim() == 2 && c.scale.size(1) == groups && (c.scale.size(0) == n || c.scale.size(0) == 1);
  require(fits, op, ": expected scale of shape ", axis == 0 ? "[G]" : "[N or 1, G]", ", G = ", groups, ". Got ",
          shape_of(c.scale), ".");
  check_finite(op, "scales", c.scale, true);
  if (zero) {
    c.zero = expect(op, "zero", *zero, ScalarType::Float);
    require(c.zero.dim() == c.scale.dim() && c.zero.numel() == c.scale.numel(), op,
            ": expected zero of the shape of scale, ", shape_of(c.scale), ". Got ", shape_of(c.zero), ".");
    check_finite(op, "zero points", c.zero, false);
    c.weight.zero = static_cast<const float*>(c.zero.const_data_ptr());
  }
  c.weight.codes = static_cast<const uint8_t*>(c.codes.const_data_ptr());
  c.weight.scale = static_cast<const float*>(c.scale.const_data_ptr());
  c.weight.shared = axis == 1 && c.scale.size(0) == 1;
  cpu::LinearHeader header{};
  header.magic = cpu::kLinearMagic;
  header.kind = static_cast<int32_t>(integer                        ? cpu::WeightKind::s8
                                     : operand == ScalarType::Float ? cpu::WeightKind::f32
                                                                    : cpu::WeightKind::bf16);
  header.n = n, header.k = k;
  header.input_scale = static_cast<float>(input_scale);
  header.input_zero = input_zero_of(input_scale, input_zero_point);
  header.has_bias = bias.has_value();
  Tensor bias_given, bias_rows;
  const float* bias_data = nullptr;
  if (bias) {
    bias_given = expect_float(op, "bias", *bias);
    require(bias_given.dim() == 1 && bias_given.size(0) == n, op, ": expected bias of shape [N] = [", n, "]. Got ",
            shape_of(bias_given), ".");
    bias_data = as_float_rows(bias_given, 1, n, bias_rows);
  }
  cpu::measure_groupwise(header, c.weight);
  require(header.weight_dwords / 16 <= UINT32_MAX, op, ": expected fewer than 2^38 bytes of codes. Got ",
          header.weight_dwords * 4, ".");
  Tensor out = empty_weights(cpu::packed_bytes(header));
  cpu::pack_groupwise(header, c.weight, bias_data, out.mutable_data_ptr());
  return out;
}

Tensor unpack_groupwise(const Tensor& packed, const Tensor& bits) {
  const char* op = "unpack_groupwise";
  const Tensor p = expect(op, "packed", packed, ScalarType::Byte);
  cpu::Linear w;
  require(cpu::view_linear(p.const_data_ptr(), p.numel(), w) && w.layout == cpu::Layout::grouped, op,
          ": expected packed weights from pack_groupwise. Got ", p.numel(), " other bytes.");
  const Checked c = checked_grouping(op, bits, w.n, w.k, w.along_k, w.group_size);
  for (int64_t g = 0; w.along_k && g < w.groups; ++g)
    require(w.group[g].bits == c.weight.bits[g], op, ": expected bits as packed, ", w.group[g].bits, " in group ", g,
            ". Got ", static_cast<int>(c.weight.bits[g]), ".");
  for (int64_t i = 0; !w.along_k && i < w.n; ++i) {
    const int64_t feature = w.column ? w.column[i] : i;
    require(c.weight.bits_at(feature, 0) <= static_cast<int>(w.grouped_panel[i / cpu::kPanel].bits), op,
            ": expected bits as packed. Got more of feature ", feature, ".");
  }
  Tensor codes = empty({cpu::groupwise_code_bytes(c.weight, w.n, w.k)}, ScalarType::Byte);
  cpu::unpack_groupwise(w, c.weight, static_cast<uint8_t*>(codes.mutable_data_ptr()));
  return codes;
}

}  // namespace bertkern::ops
