// add_layernorm and embed over torch tensors.
#include "cpu/ops.h"

#include <algorithm>
#include <cstring>

#include "cpu/check.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace bertkern::ops {

namespace {

thread_local cpu::Scratch row_memory;

// fp32 gamma and beta of one width.
const float* norm_vector(const char* op, const char* name, const Tensor& t, int64_t width, Tensor& dense_t,
                         Tensor& hold) {
  dense_t = expect_float(op, name, t);
  require(dense_t.dim() == 1 && dense_t.size(0) == width, op, ": expected ", name, " of shape [", width, "]. Got ",
          shape_of(dense_t), ".");
  return as_float_rows(dense_t, 1, width, hold);
}

}  // namespace

Tensor add_layernorm(const Tensor& x, std::optional<Tensor> residual, const Tensor& weight, const Tensor& bias,
                     double eps) {
  const char* op = "add_layernorm";
  const Tensor in = expect_float(op, "x", x);
  require(in.dim() >= 1, op, ": expected x of shape [..., H]. Got a scalar.");
  const std::vector<int64_t> shape = shape_vector(in);
  const int64_t h = shape.back(), rows = h ? in.numel() / h : 0;
  Tensor r, g, b, g_hold, b_hold;
  if (residual) {
    r = expect_float(op, "residual", *residual);
    require(shape_vector(r) == shape, op, ": expected residual of x's shape ", shape_of(in), ". Got ", shape_of(r),
            ".");
  }
  const float* gamma = norm_vector(op, "weight", weight, h, g, g_hold);
  const float* beta = norm_vector(op, "bias", bias, h, b, b_hold);
  Tensor out = empty(shape, in.scalar_type());
  const cpu::Dtype dtype = kernel_dtype(in.scalar_type());
  const int64_t bytes = dtype_bytes(in.scalar_type());
  const char* source = static_cast<const char*>(in.const_data_ptr());
  char* target = static_cast<char*>(out.mutable_data_ptr());
  const int64_t tasks = rows * h < 32768 ? 1 : std::min<int64_t>(rows, 4 * cpu::thread_count());
  cpu::parallel(tasks, [&](int64_t task) {
    const cpu::RowKernels& kernels = cpu::row_kernels();
    float* row = row_memory.get<float>(h);
    for (int64_t i = rows * task / tasks; i < rows * (task + 1) / tasks; ++i) {
      kernels.load_row(source + i * h * bytes, dtype, h, row);
      if (residual)
        kernels.add_scaled_row(static_cast<const char*>(r.const_data_ptr()) + i * h * dtype_bytes(r.scalar_type()),
                               kernel_dtype(r.scalar_type()), h, 1.0f, row);
      kernels.layer_norm_row(row, h, gamma, beta, static_cast<float>(eps), row);
      kernels.store_row(row, h, dtype, target + i * h * bytes);
    }
  });
  return out;
}

namespace {

// Rows of few bits (bertkern/formats/groupwise.py, table_rows): scale, zero point, a little-endian bit stream of codes.
constexpr int64_t kRowNumbers = 8;

// Bits of the codes of h columns in rows of so many bytes, or 0.
int row_bits(int64_t h, int64_t bytes) {
  for (int bits = 2; bits <= 8 && h >= 8; ++bits)
    if (kRowNumbers + (h * bits + 7) / 8 == bytes) return bits;
  return 0;
}

// Codes of a row, less the middle of the codes.
void centred_codes(const uint8_t* stream, int bits, int64_t h, int8_t* codes) {
  const int middle = 1 << (bits - 1);
  const uint64_t mask = (uint64_t{1} << bits) - 1;
  int64_t i = 0;
  for (; i + 8 <= h; i += 8, stream += bits) {
    uint64_t word = 0;
    std::memcpy(&word, stream, static_cast<size_t>(bits));
    for (int j = 0; j < 8; ++j)
      codes[i + j] = static_cast<int8_t>(static_cast<int>(word >> (j * bits) & mask) - middle);
  }
  if (i == h) return;
  uint64_t word = 0;
  std::memcpy(&word, stream, static_cast<size_t>(((h - i) * bits + 7) / 8));
  for (int j = 0; i + j < h; ++j)
    codes[i + j] = static_cast<int8_t>(static_cast<int>(word >> (j * bits) & mask) - middle);
}

thread_local cpu::Scratch code_memory;

}  // namespace

