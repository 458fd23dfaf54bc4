// mobilebert_encoder and trigram_embed over torch tensors.
#include "cpu/ops.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/check.h"
#include "cpu/encoder/packing.h"
#include "cpu/mobilebert/mobilebert.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace bertkern::ops {

namespace {

thread_local cpu::Scratch hidden_memory, row_memory;

// `hold`: stays alive to the end of the call.
cpu::Linear packed_linear(const char* op, const std::string& name, Tensor& hold) {
  cpu::Linear linear;
  const bool bytes = hold.is_cpu() && hold.scalar_type() == ScalarType::Byte;
  if (bytes) hold = dense(hold);
  require(bytes && cpu::view_linear(hold.const_data_ptr(), hold.numel(), linear), op, ": expected packed weights for ",
          name, ". Got ", hold.numel(), " other values.");
  return linear;
}

void expect_shape(const char* op, const std::string& name, const cpu::Linear& linear, int64_t n, int64_t k) {
  require(linear.n == n && linear.k == k, op, ": expected ", name, " of shape [N, K] = [", n, ", ", k, "]. Got [",
          linear.n, ", ", linear.k, "].");
}

}  // namespace

Tensor mobilebert_encoder(const Tensor& x, std::optional<Tensor> mask, std::vector<Tensor> linears, const Tensor& norms,
                          std::optional<Tensor> eps, std::vector<int64_t> heads, int64_t bottleneck, int64_t activation,
                          bool keep_padding, bool all_hidden_states, bool empty_attends, bool exact_attention,
                          std::optional<Tensor> head_mask, bool packed) {
  const char* op = "mobilebert_encoder";
  require(x.dim() == 3, op, ": expected x of shape [B, L, H]. Got ", shape_of(x), ".");
  const Tensor in = expect_float(op, "x", x);
  const int64_t batch = in.size(0), length = in.size(1), h = in.size(2);
  require(bottleneck >= 0 && bottleneck < cpu::kBottlenecks, op,
          ": expected bottleneck 0 (none), 1 (input), 2 (shared) or 3 (all). Got ", bottleneck, ".");
  const auto form = static_cast<cpu::Bottleneck>(bottleneck);
  const bool narrow = form != cpu::Bottleneck::none, shared = form == cpu::Bottleneck::shared;
  const int64_t layers = static_cast<int64_t>(heads.size()), count = static_cast<int64_t>(linears.size());
  const int64_t fixed = 4 + 2 * narrow + shared, each = layers > 0 ? count / layers : 0, ffns = (each - fixed) / 2;
  require(layers > 0 && ffns > 0 && count == layers * (fixed + 2 * ffns), op, ": expected ", fixed,
          " packed linears a layer and two for each feed-forward, of ", layers, " layers. Got ", count, ".");

  std::vector<cpu::MobileLayer> stack(static_cast<size_t>(layers));
  int64_t width = h;
  for (int64_t l = 0; l < layers; ++l) {
    cpu::MobileLayer& e = stack[static_cast<size_t>(l)];
    e.ffn.resize(static_cast<size_t>(2 * ffns));
    e.heads = heads[static_cast<size_t>(l)];
    const std::string of = " of layer " + std::to_string(l);
    size_t next = static_cast<size_t>(l * each);
    const auto take = [&](const char* name, cpu::Linear& linear) {
      linear = packed_linear(op, name + of, linears[next++]);
    };
    if (narrow) take("input", e.input);
    if (shared) take("shared", e.shared);
    take("q", e.q), take("k", e.k), take("v", e.v), take("o", e.o);
    for (size_t f = 0; f < e.ffn.size(); f += 2) take("ffn1", e.ffn[f]), take("ffn2", e.ffn[f + 1]);
    if (narrow) take("out", e.out);

    if (narrow && l == 0) width = e.input.n;
    const int64_t wide = e.q.n;
    const int64_t qk_in = form == cpu::Bottleneck::none || form == cpu::Bottleneck::input ? h : width;
    if (narrow) expect_shape(op, "input" + of, e.input, width, h);
    if (shared) expect_shape(op, "shared" + of, e.shared, width, h);
    expect_shape(op, "q" + of, e.q, wide, qk_in);
    expect_shape(op, "k" + of, e.k, wide, qk_in);
    expect_shape(op, "v" + of, e.v, wide, form == cpu::Bottleneck::all ? width : h);
    expect_shape(op, "o" + of, e.o, width, wide);
    for (size_t f = 0; f < e.ffn.size(); f += 2) {
      expect_shape(op, "ffn1" + of, e.ffn[f], e.ffn[f].n, width);
      expect_shape(op, "ffn2" + of, e.ffn[f + 1], width, e.ffn[f].n);
    }
    if (narrow) expect_shape(op, "out" + of, e.out, h, width);
    require(e.heads >= 0 && (e.heads == 0 ? wide == 0 : wide % e.heads == 0), op, ": expected layer ", l, "'s width ",
            wide, " to be a multiple of its ", e.heads, " heads.");
  }

  // Inside: the bottlenecks', the attention's, the feed-forwards'; then the one of H features.
  const int64_t inside = narrow + shared + 1 + ffns, values = 2 * (inside * width + narrow * h);
  const Tensor n = expect(op, "norms", norms, ScalarType::Float);
  require(n.dim() == 2 && n.size(0) == layers && n.size(1) == values, op,
          ": expected norms of shape [layers, 2 * features of all norms] = [", layers, ", ", values, "]. Got ",
          shape_of(n), ".");
  Tensor floors;
  if (eps) {
    floors = expect(op, "eps", *eps, ScalarType::Float);
    require(floors.dim() == 1 && floors.size(0) == inside + narrow, op,
            ": expected eps of shape [norms of a layer] = [", inside + narrow, "]. Got ", shape_of(floors), ".");
    const float* value = static_cast<const float*>(floors.const_data_ptr());
    for (int64_t i = 0; i < floors.numel(); ++i)
      require(std::isfinite(value[i]) && value[i] >= 0.0f, op, ": expected eps >= 0. Got ", value[i], ".");
  }
  for (int64_t l = 0; l < layers; ++l)
    stack[static_cast<size_t>(l)].norms = static_cast<const float*>(n.const_data_ptr()) + l * values;

  const cpu::Activation act = checked_activation(op, activation);
  const Masked masked = packed ? Masked::none : keep_padding ? Masked::all : Masked::up_to_last;
  Packing packing = pack_tokens(op, mask, batch, length, masked, empty_attends);
  attend_evenly(packing, *std::max_element(heads.begin(), heads.end()), length);
  Tensor factors;
  if (head_mask) factors = mask_heads(op, packing, *head_mask, heads);

  States states(packing, in, layers, all_hidden_states, packed);
  const int64_t tokens = packing.tokens();
  if (tokens == 0) return states.tensor();
  float* hidden = hidden_memory.get<float>(tokens * h);
  load_tokens(packing, in, hidden);
  cpu::MobileCall call{};
  call.layers = stack.data(), call.layer_count = layers, call.hidden = h, call.width = width;
  call.bottleneck = form, call.activation = act;
  call.eps = eps ? static_cast<const float*>(floors.const_data_ptr()) : nullptr;
  call.sequences = packing.sequences.data(), call.sequence_count = batch, call.tokens = tokens;
  call.sequences_pitch = head_mask ? batch : 0;
  call.positions = packing.consecutive ? nullptr : packing.positions.data();
  call.bias_length = length, call.x = hidden;
  call.exact_attention = exact_attention, call.context = &states, call.layer_done = States::store;
  cpu::encode(call);
  return states.tensor();
}

