#include "cpu/encoder/encoder.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>

#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace bertkern::cpu {

namespace {

constexpr int64_t kBlockRows = 42;       // three tiles of 14; a block's feed-forward output stays in L2
constexpr int64_t kRowSplitTokens = 64;  // per thread; fewer: split columns

thread_local Scratch call_memory, operand_memory, block_memory, attention_memory;

int64_t align16(int64_t count) { return (count + 15) / 16 * 16; }

struct Encoder {
  const EncoderCall& call;
  const RowKernels& kernels = row_kernels();
  int threads = thread_count();
  int64_t wide = 0, ffn = 0;  // widest q, k, v (one of them) and feed-forward layer
  int64_t operand = 0;        // dwords of the largest packed operand, for `tokens` rows
  float *qkv = nullptr, *context = nullptr, *y = nullptr, *inner = nullptr;

  explicit Encoder(const EncoderCall& c) : call(c) {
    for (int64_t l = 0; l < call.layer_count; ++l) {
      wide = std::max({wide, call.layers[l].q.n, call.layers[l].v.n});
      ffn = std::max(ffn, call.layers[l].ffn1.n);
    }
  }

  const EncoderLayer& layer(int64_t l) const { return call.layers[l]; }
  int64_t qkv_pitch() const { return 3 * wide; }

  void run() {
    const bool by_rows = threads == 1 || call.tokens >= kRowSplitTokens * threads;
    const int64_t n = call.tokens, h = call.hidden;
    const int64_t parts[] = {align16(n * qkv_pitch()), align16(n * wide), align16(n * h),
                             by_rows ? 0 : align16(n * ffn)};
    float* memory = call_memory.get<float>(parts[0] + parts[1] + parts[2] + parts[3]);
    qkv = memory, context = qkv + parts[0], y = context + parts[1], inner = y + parts[2];
    if (by_rows)
      rows_split();
    else
      columns_split();
  }

  // ------------------------------------------------------------------------------------------- attention
  void attention(int64_t l) {
    const EncoderLayer& e = layer(l);
    const int64_t head_dim = e.heads ? e.q.n / e.heads : 0;
    if (!e.heads) return;
    // Long sequences are cut along their queries where there are too few heads to go round.
    const int64_t pairs = call.sequence_count * e.heads;
    const int64_t cuts = pairs >= 4 * threads ? 1 : 4;
    parallel(pairs * cuts, [&](int64_t task) {
      const int64_t cut = task % cuts, head = task / cuts % e.heads;
      const Sequence& s = call.sequences[task / cuts / e.heads];
      const int64_t panels = (s.tokens + kPanel - 1) / kPanel;
      const int64_t q0 = panels * cut / cuts * kPanel, q1 = std::min(s.tokens, panels * (cut + 1) / cuts * kPanel);
      if (q0 >= q1) return;
      const float* base = qkv + s.begin * qkv_pitch() + head * head_dim;
      float* out = context + (s.begin + q0) * wide + head * head_dim;
      if (s.keys == 0) {
        for (int64_t i = 0; i < q1 - q0; ++i) std::fill_n(out + i * wide, head_dim, 0.0f);
        return;
      }
      AttentionHead a;
      a.q = base + q0 * qkv_pitch(), a.k = base + wide, a.v = base + 2 * wide, a.out = out;
      a.pitch = qkv_pitch(), a.out_pitch = wide;
      a.n_queries = q1 - q0, a.n_keys = s.keys, a.head_dim = head_dim;
      a.scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
      a.bias_pitch = call.bias_length;
      a.bias = s.bias ? s.bias + head * call.bias_length * call.bias_length : nullptr;
      a.query_position = call.positions ? call.positions + s.begin + q0 : nullptr;
      a.key_position = call.positions ? call.positions + s.begin : nullptr;
      if (a.bias && !call.positions) a.bias += q0 * call.bias_length;
      a.tiles = &tile_kernels(WeightKind::f32);
      a.scratch = attention_memory.get<float>(attention_scratch(s.keys, head_dim));
      kernels.attention(a);
    });
  }

  // ------------------------------------------------------------------------------------------- row blocks
  // y[rows] = W x + ..., one thread; `x` is fp32.
  void block_linear(const Linear& linear, const float* x, int64_t x_pitch, int64_t rows, const Output& output,
                    const Rows* shared = nullptr) {
    if (shared) return gemm(linear, *shared, 0, shared->groups, 0, linear.panels, output);
    const Rows packed = pack_block(linear, x, x_pitch, rows);
    gemm(linear, packed, 0, packed.groups, 0, linear.panels, output);
  }

