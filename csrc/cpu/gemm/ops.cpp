// linear, qgemm, quantize_rows over torch tensors.
#include "cpu/ops.h"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "cpu/check.h"
#include "cpu/gemm/linear.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace bertkern::ops {

namespace {

using cpu::Linear;
using cpu::Rows;

Tensor residual_rows(const char* op, const std::optional<Tensor>& residual, int64_t m, int64_t n, Tensor& hold,
                     const float*& data) {
  data = nullptr;
  if (!residual) return {};
  Tensor r = expect_float(op, "residual", *residual);
  require(r.numel() == m * n && (r.dim() == 0 || n == 0 || r.size(r.dim() - 1) == n), op,
          ": expected residual of shape [..., N] with ", m, " rows of ", n, ". Got ", shape_of(r), ".");
  data = as_float_rows(r, m, n, hold);
  return r;
}

ScalarType output_dtype(const char* op, std::optional<ScalarType> asked, ScalarType otherwise) {
  const ScalarType dtype = asked.value_or(otherwise);
  require(is_activation_dtype(dtype), op, ": expected out_dtype float32, bfloat16 or float16. Got ", dtype_name(dtype),
          ".");
  return dtype;
}

constexpr int64_t kBlockBytes = 512 * 1024;  // half of the L2 of the processors with AVX-512

thread_local cpu::Scratch operand_memory;

// Packs all groups, then multiplies; columns are split where there are few rows.
template <class PackGroup>
void multiply(const Linear& w, int64_t m, const cpu::Output& output, const int32_t* init, const float* fixed_scale,
              int32_t zero, PackGroup&& pack_group) {
  if (m == 0 || w.n == 0) return;
  const int64_t dwords = (cpu::rows_dwords(w, m) + 15) / 16 * 16;
  uint32_t* data = operand_memory.get<uint32_t>(dwords + m + 16);
  float* scale = w.kind == cpu::WeightKind::s8 ? reinterpret_cast<float*>(data + dwords) : nullptr;
  if (scale && fixed_scale) std::copy_n(fixed_scale, m, scale);
  Rows rows = cpu::make_rows(w, m, data, scale);
  // Ready codes have one zero point.
  if (fixed_scale) rows.zero = zero, rows.zeros = nullptr;
  const int64_t threads = cpu::thread_count();
  const int64_t pack_tasks = m * w.k < 32768 ? 1 : std::min(rows.groups, 4 * threads);
  cpu::parallel(pack_tasks, [&](int64_t task) {
    for (int64_t g = rows.groups * task / pack_tasks; g < rows.groups * (task + 1) / pack_tasks; ++g)
      pack_group(rows, g);
  });
  const bool small = static_cast<double>(m) * w.n * w.k < 500000.0;
  // Groups: a block's operand stays in L2 while the panels pass, the fewer times the better.
  const int64_t fits = kBlockBytes / (rows.group_dwords() * 4);
  const int64_t block = w.layout == cpu::Layout::tokens ? cpu::kTokenGroups : std::max<int64_t>(4, fits);
  const int64_t blocks = (rows.groups + block - 1) / block;
  const int64_t cuts =
      small ? 1 : std::min<int64_t>(w.panels, std::max<int64_t>(1, (4 * threads + blocks - 1) / blocks));
  const int64_t columns = threads == 1 ? 1 : cuts;
  cpu::parallel(small ? 1 : blocks * columns, [&](int64_t task) {
    if (small) return cpu::gemm(w, rows, 0, rows.groups, 0, w.panels, output, init);
    const int64_t b = task / columns, c = task % columns;
    cpu::gemm(w, rows, b * block, std::min(rows.groups, (b + 1) * block), w.panels * c / columns,
              w.panels * (c + 1) / columns, output, init);
  });
}

Linear checked_linear(const char* op, const Tensor& packed, int64_t out_features, Tensor& hold) {
  hold = expect(op, "packed", packed, ScalarType::Byte);
  Linear w;
  require(cpu::view_linear(hold.const_data_ptr(), hold.numel(), w), op,
          ": expected packed weights from pack_linear, pack_qlinear or pack_sparse_linear. Got ", hold.numel(),
          " other bytes.");
  require(w.n == out_features, op, ": expected out_features = ", w.n, " as packed. Got ", out_features, ".");
  return w;
}

}  // namespace

int64_t cpu_isa() { return static_cast<int64_t>(cpu::active_isa()); }

