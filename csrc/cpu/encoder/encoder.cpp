#include "cpu/encoder/encoder.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>

#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace bertkern::cpu {

namespace {

// Rows of a block, whose feed-forward output stays near the L2 (64: five tiles of 13), and the tokens per thread below
// which columns are split. A matrix unit is through with so few rows before the L3 has brought the next weights.
//
// Where columns are split, weights are read once, but rows come from and go to all threads' caches: with half of the
// weights, half as many tokens pay for reading them once per thread.
struct Split {
  int64_t block_rows, row_split_tokens;
};
constexpr int64_t kMostPanels = 8, kTasks = 3;  // of a task where there are many; of a thread at least
constexpr Split kVectorSplit{64, 64}, kMatrixSplit{128, 128};

thread_local Scratch call_memory, operand_memory, block_memory;

int64_t align16(int64_t count) { return (count + 15) / 16 * 16; }

struct Encoder {
  const EncoderCall& call;
  const RowKernels& kernels = row_kernels();
  int threads = thread_count();
  int64_t wide = 0, ffn = 0;  // widest q, k, v (one of them) and feed-forward layer
  int64_t operand = 0;        // dwords of the largest packed operand, for `tokens` rows
  void* qkv = nullptr;        // [tokens][3][wide], of qkv_dtype of the layer
  float *context = nullptr, *y = nullptr, *inner = nullptr;
  float* finite = nullptr;  // of each token: NaN where its q, k, v are, though codes
  Split split = kVectorSplit;

  explicit Encoder(const EncoderCall& c) : call(c) {
    for (int64_t l = 0; l < call.layer_count; ++l) {
      wide = std::max({wide, call.layers[l].q.n, call.layers[l].v.n});
      ffn = std::max(ffn, call.layers[l].ffn1.n);
    }
    if (call.layer_count && matrix_kernels(call.layers[0].ffn1.kind)) split = kMatrixSplit;
    split.row_split_tokens = static_cast<int64_t>(static_cast<double>(split.row_split_tokens) * share_of_weights());
  }

  // Of what dense weights would take. Planes of few bits count as these: every thread would decode them.
  double share_of_weights() const {
    int64_t stored = 0, dense = 0;
    for (int64_t l = 0; l < call.layer_count; ++l)
      for (const Linear* linear :
           {&layer(l).q, &layer(l).k, &layer(l).v, &layer(l).o, &layer(l).ffn1, &layer(l).ffn2}) {
        const int64_t whole = linear->panels * kPanel * linear->kd;
        dense += whole, stored += linear->layout == Layout::grouped ? whole : std::min(linear->weight_dwords, whole);
      }
    return dense ? static_cast<double>(stored) / static_cast<double>(dense) : 1.0;
  }

  const EncoderLayer& layer(int64_t l) const { return call.layers[l]; }
  int64_t qkv_pitch() const { return 3 * wide; }

  void run() {
    const bool by_rows = threads == 1 || call.tokens >= split.row_split_tokens * threads;
    const int64_t n = call.tokens, h = call.hidden;
    const int64_t parts[] = {align16(n * qkv_pitch()), align16(n * wide), align16(n * h),
                             by_rows ? 0 : align16(n * ffn), by_rows ? align16(n) : 0};
    float* memory = call_memory.get<float>(parts[0] + parts[1] + parts[2] + parts[3] + parts[4]);
    qkv = memory, context = memory + parts[0], y = context + parts[1], inner = y + parts[2], finite = inner + parts[3];
    if (by_rows)
      rows_split();
    else
      columns_split();
  }

  // ------------------------------------------------------------------------------------------- attention
  // bf16 where the processor multiplies it and the layer is not more exact itself. Outputs that are rounded to codes
  // are those of a simulation, which is held to.
  WeightKind operand_of(const EncoderLayer& e) const {
    if (call.exact_attention) return WeightKind::f32;
    for (const Linear* linear : {&e.q, &e.k, &e.v})
      if (linear->kind == WeightKind::f32 || linear->output_scale > 0.0f) return WeightKind::f32;
    return attention_kernel(WeightKind::bf16, Dtype::bf16) ? WeightKind::bf16 : WeightKind::f32;
  }
  // Whether q, k and v all come as codes: these are kept, and the scores exact. (The context stays fp32: making codes
  // of it takes the attention as long as it takes the packing for o, which sees what is not finite.)
  static bool in_codes(const EncoderLayer& e) {
    for (const Linear* linear : {&e.q, &e.k, &e.v})
      if (linear->kind != WeightKind::s8 || linear->output_scale <= 0.0f) return false;
    return true;
  }
  Dtype qkv_dtype(int64_t l) const {
    if (in_codes(layer(l))) return Dtype::s8;
    return operand_of(layer(l)) == WeightKind::bf16 ? Dtype::bf16 : Dtype::f32;
  }

  // Part i of q, k, v from row r on.
  void* qkv_at(int64_t l, int64_t r, int64_t i) const {
    return static_cast<char*>(qkv) + (r * qkv_pitch() + i * wide) * dtype_size(qkv_dtype(l));
  }
  Output qkv_output(int64_t l, int64_t r, int64_t i) const {
    Output out;
    out.out = qkv_at(l, r, i), out.out_pitch = qkv_pitch(), out.dtype = qkv_dtype(l);
    const EncoderLayer& e = layer(l);
    if (out.dtype == Dtype::s8) out.code_step = (i == 0 ? e.q : i == 1 ? e.k : e.v).output_scale;
    return out;
  }