Tensor embed(std::vector<Tensor> ids, std::vector<Tensor> tables, std::vector<Tensor> scales, const Tensor& weight,
             const Tensor& bias, double eps, std::optional<ScalarType> out_dtype) {
  const char* op = "embed";
  require(!ids.empty() && ids.size() == tables.size() && ids.size() == scales.size(), op,
          ": expected as many tables and scales as ids, at least one. Got ", ids.size(), " ids, ", tables.size(),
          " tables, ", scales.size(), " scales.");
  const int64_t h = weight.numel();
  Tensor g, b, g_hold, b_hold;
  const float* gamma = norm_vector(op, "weight", weight, h, g, g_hold);
  const float* beta = norm_vector(op, "bias", bias, h, b, b_hold);
  struct Table {
    const int64_t* ids;
    const char* rows;
    cpu::Dtype dtype;
    int64_t row_bytes;
    const float* scale;
    bool scale_per_row;
    int bits;  // 0: values or int8 codes
  };
  std::vector<Table> parts;
  std::vector<int64_t> shape;
  for (size_t i = 0; i < ids.size(); ++i) {
    ids[i] = expect(op, "ids", ids[i], ScalarType::Long);
    tables[i] = dense(tables[i]);
    const ScalarType dtype = tables[i].scalar_type();
    const bool low = dtype == ScalarType::Byte;
    require(tables[i].is_cpu() && (is_activation_dtype(dtype) || dtype == ScalarType::Char || low), op,
            ": expected tables of dtype float32, bfloat16, float16, int8 or uint8 on the CPU. Got ", dtype_name(dtype),
            ".");
    const int bits = low && tables[i].dim() == 2 ? row_bits(h, tables[i].size(1)) : 0;
    require(!low || bits, op, ": expected uint8 tables of shape [rows, 8 + bytes of ", h,
            " codes of 2 to 8 bits], as table_rows makes them. Got ", shape_of(tables[i]), ".");
    require(low || (tables[i].dim() == 2 && tables[i].size(1) == h), op,
            ": expected tables of shape [rows, H] = [rows, ", h, "]. Got ", shape_of(tables[i]), ".");
    scales[i] = expect(op, "scales", scales[i], ScalarType::Float);
    const int64_t rows = tables[i].size(0);
    require(scales[i].numel() == 1 || scales[i].numel() == rows, op, ": expected scales of shape [rows] = [", rows,
            "] or [1]. Got ", shape_of(scales[i]), ".");
    if (i == 0) shape = shape_vector(ids[0]);
    require(shape_vector(ids[i]) == shape, op, ": expected ids of one shape, ", shape_of(ids[0]), ". Got ",
            shape_of(ids[i]), ".");
    const int64_t* values = static_cast<const int64_t*>(ids[i].const_data_ptr());
    for (int64_t t = 0; t < ids[i].numel(); ++t)
      require(values[t] >= 0 && values[t] < rows, op, ": expected ids in [0, ", rows, ") of table ", i, ". Got ",
              values[t], ".");
    parts.push_back({values, static_cast<const char*>(tables[i].const_data_ptr()),
                     low ? cpu::Dtype::s8 : kernel_dtype(dtype),
                     low ? tables[i].size(1) : h * (dtype == ScalarType::Char ? 1 : dtype_bytes(dtype)),
                     static_cast<const float*>(scales[i].const_data_ptr()), scales[i].numel() != 1, bits});
  }
  const ScalarType dtype = out_dtype.value_or(ScalarType::Float);
  require(is_activation_dtype(dtype), op, ": expected out_dtype float32, bfloat16 or float16. Got ", dtype_name(dtype),
          ".");
  const int64_t tokens = ids[0].numel();
  shape.push_back(h);
  Tensor out = empty(shape, dtype);
  char* target = static_cast<char*>(out.mutable_data_ptr());
  const int64_t tasks = tokens * h < 32768 ? 1 : std::min<int64_t>(tokens, 4 * cpu::thread_count());
  // Rows lie anywhere in memory: those of later tokens are fetched early.
  constexpr int64_t kAhead = 8;
  const auto fetch = [&](int64_t t) {
    for (const Table& part : parts) {
      const int64_t id = part.ids[t];
      if (part.scale_per_row) __builtin_prefetch(part.scale + id);
      for (int64_t b = 0; b < part.row_bytes; b += 64) __builtin_prefetch(part.rows + id * part.row_bytes + b);
    }
  };
  cpu::parallel(tasks, [&](int64_t task) {
    const cpu::RowKernels& kernels = cpu::row_kernels();
    float* row = row_memory.get<float>(h);
    const int64_t begin = tokens * task / tasks, end = tokens * (task + 1) / tasks;
    for (int64_t t = begin; t < std::min(end, begin + kAhead); ++t) fetch(t);
    for (int64_t t = begin; t < end; ++t) {
      if (t + kAhead < end) fetch(t + kAhead);
      std::fill_n(row, h, 0.0f);
      for (const Table& part : parts) {
        const int64_t id = part.ids[t];
        const float scale = part.scale[part.scale_per_row ? id : 0];
        const char* data = part.rows + id * part.row_bytes;
        if (part.bits) {
          float numbers[2];  // scale, zero point
          std::memcpy(numbers, data, sizeof numbers);
          int8_t* codes = code_memory.get<int8_t>(h);
          centred_codes(reinterpret_cast<const uint8_t*>(data) + kRowNumbers, part.bits, h, codes);
          const float step = numbers[0] * scale, shift = (numbers[1] - static_cast<float>(1 << (part.bits - 1))) * step;
          kernels.add_scaled_row(codes, part.dtype, h, step, row);
          for (int64_t i = 0; i < h; ++i) row[i] -= shift;
          continue;
        }
        kernels.add_scaled_row(data, part.dtype, h, scale, row);
      }
      kernels.layer_norm_row(row, h, gamma, beta, static_cast<float>(eps), row);
      kernels.store_row(row, h, kernel_dtype(dtype), target + t * h * dtype_bytes(dtype));
    }
  });
  return out;
}

}  // namespace bertkern::ops
