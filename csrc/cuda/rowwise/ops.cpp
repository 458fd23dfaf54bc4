// quantize_rows, quantize_codes, add_layernorm, add_layernorm_codes and embed over CUDA tensors.
#include "cuda/ops.h"

#include <cmath>

#include "cuda/check.h"
#include "cuda/rowwise/rowwise.h"

namespace bertkern::ops::cuda {

namespace {

using bertkern::cuda::Codes;
using bertkern::cuda::EmbedParams;
using bertkern::cuda::Grid;
using bertkern::cuda::RowParams;
using bertkern::cuda::Rows;
using bertkern::cuda::Type;

Rows rows_of(const Tensor& t, int64_t pitch) {
  return {const_cast<void*>(t.const_data_ptr()), type_of(t.scalar_type()), false, pitch};
}

// Contiguous x [..., H] as rows, and its shape.
Tensor expect_rows(const char* op, const Tensor& x, RowParams& p, std::vector<int64_t>& shape) {
  const Tensor in = expect_cuda_float(op, "x", x, x);
  require(in.dim() >= 1, op, ": expected x of shape [..., H]. Got a scalar.");
  shape = shape_vector(in);
  const int64_t width = shape.back();
  require(width <= bertkern::cuda::kWidestRow, op, ": expected rows of at most ", bertkern::cuda::kWidestRow,
          " elements. Got ", width, ".");
  p.width = static_cast<int32_t>(width);
  p.rows = width ? in.numel() / width : 0;
  require(p.rows <= 0x7fffffff, op, ": expected at most 2147483647 rows. Got ", p.rows, ".");
  p.x = rows_of(in, width);
  return in;
}

Tensor expect_norm(const char* op, const char* name, const Tensor& t, const Tensor& x, int64_t width, Rows& rows) {
  const Tensor in = expect_cuda_float(op, name, t, x);
  require(in.dim() == 1 && in.size(0) == width, op, ": expected ", name, " of shape [", width, "]. Got ", shape_of(in),
          ".");
  rows = rows_of(in, width);
  return in;
}

Tensor expect_live(const char* op, const std::optional<Tensor>& live, const Tensor& x, RowParams& p) {
  if (!live) return x;
  const Tensor in = expect_cuda(op, "live", *live, ScalarType::Int, x);
  require(in.numel() == 1, op, ": expected live of one element. Got ", in.numel(), ".");
  p.live = static_cast<const int32_t*>(in.const_data_ptr());
  return in;
}

struct CodeTensors {
  Tensor codes, scale, zero;
};

// Step and zero point as pack_qlinear has them: step 0 is a row's own, with zero point 128 symmetric; a given step has
// signed codes without zero point for 0 and 128. Codes are of x's shape, their rows begin at multiples of 16 bytes;
// scale and zero point (none where symmetric) are vectors.
CodeTensors make_codes(const char* op, const Tensor& x, const std::vector<int64_t>& shape, double step,
                       int64_t zero_point, RowParams& p) {
  Codes& out = p.out;
  require(std::isfinite(step) && step >= 0.0, op, ": expected step >= 0 (0: per row). Got ", step, ".");
  require(zero_point >= 0 && zero_point <= 255, op, ": expected zero_point in [0, 255]. Got ", zero_point, ".");
  require(step > 0.0 || zero_point == 0 || zero_point == 128, op,
          ": expected zero_point 0 or 128 (symmetric) for steps of the rows' own. Got ", zero_point, ".");
  out.symmetric_codes = zero_point == 128 || (step > 0.0 && zero_point == 0);
  out.grid = step > 0.0 ? Grid::fixed : out.symmetric_codes ? Grid::symmetric : Grid::own;
  out.step = static_cast<float>(step);
  out.zero_point = static_cast<int32_t>(zero_point) - 128;
  std::vector<int64_t> padded = shape;
  const int64_t pitch = padded.back() = (shape.back() + 15) / 16 * 16;
  CodeTensors made;
  made.codes = empty_beside(x, padded, ScalarType::Char);
  made.scale = empty_beside(x, {p.rows}, ScalarType::Float);
  made.zero = empty_beside(x, {out.symmetric_codes ? 0 : p.rows}, ScalarType::Int);
  out.codes = rows_of(made.codes, pitch);
  out.scale = static_cast<float*>(made.scale.mutable_data_ptr());
  if (!out.symmetric_codes) out.zero = static_cast<int32_t*>(made.zero.mutable_data_ptr());
  if (pitch != shape.back())
    made.codes = torch::stable::narrow(made.codes, static_cast<int64_t>(shape.size()) - 1, 0, shape.back());
  return made;
}

// What is common to add_layernorm and add_layernorm_codes.
struct Norm {
  RowParams p;
  std::vector<int64_t> shape;
  Tensor x, residual, gamma, beta, y;