Tensor linear(const Tensor& x, const Tensor& packed, int64_t out_features, int64_t activation,
              std::optional<Tensor> residual, std::optional<ScalarType> out_dtype) {
  const char* op = "linear";
  const Tensor in = expect_float(op, "x", x);
  Tensor weights, hold, residual_hold;
  const Linear w = checked_linear(op, packed, out_features, weights);
  require(in.dim() >= 1 && in.size(in.dim() - 1) == w.k, op, ": expected x of shape [..., K] = [..., ", w.k, "]. Got ",
          shape_of(in), ".");
  std::vector<int64_t> shape = shape_vector(in);
  shape.back() = w.n;
  int64_t m = 1;
  for (size_t i = 0; i + 1 < shape.size(); ++i) m *= shape[i];
  cpu::Output output;
  output.activation = checked_activation(op, activation);
  const Tensor keep = residual_rows(op, residual, m, w.n, residual_hold, output.residual);
  const ScalarType dtype = output_dtype(op, out_dtype, in.scalar_type());
  Tensor out = empty(shape, dtype);
  output.residual_pitch = w.n, output.out_pitch = w.n, output.dtype = kernel_dtype(dtype);
  output.out = out.mutable_data_ptr();
  const float* rows = as_float_rows(in, m, w.k, hold);
  multiply(w, m, output, nullptr, nullptr, w.input_zero,
           [&](const Rows& r, int64_t g) { cpu::pack_group(w, r, g, rows, w.k); });
  return out;
}

std::tuple<Tensor, Tensor> quantize_rows(const Tensor& x, double scale, int64_t zero_point, bool is_unsigned) {
  const char* op = "quantize_rows";
  const Tensor in = expect_float(op, "x", x);
  require(in.dim() >= 1, op, ": expected x of shape [..., K]. Got a scalar.");
  require(std::isfinite(scale) && scale >= 0.0, op, ": expected scale >= 0 (0: per row). Got ", scale, ".");
  require(is_unsigned || zero_point == 0, op, ": expected zero_point = 0 for signed codes. Got ", zero_point, ".");
  require(!is_unsigned || (scale > 0.0 && zero_point >= 0 && zero_point <= 255 && zero_point != 128), op,
          ": expected a static scale and a zero_point in [0, 255] other than 128 for unsigned codes. Got scale ", scale,
          ", zero_point ", zero_point, ".");
  std::vector<int64_t> shape = shape_vector(in);
  const int64_t k = shape.back();
  const int64_t m = k ? in.numel() / k : 0;
  Tensor hold;
  const float* rows = as_float_rows(in, m, k, hold);
  Tensor codes = empty(shape, is_unsigned ? ScalarType::Byte : ScalarType::Char);
  shape.pop_back();
  Tensor scales = empty(shape, ScalarType::Float);
  uint8_t* out = static_cast<uint8_t*>(codes.mutable_data_ptr());
  float* steps = static_cast<float*>(scales.mutable_data_ptr());
  const int32_t zero = is_unsigned ? static_cast<int32_t>(zero_point) : cpu::kSignedZero;
  const int64_t tasks = m * k < 32768 ? 1 : std::min<int64_t>(m, 4 * cpu::thread_count());
  cpu::parallel(tasks, [&](int64_t task) {
    for (int64_t r = m * task / tasks; r < m * (task + 1) / tasks; ++r) {
      steps[r] = cpu::row_kernels().quantize_row(rows + r * k, k, static_cast<float>(scale), zero, out + r * k);
      if (!is_unsigned) cpu::row_kernels().flip_row(out + r * k, k, 0x80, out + r * k);
    }
  });
  return {codes, scales};
}