  AttentionCall attention_call(int64_t l) const {
    const EncoderLayer& e = layer(l);
    AttentionCall a{};
    a.q = qkv_at(l, 0, 0), a.k = qkv_at(l, 0, 1), a.v = qkv_at(l, 0, 2), a.dtype = qkv_dtype(l);
    a.q_pitch = a.k_pitch = a.v_pitch = qkv_pitch(), a.out = context, a.out_pitch = wide;
    a.heads = e.heads, a.head_dim = a.q_head = a.k_head = a.v_head = a.out_head = e.q.n / e.heads;
    a.scale = 1.0f / std::sqrt(static_cast<float>(a.head_dim));
    if (a.dtype == Dtype::s8) {
      a.q_scale.step = e.q.output_scale, a.k_scale.step = e.k.output_scale, a.v_scale.step = e.v.output_scale;
      a.finite = finite;
    }
    a.sequences = call.sequences + l * call.sequences_pitch, a.sequence_count = call.sequence_count,
    a.positions = call.positions;
    a.bias_pitch = call.bias_length, a.bias_head = call.bias_length * call.bias_length;
    return a;
  }
  void attention(int64_t l) {
    if (layer(l).heads) attend(attention_call(l), operand_of(layer(l)));
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
      if (i == 0 && in_codes(e)) std::copy_n(packed.scale, rows, finite + r0);
      gemm(*parts[i], packed, 0, packed.groups, 0, parts[i]->panels, qkv_output(l, r0, i));
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
    int64_t blocks = (call.tokens + split.block_rows - 1) / split.block_rows;
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
  // Products that share an operand. A task is some panels; a thread's panels lie one after another.
  struct Stage {
    const Linear* linear[3];
    int count;
    Rows rows;
    Output output[3];
    int64_t most;  // panels of a task
    int64_t tasks(int i) const { return (linear[i]->panels + most - 1) / most; }
    int64_t tasks() const {
      int64_t sum = 0;
      for (int i = 0; i < count; ++i) sum += tasks(i);
      return sum;
    }
    struct Panels {
      int linear;
      int64_t begin, end;
    };
    Panels panels(int64_t task) const {
      int i = 0;
      while (i + 1 < count && task >= tasks(i)) task -= tasks(i++);
      return {i, task * most, std::min(linear[i]->panels, (task + 1) * most)};
    }
    Piece weights(int64_t task) const {  // of its first panel
      const Panels p = panels(task);
      return panel_weights(*linear[p.linear], p.begin);
    }
  };

  // `next`: the stage to come, whose first panels are fetched during the last ones of this.
  void products(const Stage& stage, const Stage* next) {
    const int64_t tasks = stage.tasks(), next_tasks = next ? next->tasks() : 0;
    parallel(tasks, [&](int64_t task) {
      const Stage::Panels p = stage.panels(task);
      Output out = stage.output[p.linear];
      const int64_t first = next ? first_task_of_same_worker(task, tasks, next_tasks) : 0;
      const bool last = task + 1 == tasks || first_task_of_same_worker(task + 1, tasks, tasks) == task + 1;
      if (!last)
        out.after = stage.weights(task + 1);
      else if (first < next_tasks)
        out.after = next->weights(first);
      gemm(*stage.linear[p.linear], stage.rows, 0, stage.rows.groups, p.begin, p.end, out);
    });
  }

  // q, k, v and the attention of one head after the other: heads that go round evenly, of whole panels, save a stage.
  bool by_heads(const EncoderLayer& e) const {
    const bool in_order = !e.q.column && !e.k.column && !e.v.column;
    return in_order && e.heads > 0 && e.heads % threads == 0 && e.q.n / e.heads % kPanel == 0;
  }
  void heads_and_attention(int64_t l, const Stage& stage, const Stage& next) {
    const EncoderLayer& e = layer(l);
    const AttentionCall a = attention_call(l);
    const AttentionFn kernel = attention_kernel(operand_of(e), a.dtype);
    const int64_t panels = a.head_dim / kPanel;
    parallel(e.heads, [&](int64_t head) {
      const int64_t p = head * panels;
      const bool last = first_task_of_same_worker(head + 1, e.heads, e.heads) == head + 1 || head + 1 == e.heads;
      for (int i = 0; i < stage.count; ++i) {
        Output out = stage.output[i];
        if (i + 1 < stage.count)
          out.after = panel_weights(*stage.linear[i + 1], p);
        else if (!last)
          out.after = panel_weights(*stage.linear[0], p + panels);
        else
          out.after = next.weights(std::min(next.tasks() - 1, first_task_of_same_worker(head, e.heads, next.tasks())));
        gemm(*stage.linear[i], stage.rows, 0, stage.rows.groups, p, p + panels, out);
      }
      for (int64_t s = 0; s < a.sequence_count; ++s)
        attend_head(a, kernel, a.sequences[s], head, 0, a.sequences[s].tokens);
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
    // A matrix unit finishes one tile during the next: of a task, the last one stands alone.
    stage.most = 1;
    if (stage.rows.matrix) {
      int64_t fewest = first.panels;
      for (const Linear* linear : linears) fewest = std::min(fewest, linear->panels);
      stage.most = std::max<int64_t>(1, std::min(kMostPanels, fewest / (kTasks * threads)));
    }
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
        (shared ? stages[0].output[i] : stages[i].output[0]) = qkv_output(l, 0, i);
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

      if (count == 1 && by_heads(e)) {
        finite = heads[0].rows.scale;
        heads_and_attention(l, heads[0], o);
      } else {
        for (int i = 0; i < count; ++i) {
          if (i) pack_rows(heads[i], call.x, h, nullptr);
          products(heads[i], i + 1 < count ? &heads[i + 1] : &o);
        }
        finite = heads[count - 1].rows.scale;
        attention(l);
      }
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
