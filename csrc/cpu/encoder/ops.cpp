// encoder over torch tensors: finds the real tokens, packs them, runs the layers, pads once.
#include "cpu/ops.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/check.h"
#include "cpu/encoder/encoder.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace bertkern::ops {

namespace {

constexpr const char* kOp = "encoder";

struct Packing {
  std::vector<cpu::Sequence> sequences;
  std::vector<int64_t> source;     // row of x of each packed token
  std::vector<int32_t> positions;  // in its sequence
  bool consecutive = true;
  std::vector<int64_t> even;  // the sequences without a token that attend evenly
};

template <class T>
bool nonzero(const void* data, int64_t i) {
  return static_cast<const T*>(data)[i] != T(0);
}

bool is_token(const Tensor& mask, const void* data, int64_t i) {
  switch (mask.scalar_type()) {
    case ScalarType::Float:
      return nonzero<float>(data, i);
    case ScalarType::Double:
      return nonzero<double>(data, i);
    case ScalarType::BFloat16:
    case ScalarType::Half:
      return (static_cast<const uint16_t*>(data)[i] & 0x7fff) != 0;
    case ScalarType::Int:
      return nonzero<int32_t>(data, i);
    case ScalarType::Long:
      return nonzero<int64_t>(data, i);
    case ScalarType::Short:
      return nonzero<int16_t>(data, i);
    default:
      return nonzero<uint8_t>(data, i);  // bool, uint8, int8
  }
}

bool is_mask_dtype(ScalarType t) {
  switch (t) {
    case ScalarType::Bool:
    case ScalarType::Byte:
    case ScalarType::Char:
    case ScalarType::Short:
    case ScalarType::Int:
    case ScalarType::Long:
    case ScalarType::Double:
      return true;
    default:
      return is_activation_dtype(t);
  }
}

// Keys first. The masked positions before a sequence's last token follow as queries only, because poolers read the
// first position of a left-padded sequence; those after it only with keep_padding. A sequence without a token keeps all
// its positions: they attend to nothing, or evenly to all of them where empty_attends.
Packing pack_tokens(const std::optional<Tensor>& mask, int64_t batch, int64_t length, bool keep_padding,
                    bool empty_attends) {
  Packing p;
  p.source.reserve(static_cast<size_t>(batch * length));
  p.positions.reserve(static_cast<size_t>(batch * length));
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t begin = static_cast<int64_t>(p.source.size());
    const auto add = [&](int64_t i) {
      if (i != static_cast<int64_t>(p.source.size()) - begin) p.consecutive = false;
      p.source.push_back(b * length + i), p.positions.push_back(static_cast<int32_t>(i));
    };
    if (!mask) {
      for (int64_t i = 0; i < length; ++i) add(i);
      p.sequences.push_back({begin, length, length, nullptr});
      continue;
    }
    const void* data = mask->const_data_ptr();
    int64_t end = 0;
    for (int64_t i = 0; i < length; ++i)
      if (is_token(*mask, data, b * length + i)) add(i), end = i + 1;
    int64_t keys = static_cast<int64_t>(p.source.size()) - begin;
    if (keep_padding || keys == 0) end = length;
    if (keys < end)
      for (int64_t i = 0; i < end; ++i)
        if (!is_token(*mask, data, b * length + i)) add(i);
    if (keys == 0 && empty_attends) keys = length, p.even.push_back(b);
    p.sequences.push_back({begin, end, keys, nullptr});
  }
  return p;
}

thread_local cpu::Scratch hidden_memory;

}  // namespace

