// The tasks of an attention: heads of sequences, and pieces of their queries where those are too few.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "cpu/attention/attention.h"
#include "cpu/gemm/linear.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace bertkern::cpu {

namespace {

thread_local Scratch memory, row_memory;

// Queries whose fp32 outputs of all heads a thread holds before they become codes; the keys are packed for each piece.
constexpr int64_t kRowPiece = 256;

bool any_nan(const float* x, int64_t count) {
  bool found = false;
  for (int64_t i = 0; i < count; ++i) found |= std::isnan(x[i]);
  return found;
}

void quantize_token(const float* y, int64_t width, uint8_t* out, float* scale) {
  *scale = row_kernels().quantize_row(y, width, 0.0f, kSignedZero, out);
  row_kernels().flip_row(out, width, 0x80, out);
}

}  // namespace

void attend_head(const AttentionCall& call, AttentionFn kernel, const Sequence& s, int64_t head, int64_t q0,
                 int64_t q1) {
  if (q0 >= q1) return;
  const int64_t out_size = dtype_size(call.out_dtype);
  const auto rows_at = [&](const CodeScale& scale, int64_t token) { return scale.rows ? scale.rows + token : nullptr; };
  const auto at = [&](const void* data, int64_t row, int64_t pitch, int64_t stride) {
    return static_cast<const char*>(data) + (row * pitch + head * stride) * dtype_size(call.dtype);
  };
  AttentionHead h;
  h.q = at(call.q, s.begin + q0, call.q_pitch, call.q_head);
  h.k = at(call.k, s.begin, call.k_pitch, call.k_head);
  h.v = at(call.v, s.begin, call.v_pitch, call.v_head);
  h.dtype = call.dtype, h.q_pitch = call.q_pitch, h.k_pitch = call.k_pitch, h.v_pitch = call.v_pitch;
  h.out = static_cast<char*>(call.out) +
          ((s.begin - call.out_begin + q0) * call.out_pitch + head * call.out_head) * out_size;
  h.out_dtype = call.out_dtype, h.out_pitch = call.out_pitch;
  h.out_step = call.out_step, h.out_zero = call.out_zero;
  h.out_finite = call.out_finite ? call.out_finite + s.begin + q0 : nullptr;
  h.queries = q1 - q0, h.keys = s.keys, h.head_dim = call.head_dim;
  h.scale = call.scale, h.factor = s.factor ? s.factor[head] : 1.0f;
  if (h.factor == 0.0f) h.keys = 0;
  h.q_scale = rows_at(call.q_scale, s.begin + q0), h.k_scale = rows_at(call.k_scale, s.begin);
  h.v_scale = rows_at(call.v_scale, s.begin), h.finite = call.finite ? call.finite + s.begin + q0 : nullptr;
  h.scale *= call.q_scale.step * call.k_scale.step, h.factor *= call.v_scale.step;
  if (call.finite && any_nan(call.finite + s.begin, h.keys)) h.scale = std::nanf("");
  h.bias = s.bias ? s.bias + head * call.bias_head : nullptr, h.bias_pitch = call.bias_pitch;
  h.query_position = call.positions ? call.positions + s.begin + q0 : nullptr;
  h.key_position = call.positions ? call.positions + s.begin : nullptr;
  h.first_query = q0, h.causal = call.causal;
  h.scratch = memory.get<uint32_t>(attention_scratch(h.keys, h.head_dim));
  kernel(h);
}

namespace {

// Piece `cut` of `cuts` of a head's queries; each packs the keys and values anew.
void attend_piece(const AttentionCall& call, AttentionFn kernel, const Sequence& s, int64_t head, int64_t cut,
                  int64_t cuts) {
  const int64_t blocks = (s.tokens + kQueries - 1) / kQueries;
  attend_head(call, kernel, s, head, blocks * cut / cuts * kQueries,
              std::min(s.tokens, blocks * (cut + 1) / cuts * kQueries));
}

// One sequence: each thread takes as many whole heads as all can, and evenly of the pieces of those that are left.
// Causal pieces are uneven: twice as many, for those who are through to help with.
void attend_one(const AttentionCall& call, AttentionFn kernel) {
  const int64_t threads = thread_count(), whole = call.heads / threads, first = whole * threads;
  const int64_t left = call.heads - first;
  const int64_t cuts = threads / std::gcd(std::max<int64_t>(left, 1), threads) * (call.causal ? 2 : 1);
  const int64_t pieces = left * cuts / threads, tasks = whole + pieces;  // of a thread
  parallel(threads * tasks, [&](int64_t task) {
    const int64_t thread = task / tasks, i = task % tasks, piece = thread * pieces + i - whole;
    if (i < whole)
      attend_piece(call, kernel, call.sequences[0], thread * whole + i, 0, 1);
    else
      attend_piece(call, kernel, call.sequences[0], first + piece / cuts, piece % cuts, cuts);
  });
}

}  // namespace

void attend(const AttentionCall& call, WeightKind values) {
  const AttentionFn kernel = attention_kernel(values, call.dtype);
  if (call.sequence_count == 1) return attend_one(call, kernel);
  const int64_t pairs = call.sequence_count * call.heads, cuts = pairs >= 4 * thread_count() ? 1 : 4;
  parallel(pairs * cuts, [&](int64_t task) {
    const int64_t pair = task / cuts;
    attend_piece(call, kernel, call.sequences[pair / call.heads], pair % call.heads, task % cuts, cuts);
  });
}

void attend_rows(const AttentionCall& call, WeightKind values, int64_t tokens, float* scales) {
  const int64_t width = call.heads * call.head_dim, threads = thread_count();
  uint8_t* codes = static_cast<uint8_t*>(call.out);
  AttentionCall wide = call;
  wide.out_dtype = Dtype::f32, wide.out_pitch = width, wide.out_head = call.head_dim;

  struct Piece {
    const Sequence* sequence;
    int64_t q0, q1;
  };
  std::vector<Piece> pieces;
  for (int64_t b = 0; b < call.sequence_count; ++b)
    for (int64_t q = 0; q < call.sequences[b].tokens; q += kRowPiece)
      pieces.push_back({call.sequences + b, q, std::min(call.sequences[b].tokens, q + kRowPiece)});
  const int64_t count = static_cast<int64_t>(pieces.size());
  if (threads == 1 || count >= 4 * threads) {
    const AttentionFn kernel = attention_kernel(values, call.dtype);
    parallel(count, [&](int64_t task) {
      const Piece& p = pieces[static_cast<size_t>(task)];
      const int64_t begin = p.sequence->begin + p.q0, rows = p.q1 - p.q0;
      AttentionCall mine = wide;
      float* y = row_memory.get<float>(rows * width);
      mine.out = y, mine.out_begin = begin;
      for (int64_t head = 0; head < call.heads; ++head) attend_head(mine, kernel, *p.sequence, head, p.q0, p.q1);
      for (int64_t r = 0; r < rows; ++r)
        quantize_token(y + r * width, width, codes + (begin + r) * call.out_pitch, scales + begin + r);
    });
    return;
  }
  // Too few to go round: by heads, and the rows when all of these are through.
  float* y = row_memory.get<float>(tokens * width);
  wide.out = y;
  attend(wide, values);
  const int64_t tasks = tokens * width < 32768 ? 1 : std::min(tokens, 4 * threads);
  parallel(tasks, [&](int64_t task) {
    for (int64_t t = tokens * task / tasks; t < tokens * (task + 1) / tasks; ++t)
      quantize_token(y + t * width, width, codes + t * call.out_pitch, scales + t);
  });
}

}  // namespace bertkern::cpu