  Rows pack_block(const Linear& linear, const float* x, int64_t pitch, int64_t rows) {
    const int64_t dwords = align16(rows_dwords(linear, rows));
    uint32_t* data = operand_memory.get<uint32_t>(dwords + rows + 16);
    const Rows packed = make_rows(linear, rows, data,
                                  linear.kind == WeightKind::s8 ? reinterpret_cast<float*>(data + dwords) : nullptr);
    for (int64_t g = 0; g < packed.groups; ++g) pack_group(linear, packed, g, x, pitch);
    return packed;
  }

  void block_qkv(int64_t l, int64_t r0, int64_t rows) {
    const EncoderLayer& e = layer(l);
    const float* x = call.x + r0 * call.hidden;
    const Linear* parts[] = {&e.q, &e.k, &e.v};
    Rows packed{};
    for (int i = 0; i < 3; ++i) {
      if (i == 0 || !same_operand(*parts[i], *parts[i - 1])) packed = pack_block(*parts[i], x, call.hidden, rows);
      Output out;
      out.out = qkv + r0 * qkv_pitch() + i * wide, out.out_pitch = qkv_pitch();
      gemm(*parts[i], packed, 0, packed.groups, 0, parts[i]->panels, out);
    }
  }

  void norm_rows(const float* in, int64_t rows, const float* gamma_beta, float* out) {
    for (int64_t r = 0; r < rows; ++r)
      kernels.layer_norm_row(in + r * call.hidden, call.hidden, gamma_beta, gamma_beta + call.hidden, call.eps,
                             out + r * call.hidden);
  }

  void block_rest(int64_t l, int64_t r0, int64_t rows) {
    const EncoderLayer& e = layer(l);
    const int64_t h = call.hidden;
    float *x = call.x + r0 * h, *mid = y + r0 * h;
    float* wide_out = block_memory.get<float>(rows * e.ffn1.n + 16);
    Output out;
    out.out = mid, out.out_pitch = h, out.residual = x, out.residual_pitch = h;
    block_linear(e.o, context + r0 * wide, wide, rows, out);
    norm_rows(mid, rows, e.norms, mid);
    Output up;
    up.out = wide_out, up.out_pitch = e.ffn1.n, up.activation = call.activation;
    block_linear(e.ffn1, mid, h, rows, up);
    Output down;
    down.out = x, down.out_pitch = h, down.residual = mid, down.residual_pitch = h;
    block_linear(e.ffn2, wide_out, e.ffn1.n, rows, down);
    norm_rows(x, rows, e.norms + 2 * h, x);
  }