namespace {

// The checked left operand of qgemm and qgemm_requantize.
struct Codes {
  Tensor codes, scale;
  int64_t m;
  std::vector<float> row_scale;
  std::vector<int32_t> init;  // empty: the weights' own zero point
  uint8_t xor_mask;
  int32_t zero;
};

Codes checked_codes(const char* op, const Linear& w, const Tensor& codes, const Tensor& scale, int64_t zero_point) {
  require(w.kind == cpu::WeightKind::s8, op, ": expected packed int8 weights (pack_qlinear). Got float weights.");
  const bool is_signed = codes.scalar_type() == ScalarType::Char;
  Codes a;
  a.codes = expect(op, "codes", codes, is_signed ? ScalarType::Char : ScalarType::Byte);
  require(a.codes.dim() == 2 && a.codes.size(1) == w.k, op, ": expected codes of shape [M, K] = [M, ", w.k, "]. Got ",
          shape_of(a.codes), ".");
  require(is_signed ? zero_point == 0 : zero_point >= 0 && zero_point <= 255, op,
          ": expected zero_point 0 for int8 codes, [0, 255] for uint8. Got ", zero_point, ".");
  a.m = a.codes.size(0);
  a.scale = expect(op, "scale", scale, ScalarType::Float);
  require(a.scale.numel() == 1 || a.scale.numel() == a.m, op, ": expected scale of shape [M] = [", a.m,
          "] or [1]. Got ", shape_of(a.scale), ".");
  const float* steps = static_cast<const float*>(a.scale.const_data_ptr());
  a.row_scale.resize(static_cast<size_t>(a.m));
  for (int64_t r = 0; r < a.m; ++r) a.row_scale[static_cast<size_t>(r)] = steps[a.scale.numel() == 1 ? 0 : r];
  const int64_t zero = is_signed ? cpu::kSignedZero : zero_point;
  if (!w.init || zero != w.input_zero) {
    a.init.resize(static_cast<size_t>(w.panels * cpu::kPanel));
    cpu::init_of(w, zero, a.init.data());
  }
  a.xor_mask = is_signed ? 0x80 : 0;
  a.zero = static_cast<int32_t>(zero);
  return a;
}

thread_local cpu::Scratch requantize_memory, requantize_operand;

cpu::Output output_of(const Linear& w, int64_t activation, ScalarType dtype, Tensor& out, const char* op) {
  cpu::Output output;
  output.activation = checked_activation(op, activation);
  output.residual_pitch = w.n, output.out_pitch = w.n, output.dtype = kernel_dtype(dtype);
  output.out = out.mutable_data_ptr();
  return output;
}

void multiply_codes(const Linear& w, const Codes& a, const cpu::Output& output) {
  const uint8_t* data = static_cast<const uint8_t*>(a.codes.const_data_ptr());
  multiply(w, a.m, output, a.init.empty() ? nullptr : a.init.data(), a.row_scale.data(), a.zero,
           [&](const Rows& r, int64_t g) { cpu::pack_code_group(w, r, g, data, a.xor_mask); });
}

// A row's range is known only when the row is complete: a task takes whole rows, few enough to stay in L2.
void multiply_requantize(const Linear& w, const Codes& a, cpu::Activation activation, uint8_t* target, float* steps) {
  const uint8_t* data = static_cast<const uint8_t*>(a.codes.const_data_ptr());
  const int64_t block_rows = 48, threads = cpu::thread_count();
  int64_t blocks = (a.m + block_rows - 1) / block_rows;
  blocks = std::min(a.m, (blocks + threads - 1) / threads * threads);
  cpu::parallel(blocks, [&](int64_t b) {
    const int64_t r0 = a.m * b / blocks, count = a.m * (b + 1) / blocks - r0;
    const int64_t dwords = (cpu::rows_dwords(w, count) + 15) / 16 * 16;
    uint32_t* operand = requantize_operand.get<uint32_t>(dwords + count + 16);
    float* row_scale = reinterpret_cast<float*>(operand + dwords);
    std::copy_n(a.row_scale.data() + r0, count, row_scale);
    Rows rows = cpu::make_rows(w, count, operand, row_scale);
    rows.zero = a.zero, rows.zeros = nullptr;
    for (int64_t g = 0; g < rows.groups; ++g) cpu::pack_code_group(w, rows, g, data + r0 * w.k, a.xor_mask);
    float* wide = requantize_memory.get<float>(count * w.n);
    cpu::Output output;
    output.activation = activation, output.out = wide, output.out_pitch = w.n;
    cpu::gemm(w, rows, 0, rows.groups, 0, w.panels, output, a.init.empty() ? nullptr : a.init.data());
    for (int64_t r = 0; r < count; ++r) {
      uint8_t* row = target + (r0 + r) * w.n;
      steps[r0 + r] = cpu::row_kernels().quantize_row(wide + r * w.n, w.n, 0.0f, cpu::kSignedZero, row);
      cpu::row_kernels().flip_row(row, w.n, 0x80, row);
    }
  });
}

}  // namespace