Tensor encoder(const Tensor& x, std::optional<Tensor> mask, std::optional<Tensor> position_bias,
               std::vector<Tensor> linears, const Tensor& norms, std::vector<int64_t> heads, int64_t activation,
               double eps, bool keep_padding, bool all_hidden_states, bool empty_attends) {
  require(x.dim() == 3, kOp, ": expected x of shape [B, L, H]. Got ", shape_of(x), ".");
  const Tensor in = expect_float(kOp, "x", x);
  const int64_t batch = in.size(0), length = in.size(1), h = in.size(2);
  const int64_t layers = static_cast<int64_t>(heads.size());
  require(layers > 0 && static_cast<int64_t>(linears.size()) == 6 * layers, kOp,
          ": expected 6 packed linears a layer (q, k, v, o, ffn1, ffn2) for ", layers, " layers. Got ", linears.size(),
          ".");
  require(std::isfinite(eps) && eps >= 0.0, kOp, ": expected eps >= 0. Got ", eps, ".");
  const Tensor n = expect(kOp, "norms", norms, ScalarType::Float);
  require(n.dim() == 3 && n.size(0) == layers && n.size(1) == 4 && n.size(2) == h, kOp,
          ": expected norms of shape [layers, 4, H] = [", layers, ", 4, ", h, "]. Got ", shape_of(n), ".");

  std::vector<cpu::EncoderLayer> stack(static_cast<size_t>(layers));
  static const char* const kNames[6] = {"q", "k", "v", "o", "ffn1", "ffn2"};
  for (int64_t l = 0; l < layers; ++l) {
    cpu::EncoderLayer& e = stack[static_cast<size_t>(l)];
    cpu::Linear* parts[6] = {&e.q, &e.k, &e.v, &e.o, &e.ffn1, &e.ffn2};
    for (int i = 0; i < 6; ++i) {
      Tensor& packed = linears[static_cast<size_t>(6 * l + i)];  // stays alive to the end of the call
      const bool bytes = packed.is_cpu() && packed.scalar_type() == ScalarType::Byte;
      if (bytes) packed = dense(packed);
      require(bytes && cpu::view_linear(packed.const_data_ptr(), packed.numel(), *parts[i]), kOp,
              ": expected packed weights for ", kNames[i], " of layer ", l, ". Got ", packed.numel(), " other values.");
    }
    const int64_t wide = e.q.n, ffn = e.ffn1.n, count = heads[static_cast<size_t>(l)];
    const int64_t expected[6][2] = {{wide, h}, {wide, h}, {wide, h}, {h, wide}, {ffn, h}, {h, ffn}};
    for (int i = 0; i < 6; ++i)
      require(parts[i]->n == expected[i][0] && parts[i]->k == expected[i][1], kOp, ": expected ", kNames[i],
              " of layer ", l, " of shape [N, K] = [", expected[i][0], ", ", expected[i][1], "]. Got [", parts[i]->n,
              ", ", parts[i]->k, "].");
    require(count >= 0 && (count == 0 ? wide == 0 : wide % count == 0), kOp, ": expected layer ", l, "'s width ", wide,
            " to be a multiple of its ", count, " heads.");
    e.norms = static_cast<const float*>(n.const_data_ptr()) + l * 4 * h;
    e.heads = count;
  }

  Tensor m;
  if (mask) {
    m = dense(*mask);
    require(m.is_cpu() && m.dim() == 2 && m.size(0) == batch && m.size(1) == length, kOp,
            ": expected mask of shape [B, L] = [", batch, ", ", length, "] on the CPU. Got ", shape_of(m), ".");
    require(is_mask_dtype(m.scalar_type()), kOp, ": expected mask of dtype bool, an integer or a float. Got ",
            dtype_name(m.scalar_type()), ".");
  }
  Packing packing =
      pack_tokens(mask ? std::optional<Tensor>(m) : std::nullopt, batch, length, keep_padding, empty_attends);
  Tensor bias;
  if (position_bias) {
    bias = expect(kOp, "position_bias", *position_bias, ScalarType::Float);
    const int64_t count = heads[0];
    require(bias.dim() == 4 && (bias.size(0) == 1 || bias.size(0) == batch) && bias.size(1) == count &&
                bias.size(2) == length && bias.size(3) == length,
            kOp, ": expected position_bias of shape [1 or B, heads, L, L] = [", batch, ", ", count, ", ", length, ", ",
            length, "]. Got ", shape_of(bias), ".");
    for (int64_t l = 1; l < layers; ++l)
      require(heads[static_cast<size_t>(l)] == count, kOp,
              ": expected as many heads in every layer beside a position_bias.");
    for (int64_t b = 0; b < batch; ++b)
      packing.sequences[static_cast<size_t>(b)].bias =
          static_cast<const float*>(bias.const_data_ptr()) + (bias.size(0) == 1 ? 0 : b * count * length * length);
  }
  // A bias beside which every score vanishes, as beside the lowest float that masks are made of; this one stays finite
  // where a kernel scales it.
  std::vector<float> even;
  if (!packing.even.empty()) {
    const int64_t most = *std::max_element(heads.begin(), heads.end());
    even.assign(static_cast<size_t>(most * length * length), -1e30f);
    for (const int64_t b : packing.even) packing.sequences[static_cast<size_t>(b)].bias = even.data();
  }

  std::vector<int64_t> shape = {batch, length, h};
  if (all_hidden_states) shape.insert(shape.begin(), layers);
  Tensor out = empty(shape, in.scalar_type());
  const int64_t bytes = dtype_bytes(in.scalar_type());
  const cpu::Dtype dtype = kernel_dtype(in.scalar_type());
  char* target = static_cast<char*>(out.mutable_data_ptr());
  const int64_t tokens = static_cast<int64_t>(packing.source.size());
  if (tokens != batch * length) std::memset(target, 0, static_cast<size_t>(out.numel() * bytes));
  if (batch * length == 0) return out;

  float* hidden = hidden_memory.get<float>(tokens * h);
  const cpu::RowKernels& kernels = cpu::row_kernels();
  const char* source = static_cast<const char*>(in.const_data_ptr());
  for (int64_t t = 0; t < tokens; ++t)
    kernels.load_row(source + packing.source[static_cast<size_t>(t)] * h * bytes, dtype, h, hidden + t * h);

  struct Writer {
    const Packing& packing;
    char* target;
    int64_t h, bytes, layers, layer_bytes;
    cpu::Dtype dtype;
    bool all;
  } writer{packing, target, h, bytes, layers, batch * length * h * bytes, dtype, all_hidden_states};
  cpu::EncoderCall call{};
  call.layers = stack.data(), call.layer_count = layers, call.hidden = h;
  call.activation = checked_activation(kOp, activation), call.eps = static_cast<float>(eps);
  call.sequences = packing.sequences.data(), call.sequence_count = batch, call.tokens = tokens;
  call.positions = packing.consecutive ? nullptr : packing.positions.data();
  call.bias_length = length, call.x = hidden;
  call.context = &writer;
  call.layer_done = [](void* context, int64_t layer, const float* rows) {
    const Writer& w = *static_cast<Writer*>(context);
    if (!w.all && layer + 1 != w.layers) return;
    char* base = w.target + (w.all ? layer * w.layer_bytes : 0);
    const cpu::RowKernels& k = cpu::row_kernels();
    for (size_t t = 0; t < w.packing.source.size(); ++t)
      k.store_row(rows + static_cast<int64_t>(t) * w.h, w.h, w.dtype, base + w.packing.source[t] * w.h * w.bytes);
  };
  cpu::encode(call);
  return out;
}

}  // namespace bertkern::ops