  void rows_split() {
    int64_t blocks = (call.tokens + kBlockRows - 1) / kBlockRows;
    blocks = std::min(call.tokens, (blocks + threads - 1) / threads * threads);
    const auto begin = [&](int64_t b) { return call.tokens * b / blocks; };
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

  // ------------------------------------------------------------------------------------------- columns
  // Products that share an operand. A task is a panel; a thread's panels lie one after another.
  struct Stage {
    const Linear* linear[3];
    int count;
    Rows rows;
    Output output[3];
    int64_t panels() const {
      int64_t sum = 0;
      for (int i = 0; i < count; ++i) sum += linear[i]->panels;
      return sum;
    }
    // The linear of panel p, whose number among its own comes back in p.
    int at(int64_t& p) const {
      int i = 0;
      while (i + 1 < count && p >= linear[i]->panels) p -= linear[i++]->panels;
      return i;
    }
    Piece weights(int64_t p) const {
      const int i = at(p);
      return panel_weights(*linear[i], p);
    }
  };

  // `next`: the stage to come, whose first panels are fetched during the last ones of this.
  void products(const Stage& stage, const Stage* next) {
    const int64_t tasks = stage.panels(), next_tasks = next ? next->panels() : 0;
    parallel(tasks, [&](int64_t task) {
      int64_t p = task;
      const int i = stage.at(p);
      Output out = stage.output[i];
      const int64_t first = next ? first_task_of_same_worker(task, tasks, next_tasks) : 0;
      const bool last = task + 1 == tasks || first_task_of_same_worker(task + 1, tasks, tasks) == task + 1;
      if (!last)
        out.after = stage.weights(task + 1);
      else if (first < next_tasks)
        out.after = next->weights(first);
      gemm(*stage.linear[i], stage.rows, 0, stage.rows.groups, p, p + 1, out);
    });
  }

  // Rows of the stage's operand from `x`, normed on the way where `gamma_beta` is given (x = LayerNorm(x)).
  void pack_rows(const Stage& stage, float* x, int64_t pitch, const float* gamma_beta) {
    const Rows& rows = stage.rows;
    parallel(rows.groups, [&](int64_t g) {
      if (gamma_beta)
        norm_rows(x + rows.begin(g) * pitch, rows.begin(g + 1) - rows.begin(g), gamma_beta, x + rows.begin(g) * pitch);
      pack_group(*stage.linear[0], rows, g, x, pitch);
    });
  }

  // The operand's memory, one for each stage of a layer: the next layer's first stage is packed beside the last.
  Stage make_stage(std::initializer_list<const Linear*> linears, uint32_t* memory) const {
    Stage stage{};
    for (const Linear* linear : linears) stage.linear[stage.count++] = linear;
    const Linear& first = *stage.linear[0];
    const int64_t dwords = align16(rows_dwords(first, call.tokens, threads));
    float* scale = first.kind == WeightKind::s8 ? reinterpret_cast<float*>(memory + dwords) : nullptr;
    stage.rows = make_rows(first, call.tokens, memory, scale, threads);
    return stage;
  }

  void columns_split() {
    const int64_t n = call.tokens, h = call.hidden;
    int64_t operand = 0;
    for (int64_t l = 0; l < call.layer_count; ++l)
      for (const Linear* linear : {&layer(l).q, &layer(l).k, &layer(l).v, &layer(l).o, &layer(l).ffn1, &layer(l).ffn2})
        operand = std::max(operand, align16(rows_dwords(*linear, n, threads)) + align16(n));
    uint32_t* memory = operand_memory.get<uint32_t>(2 * operand);

    const auto qkv_stages = [&](int64_t l, Stage(&stages)[3]) {
      const EncoderLayer& e = layer(l);
      const bool shared = same_operand(e.q, e.k) && same_operand(e.q, e.v);
      if (shared) stages[0] = make_stage({&e.q, &e.k, &e.v}, memory);
      const Linear* parts[] = {&e.q, &e.k, &e.v};
      for (int i = 0; i < 3; ++i) {
        if (!shared) stages[i] = make_stage({parts[i]}, memory);
        Output& out = shared ? stages[0].output[i] : stages[i].output[0];
        out.out = qkv + i * wide, out.out_pitch = qkv_pitch();
      }
      return shared ? 1 : 3;
    };
    Stage heads[3];
    int count = qkv_stages(0, heads);
    pack_rows(heads[0], call.x, h, nullptr);
    for (int64_t l = 0; l < call.layer_count; ++l) {
      const EncoderLayer& e = layer(l);
      Stage o = make_stage({&e.o}, memory), up = make_stage({&e.ffn1}, memory);
      Stage down = make_stage({&e.ffn2}, memory + operand);
      o.output[0].out = y, o.output[0].out_pitch = h, o.output[0].residual = call.x, o.output[0].residual_pitch = h;
      up.output[0].out = inner, up.output[0].out_pitch = e.ffn1.n, up.output[0].activation = call.activation;
      down.output[0].out = call.x, down.output[0].out_pitch = h;
      down.output[0].residual = y, down.output[0].residual_pitch = h;

      for (int i = 0; i < count; ++i) {
        if (i) pack_rows(heads[i], call.x, h, nullptr);
        products(heads[i], i + 1 < count ? &heads[i + 1] : &o);
      }
      attention(l);
      pack_rows(o, context, wide, nullptr);
      products(o, &up);
      pack_rows(up, y, h, e.norms);
      products(up, &down);
      pack_rows(down, inner, e.ffn1.n, nullptr);
      const bool more = l + 1 < call.layer_count;
      if (more) count = qkv_stages(l + 1, heads);
      products(down, more ? &heads[0] : nullptr);
      if (more)
        pack_rows(heads[0], call.x, h, e.norms + 2 * h);
      else
        norm_rows(call.x, n, e.norms + 2 * h, call.x);
      call.layer_done(call.context, l, call.x);
    }
  }
};

}  // namespace

void encode(const EncoderCall& call) {
  if (call.tokens > 0) Encoder(call).run();
}

}  // namespace bertkern::cpu
