#include "cpu/mobilebert/mobilebert.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <utility>

#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace bertkern::cpu {

namespace {

constexpr int64_t kBlockRows = 64;

thread_local Scratch call_memory, operand_memory, block_memory;

int64_t align16(int64_t count) { return (count + 15) / 16 * 16; }

Output rows_of(float* out, int64_t pitch, const float* residual = nullptr) {
  Output made;
  made.out = out, made.out_pitch = pitch, made.residual = residual, made.residual_pitch = pitch;
  return made;
}

struct Product {
  const Linear& linear;
  Output output;
};

// Products of the same fp32 rows, which are packed anew only where a layer takes another operand.
void products(const float* x, int64_t pitch, int64_t rows, std::initializer_list<Product> list) {
  Rows packed{};
  const Linear* before = nullptr;
  for (const Product& p : list) {
    if (!before || !same_operand(p.linear, *before)) packed = pack_block(p.linear, x, pitch, rows);
    gemm(p.linear, packed, 0, packed.groups, 0, p.linear.panels, p.output);
    before = &p.linear;
  }
}

struct MobileEncoder {
  const MobileCall& call;
  int64_t wide = 0, most = 0;                  // widest q, k, v (one of them); widest row of a block but for q, k, v
  void* qkv = nullptr;                         // [tokens][3][wide], of qkv_dtype of the layer
  float *context = nullptr, *inner = nullptr;  // [tokens][wide], [tokens][width]

  explicit MobileEncoder(const MobileCall& c) : call(c), most(c.hidden) {
    for (int64_t l = 0; l < call.layer_count; ++l) {
      wide = std::max(wide, layer(l).q.n);
      for (const Linear& linear : layer(l).ffn) most = std::max(most, linear.n);
    }
  }

  const MobileLayer& layer(int64_t l) const { return call.layers[l]; }
  bool narrow() const { return call.bottleneck != Bottleneck::none; }

  void run() {
    const int64_t n = call.tokens;
    const int64_t parts[] = {align16(n * 3 * wide), align16(n * wide), narrow() ? n * call.width : 0};
    float* memory = call_memory.get<float>(parts[0] + parts[1] + parts[2]);
    qkv = memory, context = memory + parts[0], inner = context + parts[1];
    const int64_t threads = thread_count();
    int64_t blocks = (n + kBlockRows - 1) / kBlockRows;
    blocks = std::min(n, (blocks + threads - 1) / threads * threads);
    const auto begin = [&](int64_t b) { return n * b / blocks; };
    parallel(blocks, [&](int64_t b) { block_qkv(0, begin(b), begin(b + 1) - begin(b)); });
    for (int64_t l = 0; l < call.layer_count; ++l) {
      attention(l);
      parallel(blocks, [&](int64_t b) {
        block_rest(l, begin(b), begin(b + 1) - begin(b));
        if (l + 1 < call.layer_count) block_qkv(l + 1, begin(b), begin(b + 1) - begin(b));
      });
      call.layer_done(call.context, l, call.x);
    }
  }

  // ------------------------------------------------------------------------------------------- attention
  // bf16 where the processor multiplies it and the layer is not more exact itself. Outputs that are rounded to codes
  // are those of a simulation, which is held to.
  WeightKind operand_of(const MobileLayer& e) const {
    if (call.exact_attention) return WeightKind::f32;
    for (const Linear* linear : {&e.q, &e.k, &e.v})
      if (linear->kind == WeightKind::f32 || linear->output_scale > 0.0f) return WeightKind::f32;
    return attention_kernel(WeightKind::bf16, Dtype::bf16) ? WeightKind::bf16 : WeightKind::f32;
  }
  Dtype qkv_dtype(const MobileLayer& e) const { return operand_of(e) == WeightKind::bf16 ? Dtype::bf16 : Dtype::f32; }

  // Part i of q, k, v from row r on.
  void* qkv_at(const MobileLayer& e, int64_t r, int64_t i) const {
    return static_cast<char*>(qkv) + (r * 3 + i) * wide * dtype_size(qkv_dtype(e));
  }
  Output qkv_output(const MobileLayer& e, int64_t r, int64_t i) const {
    Output out;
    out.out = qkv_at(e, r, i), out.out_pitch = 3 * wide, out.dtype = qkv_dtype(e);
    return out;
  }

