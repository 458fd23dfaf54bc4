// groupwise_linear_mma over CUDA tensors.
#include "cuda/groupwise/groupwise.h"

#include "cuda/check.h"
#include "cuda/linear_ops.h"
#include "cuda/ops.h"

namespace bertkern::ops::cuda {

namespace {

int64_t rounded_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// As bertkern.ops.groupwise_planes.strip_count and part_bytes count them.
int64_t strips_of(int64_t k, int64_t group, int64_t held) {
  return rounded_up(group ? held * rounded_up(group, 32) / 32 : rounded_up(k, 32) / 32, 4);
}

int64_t bytes_of(int64_t features, int64_t strips, int64_t bits) {
  const int64_t wide = bits == 3 ? 2 : bits;
  const int64_t tiles = rounded_up(strips * wide, 8) / 8 + (bits == 3 ? rounded_up(strips, 8) / 8 : 0);
  return tiles * rounded_up(features, 128) * 32;
}

}  // namespace

Tensor groupwise_linear_mma(const Tensor& x, std::vector<Tensor> codes, std::vector<Tensor> members,
                            const Tensor& scale, std::optional<Tensor> shift, std::optional<Tensor> bias,
                            std::optional<Tensor> residual, std::vector<int64_t> bits, int64_t group,
                            int64_t activation, std::optional<ScalarType> out_dtype) {
  const char* op = "groupwise_linear_mma";
  const ScalarType type = x.scalar_type(), out = out_dtype.value_or(type);
  require(type == ScalarType::Half || type == ScalarType::BFloat16, op,
          ": expected x of dtype float16 or bfloat16. Got ", dtype_name(type), ".");
  const Rows rows(op, "x", x, false);
  const Tensor of_groups = expect_cuda(op, "scale", scale, ScalarType::Float, x);
  require(of_groups.dim() == 2, op, ": expected scale of shape [G, N]. Got ", shape_of(of_groups), ".");
  const int64_t groups = of_groups.size(0), n = of_groups.size(1), k = rows.width;
  require(group >= 0 && groups == (group ? (k + group - 1) / group : 1), op, ": expected x of shape [..., K] as ",
          groups, " groups of the weight have it. Got ", shape_of(x), ".");

  bertkern::cuda::Groupwise p = {};
  p.x = rows.data(), p.x_stride = rows.stride, p.bf16 = type == ScalarType::BFloat16;
  p.scale = static_cast<const float*>(of_groups.const_data_ptr());
  Tensor hold_shift = x, hold_bias = x, hold_residual = x;
  if (shift) {
    hold_shift = expect_cuda(op, "shift", *shift, ScalarType::Float, x);
    require(shape_vector(hold_shift) == shape_vector(of_groups), op, ": expected shift of scale's shape ",
            shape_of(of_groups), ". Got ", shape_of(hold_shift), ".");
    p.shift = static_cast<const float*>(hold_shift.const_data_ptr());
  }
  if (bias) {
    hold_bias = expect_cuda(op, "bias", *bias, ScalarType::Float, x);
    require(hold_bias.dim() == 1 && hold_bias.size(0) == n, op, ": expected bias float32 of shape [", n, "]. Got ",
            shape_of(hold_bias), ".");
    p.bias = static_cast<const float*>(hold_bias.const_data_ptr());
  }
  std::vector<int64_t> shape = shape_vector(x);
  shape.back() = n;
  if (residual) {
    hold_residual = expect_residual(op, *residual, x, shape);
    p.residual = hold_residual.const_data_ptr(), p.residual_type = type_of(hold_residual.scalar_type());
    p.residual_stride = n;
  }
  require(is_activation_dtype(out), op, ": expected out_dtype to be float32, bfloat16 or float16. Got ",
          dtype_name(out), ".");
  p.activation = checked_gpu_activation(op, activation);
  p.tokens = static_cast<int>(rows.rows), p.n = static_cast<int>(n), p.k = static_cast<int>(k);
  p.group = static_cast<int>(group);

  // The parts, all checked before the first of them is launched.
  const size_t parts = codes.size();
  require(parts > 0 && bits.size() == parts && members.size() == (parts > 1 ? parts : 0), op,
          ": expected codes, bits and members of each part. Got ", parts, " codes, ", bits.size(), " bits and ",
          members.size(), " members.");
  const int64_t all = group ? groups : n;
  int64_t counted = 0, most_strips = 0;
  std::vector<bertkern::cuda::Groupwise> launches;
  for (size_t i = 0; i < parts; ++i) {
    require(bertkern::cuda::groupwise_supported(static_cast<int>(bits[i])), op, ": expected bits 2, 3, 4 or 8. Got ",
            bits[i], ".");
    bertkern::cuda::Groupwise part = p;
    int64_t count = all;
    if (parts > 1) {
      members[i] = expect_cuda(op, "members", members[i], ScalarType::Int, x);
      count = members[i].numel();
      part.members = static_cast<const int*>(members[i].const_data_ptr());
    }
    counted += count;
    const int64_t features = group ? n : count, strips = strips_of(k, group, count);
    const int64_t size = bytes_of(features, strips, bits[i]);
    codes[i] = expect_cuda(op, "codes", codes[i], ScalarType::Byte, x);
    require(codes[i].dim() == 1 && codes[i].size(0) == size, op, ": expected codes uint8 of shape [", size, "]. Got ",
            shape_of(codes[i]), ".");
    part.codes = static_cast<const uint8_t*>(codes[i].const_data_ptr());
    require(reinterpret_cast<uintptr_t>(part.codes) % 16 == 0, op,
            ": expected codes that begin at a multiple of 16 bytes. Got others.");
    part.features = static_cast<int>(features), part.held = group ? static_cast<int>(count) : 0;
    part.bits = static_cast<int>(bits[i]), part.strips = static_cast<int>(strips);
    most_strips = strips > most_strips ? strips : most_strips;
    launches.push_back(part);
  }
  require(counted == all, op, ": expected members int32, ", all, " of all parts. Got ", counted, ".");
  require(most_strips < 1 << 16, op, ": expected fewer than 65536 strips of 32 columns. Got ", most_strips, ".");

  Tensor y = empty_beside(x, shape, out);
  const int splits = bertkern::cuda::groupwise_splits(static_cast<int>(n), static_cast<int>(most_strips));
  const int64_t slots = splits * (group ? static_cast<int64_t>(parts) : 1);
  Tensor partial = y;
  if (slots > 1) partial = empty_beside(x, {slots, rows.rows, n}, ScalarType::Float);
  const OnDevice device(x);
  int slot = 0;
  for (bertkern::cuda::Groupwise& part : launches) {
    part.y = y.mutable_data_ptr(), part.y_type = type_of(out), part.y_stride = n;
    part.splits = splits, part.slot = slot;
    part.partial = slots > 1 ? static_cast<float*>(partial.mutable_data_ptr()) : nullptr;
    if (group) slot += splits;
    check_launch(op, bertkern::cuda::launch_groupwise(part, device.stream()));
  }
  if (slots > 1)
    check_launch(op, bertkern::cuda::launch_add_in_order(launches[0], static_cast<int>(slots), device.stream()));
  return y;
}

}  // namespace bertkern::ops::cuda