Tensor qgemm(const Tensor& codes, const Tensor& scale, int64_t zero_point, const Tensor& packed, int64_t out_features,
             int64_t activation, std::optional<Tensor> residual, std::optional<ScalarType> out_dtype) {
  const char* op = "qgemm";
  Tensor weights, residual_hold;
  const Linear w = checked_linear(op, packed, out_features, weights);
  const Codes a = checked_codes(op, w, codes, scale, zero_point);
  const ScalarType dtype = output_dtype(op, out_dtype, ScalarType::Float);
  Tensor out = empty({a.m, w.n}, dtype);
  cpu::Output output = output_of(w, activation, dtype, out, op);
  const Tensor keep = residual_rows(op, residual, a.m, w.n, residual_hold, output.residual);
  multiply_codes(w, a, output);
  return out;
}

std::tuple<Tensor, Tensor> qgemm_requantize(const Tensor& codes, const Tensor& scale, int64_t zero_point,
                                            const Tensor& packed, int64_t out_features, int64_t activation,
                                            double out_scale, int64_t out_zero_point) {
  const char* op = "qgemm_requantize";
  Tensor weights;
  const Linear w = checked_linear(op, packed, out_features, weights);
  const Codes a = checked_codes(op, w, codes, scale, zero_point);
  require(std::isfinite(out_scale) && out_scale >= 0.0, op, ": expected out_scale >= 0 (0: a scale per row). Got ",
          out_scale, ".");
  require(out_zero_point >= 0 && out_zero_point <= 255 && (out_zero_point == 0 || out_scale > 0.0), op,
          ": expected out_zero_point 0 (signed codes), or in [1, 255] beside an out_scale. Got ", out_zero_point, ".");
  const ScalarType dtype = out_zero_point ? ScalarType::Byte : ScalarType::Char;
  Tensor out = empty({a.m, w.n}, dtype);
  Tensor out_scales = empty({a.m}, ScalarType::Float);
  cpu::Output output = output_of(w, activation, dtype, out, op);
  float* steps = static_cast<float*>(out_scales.mutable_data_ptr());
  if (out_scale > 0.0) {
    output.code_step = static_cast<float>(out_scale), output.code_zero = static_cast<int32_t>(out_zero_point);
    multiply_codes(w, a, output);
    // A code cannot say NaN: the row's scale does.
    for (int64_t r = 0; r < a.m; ++r)
      steps[r] = std::isfinite(a.row_scale[static_cast<size_t>(r)]) ? output.code_step : std::nanf("");
  } else if (a.m > 0 && w.n > 0) {
    multiply_requantize(w, a, output.activation, static_cast<uint8_t*>(output.out), steps);
  }
  return {out, out_scales};
}

Tensor qgemm_seconds(const Tensor& codes, const Tensor& scale, std::vector<Tensor> packed, int64_t out_features,
                     int64_t activation, bool requantize, ScalarType out_dtype, int64_t calls) {
  const char* op = "qgemm_seconds";
  require(calls > 0 && !packed.empty(), op, ": expected calls > 0 and packed weights. Got ", calls, " and ",
          packed.size(), ".");
  std::vector<Linear> linears;
  for (Tensor& p : packed) linears.push_back(checked_linear(op, p, out_features, p));
  const Codes a = checked_codes(op, linears[0], codes, scale, 0);
  for (const Linear& w : linears)
    require(cpu::same_operand(w, linears[0]), op, ": expected packed weights of one kind, K and zero point.");
  Tensor out =
      empty({a.m, out_features}, requantize ? ScalarType::Char : output_dtype(op, out_dtype, ScalarType::Float));
  Tensor steps = empty({a.m}, ScalarType::Float), seconds = empty({calls}, ScalarType::Double);
  const cpu::Output output = output_of(linears[0], activation, out.scalar_type(), out, op);
  for (int64_t i = 0; i < calls; ++i) {
    const Linear& w = linears[static_cast<size_t>(i) % linears.size()];
    const auto start = std::chrono::steady_clock::now();
    if (requantize)
      multiply_requantize(w, a, output.activation, static_cast<uint8_t*>(output.out),
                          static_cast<float*>(steps.mutable_data_ptr()));
    else
      multiply_codes(w, a, output);
    const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - start;
    static_cast<double*>(seconds.mutable_data_ptr())[i] = passed.count();
  }
  return seconds;
}

}  // namespace bertkern::ops