Tensor trigram_embed(std::vector<Tensor> ids, std::vector<Tensor> tables, std::vector<Tensor> scales,
                     std::optional<Tensor> packed, const Tensor& weight, const Tensor& bias, std::optional<double> eps,
                     bool trigram, std::optional<ScalarType> out_dtype) {
  const char* op = "trigram_embed";
  require(!ids.empty() && ids.size() == tables.size() && ids.size() == scales.size(), op,
          ": expected as many tables and scales as ids, at least one. Got ", ids.size(), " ids, ", tables.size(),
          " tables, ", scales.size(), " scales.");
  const int64_t h = weight.numel();
  Tensor g = expect(op, "weight", weight, ScalarType::Float), b = expect(op, "bias", bias, ScalarType::Float);
  require(g.dim() == 1 && b.dim() == 1 && b.size(0) == h, op, ": expected weight and bias of shape [H] = [", h,
          "]. Got ", shape_of(g), " and ", shape_of(b), ".");
  require(!eps || (std::isfinite(*eps) && *eps >= 0.0), op, ": expected eps >= 0. Got ", eps.value_or(0.0), ".");
  require(ids[0].dim() == 2, op, ": expected ids of shape [B, L]. Got ", shape_of(ids[0]), ".");
  require(tables[0].dim() == 2, op, ": expected tables of shape [rows, features]. Got ", shape_of(tables[0]), ".");
  const int64_t e = tables[0].size(1), k = trigram ? 3 * e : e;
  cpu::Linear linear{};
  if (packed) {
    linear = packed_linear(op, "the transformation", *packed);
    expect_shape(op, "the transformation", linear, h, k);
  }
  require(packed || (!trigram && e == h), op, ": expected packed weights of shape [N, K] = [", h, ", ", k,
          "]. Got none.");

  struct Table {
    const int64_t* ids;
    const char* rows;
    cpu::Dtype dtype;
    int64_t width;
    const float* scale;
    bool scale_per_row;
    // acc += row of token t
    void add(const cpu::RowKernels& kernels, int64_t t, float* acc) const {
      const char* row = rows + ids[t] * width * cpu::dtype_size(dtype);
      kernels.add_scaled_row(row, dtype, width, scale[scale_per_row ? ids[t] : 0], acc);
    }
  };
  std::vector<Table> parts;
  for (size_t i = 0; i < ids.size(); ++i) {
    ids[i] = expect(op, "ids", ids[i], ScalarType::Long);
    tables[i] = dense(tables[i]);
    const ScalarType dtype = tables[i].scalar_type();
    require(tables[i].is_cpu() && (is_activation_dtype(dtype) || dtype == ScalarType::Char), op,
            ": expected tables of dtype float32, bfloat16, float16 or int8 on the CPU. Got ", dtype_name(dtype), ".");
    const int64_t width = i == 0 ? e : h;
    require(tables[i].dim() == 2 && tables[i].size(1) == width, op, ": expected table ", i, " of shape [rows, ", width,
            "]. Got ", shape_of(tables[i]), ".");
    scales[i] = expect(op, "scales", scales[i], ScalarType::Float);
    const int64_t rows = tables[i].size(0);
    require(scales[i].numel() == 1 || scales[i].numel() == rows, op, ": expected scales of shape [rows] = [", rows,
            "] or [1]. Got ", shape_of(scales[i]), ".");
    require(shape_vector(ids[i]) == shape_vector(ids[0]), op, ": expected ids of one shape, ", shape_of(ids[0]),
            ". Got ", shape_of(ids[i]), ".");
    const int64_t* values = static_cast<const int64_t*>(ids[i].const_data_ptr());
    for (int64_t t = 0; t < ids[i].numel(); ++t)
      require(values[t] >= 0 && values[t] < rows, op, ": expected ids in [0, ", rows, ") of table ", i, ". Got ",
              values[t], ".");
    parts.push_back({values, static_cast<const char*>(tables[i].const_data_ptr()), kernel_dtype(dtype), width,
                     static_cast<const float*>(scales[i].const_data_ptr()), scales[i].numel() != 1});
  }
  const ScalarType dtype = out_dtype.value_or(ScalarType::Float);
  require(is_activation_dtype(dtype), op, ": expected out_dtype float32, bfloat16 or float16. Got ", dtype_name(dtype),
          ".");
  const int64_t length = ids[0].size(1), tokens = ids[0].numel();
  Tensor out = empty({ids[0].size(0), length, h}, dtype);
  if (tokens == 0) return out;
  char* target = static_cast<char*>(out.mutable_data_ptr());
  std::vector<float> norm(static_cast<size_t>(2 * h));
  std::copy_n(static_cast<const float*>(g.const_data_ptr()), h, norm.begin());
  std::copy_n(static_cast<const float*>(b.const_data_ptr()), h, norm.begin() + h);
  const float floor = static_cast<float>(eps.value_or(0.0));

  const int64_t threads = cpu::thread_count(), blocks = std::min(tokens, (tokens + 64 * threads - 1) / 64);
  cpu::parallel(blocks, [&](int64_t block) {
    const cpu::RowKernels& kernels = cpu::row_kernels();
    const int64_t t0 = tokens * block / blocks, rows = tokens * (block + 1) / blocks - t0;
    float* x = row_memory.get<float>(rows * (k + h));
    float* y = packed ? x + rows * k : x;
    std::fill_n(x, rows * k, 0.0f);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t t = t0 + r, place = t % length;
      float* row = x + r * k;
      if (trigram) {
        if (place + 1 < length) parts[0].add(kernels, t + 1, row);
        if (place > 0) parts[0].add(kernels, t - 1, row + 2 * e);
        row += e;
      }
      parts[0].add(kernels, t, row);
    }
    if (packed) {
      cpu::Output output;
      output.out = y, output.out_pitch = h;
      const cpu::Rows operand = cpu::pack_block(linear, x, k, rows);
      cpu::gemm(linear, operand, 0, operand.groups, 0, linear.panels, output);
    }
    for (int64_t r = 0; r < rows; ++r) {
      float* row = y + r * h;
      for (size_t i = 1; i < parts.size(); ++i) parts[i].add(kernels, t0 + r, row);
      cpu::norm_row(row, h, norm.data(), eps ? &floor : nullptr, row);
      kernels.store_row(row, h, kernel_dtype(dtype), target + (t0 + r) * h * dtype_bytes(dtype));
    }
  });
  return out;
}

}  // namespace bertkern::ops