  Norm(const char* op, const Tensor& x_, const std::optional<Tensor>& residual_, const Tensor& weight,
       const Tensor& bias, double eps)
      : x(expect_rows(op, x_, p, shape)), residual(x), gamma(x), beta(x), y(x) {
    if (residual_) {
      residual = expect_cuda_float(op, "residual", *residual_, x);
      require(shape_vector(residual) == shape, op, ": expected residual of x's shape ", shape_of(x), ". Got ",
              shape_of(residual), ".");
      p.residual = rows_of(residual, p.width);
    }
    gamma = expect_norm(op, "weight", weight, x, p.width, p.gamma);
    beta = expect_norm(op, "bias", bias, x, p.width, p.beta);
    p.eps = static_cast<float>(eps);
    y = empty_beside(x, shape, x.scalar_type());
    p.y = rows_of(y, p.width);
  }
};

Tensor normalize(const char* op, const Tensor& x, const std::optional<Tensor>& residual, const Tensor& weight,
                 const Tensor& bias, const std::optional<Tensor>& live, double eps) {
  Norm norm(op, x, residual, weight, bias, eps);
  const Tensor count = expect_live(op, live, norm.x, norm.p);
  const OnDevice device(norm.x);
  check_launch(op, bertkern::cuda::launch_normalize(norm.p, device.stream()));
  return norm.y;
}

}  // namespace

std::tuple<Tensor, Tensor> quantize_rows(const Tensor& x, double scale, int64_t zero_point, bool is_unsigned) {
  const char* op = "quantize_rows";
  RowParams p;
  std::vector<int64_t> shape;
  const Tensor in = expect_rows(op, x, p, shape);
  require(std::isfinite(scale) && scale >= 0.0, op, ": expected scale >= 0 (0: per row). Got ", scale, ".");
  require(is_unsigned || zero_point == 0, op, ": expected zero_point = 0 for signed codes. Got ", zero_point, ".");
  require(!is_unsigned || (scale > 0.0 && zero_point >= 0 && zero_point <= 255 && zero_point != 128), op,
          ": expected a static scale and a zero_point in [0, 255] other than 128 for unsigned codes. Got scale ", scale,
          ", zero_point ", zero_point, ".");
  Tensor codes = empty_beside(in, shape, is_unsigned ? ScalarType::Byte : ScalarType::Char);
  p.out.codes = rows_of(codes, p.width);
  shape.pop_back();
  Tensor scales = empty_beside(in, shape, ScalarType::Float);
  p.out.scale = static_cast<float*>(scales.mutable_data_ptr());
  p.out.grid = scale > 0.0 ? Grid::fixed : Grid::symmetric;
  p.out.symmetric_codes = !is_unsigned;
  p.out.step = static_cast<float>(scale);
  p.out.zero_point = static_cast<int32_t>(zero_point) - 128;
  const OnDevice device(in);
  check_launch(op, bertkern::cuda::launch_quantize(p, device.stream()));
  return {codes, scales};
}

std::tuple<Tensor, Tensor, Tensor> quantize_codes(const Tensor& x, std::optional<Tensor> live, double step,
                                                  int64_t zero_point) {
  const char* op = "quantize_codes";
  RowParams p;
  std::vector<int64_t> shape;
  const Tensor in = expect_rows(op, x, p, shape);
  const Tensor count = expect_live(op, live, in, p);
  const CodeTensors made = make_codes(op, in, shape, step, zero_point, p);
  const OnDevice device(in);
  check_launch(op, bertkern::cuda::launch_quantize(p, device.stream()));
  return {made.codes, made.scale, made.zero};
}

Tensor add_layernorm(const Tensor& x, std::optional<Tensor> residual, const Tensor& weight, const Tensor& bias,
                     double eps) {
  return normalize("add_layernorm", x, residual, weight, bias, std::nullopt, eps);
}

Tensor add_layernorm_live(const Tensor& x, std::optional<Tensor> residual, const Tensor& weight, const Tensor& bias,
                          std::optional<Tensor> live, double eps) {
  return normalize("add_layernorm_live", x, residual, weight, bias, live, eps);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layernorm_codes(const Tensor& x, std::optional<Tensor> residual,
                                                               const Tensor& weight, const Tensor& bias,
                                                               std::optional<Tensor> live, double eps, double step,
                                                               int64_t zero_point) {
  const char* op = "add_layernorm_codes";
  Norm norm(op, x, residual, weight, bias, eps);
  const Tensor count = expect_live(op, live, norm.x, norm.p);
  const CodeTensors made = make_codes(op, norm.x, norm.shape, step, zero_point, norm.p);
  const OnDevice device(norm.x);
  check_launch(op, bertkern::cuda::launch_normalize(norm.p, device.stream()));
  return {norm.y, made.codes, made.scale, made.zero};
}

Tensor embed(std::vector<Tensor> ids, std::vector<Tensor> tables, std::vector<Tensor> scales, const Tensor& weight,
             const Tensor& bias, double eps, std::optional<ScalarType> out_dtype) {
  const char* op = "embed";
  require(!ids.empty() && ids.size() == tables.size() && ids.size() == scales.size(), op,
          ": expected as many tables and scales as ids, at least one. Got ", ids.size(), " ids, ", tables.size(),
          " tables, ", scales.size(), " scales.");
  require(ids.size() <= static_cast<size_t>(bertkern::cuda::kTables), op, ": expected at most ",
          bertkern::cuda::kTables, " tables on a GPU. Got ", ids.size(), ".");
  EmbedParams p;
  const int64_t h = weight.numel();
  require(h <= bertkern::cuda::kWidestRow, op, ": expected rows of at most ", bertkern::cuda::kWidestRow,
          " elements. Got ", h, ".");
  p.width = static_cast<int32_t>(h);
  const Tensor gamma = expect_norm(op, "weight", weight, weight, h, p.gamma);
  const Tensor beta = expect_norm(op, "bias", bias, weight, h, p.beta);
  p.eps = static_cast<float>(eps);
  std::vector<int64_t> shape;
  for (size_t i = 0; i < ids.size(); ++i) {
    ids[i] = expect_cuda(op, "ids", ids[i], ScalarType::Long, weight);
    require_cuda(op, "tables", tables[i], weight);
    tables[i] = dense(tables[i]);
    const ScalarType dtype = tables[i].scalar_type();
    const bool low = dtype == ScalarType::Byte;
    require(is_activation_dtype(dtype) || dtype == ScalarType::Char || low, op,
            ": expected tables of dtype float32, bfloat16, float16, int8 or uint8. Got ", dtype_name(dtype), ".");
    const int bits = low && tables[i].dim() == 2 ? bertkern::cuda::row_bits(h, tables[i].size(1)) : 0;
    require(!low || bits, op, ": expected uint8 tables of shape [rows, 8 + bytes of ", h,
            " codes of 2 to 8 bits], as table_rows makes them. Got ", shape_of(tables[i]), ".");
    require(low || (tables[i].dim() == 2 && tables[i].size(1) == h), op,
            ": expected tables of shape [rows, H] = [rows, ", h, "]. Got ", shape_of(tables[i]), ".");
    scales[i] = expect_cuda(op, "scales", scales[i], ScalarType::Float, weight);
    const int64_t rows = tables[i].size(0);
    require(scales[i].numel() == 1 || scales[i].numel() == rows, op, ": expected scales of shape [rows] = [", rows,
            "] or [1]. Got ", shape_of(scales[i]), ".");
    if (i == 0) shape = shape_vector(ids[0]);
    require(shape_vector(ids[i]) == shape, op, ": expected ids of one shape, ", shape_of(ids[0]), ". Got ",
            shape_of(ids[i]), ".");
    p.table[i] = {static_cast<const int64_t*>(ids[i].const_data_ptr()),
                  rows_of(tables[i], tables[i].size(1)),
                  rows,
                  static_cast<const float*>(scales[i].const_data_ptr()),
                  scales[i].numel() != 1,
                  bits};
  }
  p.tables = static_cast<int32_t>(ids.size());
  p.rows = ids[0].numel();
  require(p.rows <= 0x7fffffff, op, ": expected at most 2147483647 tokens. Got ", p.rows, ".");
  const ScalarType dtype = out_dtype.value_or(ScalarType::Float);
  require(is_activation_dtype(dtype), op, ": expected out_dtype float32, bfloat16 or float16. Got ", dtype_name(dtype),
          ".");
  shape.push_back(h);
  const Tensor out = empty_beside(weight, shape, dtype);
  p.y = rows_of(out, h);
  const OnDevice device(weight);
  check_launch(op, bertkern::cuda::launch_embed(p, device.stream()));
  return out;
}

}  // namespace bertkern::ops::cuda
