// encoder over torch tensors: finds the real tokens, packs them, runs the layers, pads once or not at all.
#include "cpu/ops.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/check.h"
#include "cpu/encoder/encoder.h"
#include "cpu/encoder/packing.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace bertkern::ops {

namespace {

constexpr const char* kOp = "encoder";

thread_local cpu::Scratch hidden_memory;

}  // namespace

Tensor encoder(const Tensor& x, std::optional<Tensor> mask, std::optional<Tensor> position_bias,
               std::vector<Tensor> linears, const Tensor& norms, std::vector<int64_t> heads, int64_t activation,
               double eps, bool keep_padding, bool all_hidden_states, bool empty_attends, bool exact_attention,
               std::optional<Tensor> head_mask, bool packed) {
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
      Tensor& blob = linears[static_cast<size_t>(6 * l + i)];  // stays alive to the end of the call
      const bool bytes = blob.is_cpu() && blob.scalar_type() == ScalarType::Byte;
      if (bytes) blob = dense(blob);
      require(bytes && cpu::view_linear(blob.const_data_ptr(), blob.numel(), *parts[i]), kOp,
              ": expected packed weights for ", kNames[i], " of layer ", l, ". Got ", blob.numel(), " other values.");
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

  const Masked masked = packed ? Masked::none : keep_padding ? Masked::all : Masked::up_to_last;
  Packing packing = pack_tokens(kOp, mask, batch, length, masked, empty_attends);
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
  attend_evenly(packing, *std::max_element(heads.begin(), heads.end()), length);
  Tensor factors;
  if (head_mask) factors = mask_heads(kOp, packing, *head_mask, heads);

  States states(packing, in, layers, all_hidden_states, packed);
  const int64_t tokens = packing.tokens();
  if (tokens == 0) return states.tensor();
  float* hidden = hidden_memory.get<float>(tokens * h);
  load_tokens(packing, in, hidden);
  cpu::EncoderCall call{};
  call.layers = stack.data(), call.layer_count = layers, call.hidden = h;
  call.activation = checked_activation(kOp, activation), call.eps = static_cast<float>(eps);
  call.sequences = packing.sequences.data(), call.sequence_count = batch, call.tokens = tokens;
  call.sequences_pitch = head_mask ? batch : 0;
  call.positions = packing.consecutive ? nullptr : packing.positions.data();
  call.bias_length = length, call.x = hidden;
  call.exact_attention = exact_attention, call.context = &states, call.layer_done = States::store;
  cpu::encode(call);
  return states.tensor();
}

}  // namespace bertkern::ops