  void attention(int64_t l) const {
    const MobileLayer& e = layer(l);
    if (!e.heads) return;
    AttentionCall a{};
    a.q = qkv_at(e, 0, 0), a.k = qkv_at(e, 0, 1), a.v = qkv_at(e, 0, 2), a.dtype = qkv_dtype(e);
    a.q_pitch = a.k_pitch = a.v_pitch = 3 * wide, a.out = context, a.out_pitch = wide;
    a.heads = e.heads, a.head_dim = a.q_head = a.k_head = a.v_head = a.out_head = e.q.n / e.heads;
    a.scale = 1.0f / std::sqrt(static_cast<float>(a.head_dim));
    a.sequences = call.sequences + l * call.sequences_pitch, a.sequence_count = call.sequence_count;
    a.positions = call.positions;
    a.bias_pitch = call.bias_length, a.bias_head = call.bias_length * call.bias_length;
    attend(a, operand_of(e));
  }

  // ------------------------------------------------------------------------------------------- row blocks
  // A layer's norms one after the other.
  struct Norms {
    const float* tensors;
    const float* eps;
    void next(const float* in, int64_t rows, int64_t n, float* out) {
      for (int64_t r = 0; r < rows; ++r) norm_row(in + r * n, n, tensors, eps, out + r * n);
      skip(n);
    }
    void skip(int64_t n) {
      tensors += 2 * n;
      if (eps) ++eps;
    }
  };
  Norms norms_of(const MobileLayer& e) const { return {e.norms, call.eps}; }

  void block_qkv(int64_t l, int64_t r0, int64_t rows) const {
    const MobileLayer& e = layer(l);
    const int64_t h = call.hidden, w = call.width;
    const float* x = call.x + r0 * h;
    const Product q{e.q, qkv_output(e, r0, 0)}, k{e.k, qkv_output(e, r0, 1)}, v{e.v, qkv_output(e, r0, 2)};
    if (!narrow()) return products(x, h, rows, {q, k, v});
    float* a = inner + r0 * w;
    const Product input{e.input, rows_of(a, w)};
    Norms norms = norms_of(e);
    if (call.bottleneck == Bottleneck::input) {
      products(x, h, rows, {input, q, k, v});
      norms.next(a, rows, w, a);
    } else if (call.bottleneck == Bottleneck::shared) {
      float* s = block_memory.get<float>(rows * w + 16);
      products(x, h, rows, {input, {e.shared, rows_of(s, w)}, v});
      norms.next(a, rows, w, a);
      norms.next(s, rows, w, s);
      products(s, w, rows, {q, k});
    } else {
      products(x, h, rows, {input});
      norms.next(a, rows, w, a);
      products(a, w, rows, {q, k, v});
    }
  }

  void block_rest(int64_t l, int64_t r0, int64_t rows) const {
    const MobileLayer& e = layer(l);
    const int64_t h = call.hidden, w = call.width, part = align16(rows * w);
    float* x = call.x + r0 * h;
    float* memory = block_memory.get<float>(2 * part + rows * most + 16);
    float *a = memory, *next = memory + part, *broad = memory + 2 * part;
    Norms norms = norms_of(e);
    if (narrow()) norms.skip(w);
    if (call.bottleneck == Bottleneck::shared) norms.skip(w);

    products(context + r0 * wide, wide, rows, {{e.o, rows_of(a, w, narrow() ? inner + r0 * w : x)}});
    norms.next(a, rows, w, a);
    for (size_t f = 0; f < e.ffn.size(); f += 2) {
      const Linear &up = e.ffn[f], &down = e.ffn[f + 1];
      Output middle = rows_of(broad, up.n);
      middle.activation = call.activation;
      products(a, w, rows, {{up, middle}});
      products(broad, up.n, rows, {{down, rows_of(next, w, a)}});
      norms.next(next, rows, w, !narrow() && f + 2 == e.ffn.size() ? x : next);
      std::swap(a, next);
    }
    if (!narrow()) return;
    products(a, w, rows, {{e.out, rows_of(broad, h, x)}});
    norms.next(broad, rows, h, x);
  }
};

}  // namespace

Rows pack_block(const Linear& linear, const float* x, int64_t pitch, int64_t rows) {
  const int64_t dwords = align16(rows_dwords(linear, rows));
  uint32_t* data = operand_memory.get<uint32_t>(dwords + rows + 16);
  const Rows packed =
      make_rows(linear, rows, data, linear.kind == WeightKind::s8 ? reinterpret_cast<float*>(data + dwords) : nullptr);
  for (int64_t g = 0; g < packed.groups; ++g) pack_group(linear, packed, g, x, pitch);
  return packed;
}

void norm_row(const float* x, int64_t n, const float* gamma_beta, const float* eps, float* out) {
  if (eps)
    row_kernels().layer_norm_row(x, n, gamma_beta, gamma_beta + n, *eps, out);
  else
    affine_row()(x, n, gamma_beta, gamma_beta + n, out);
}

void encode(const MobileCall& call) {
  if (call.tokens > 0) MobileEncoder(call).run();
}

}  // namespace bertkern::cpu
