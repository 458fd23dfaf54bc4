// The attention kernel, written once and compiled once per ISA and operand (operand.h). attention.h states what it
// computes.
#include "cpu/attention/operand.h"

namespace bertkern::cpu {
namespace {

// ------------------------------------------------------------------------------------------------- tiles
// s[r][lane] = sum over dwords of k[r] and q[.][lane], for MR keys; top = max(top, s). Integer sums begin with
// start[lane] and are multiplied by scale[r] where it is given.
template <class Score, int MR, int V>
void score_tile(const uint32_t* k, int64_t steps, const uint32_t* q, const int32_t* start, const float* scale, float* s,
                float* top) {
  using Dot = typename Score::Dot;
  typename Dot::Acc acc[MR][V];
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      if constexpr (Dot::kInteger)
        acc[r][v] = Dot::init(start + v * kWidth);
      else
        acc[r][v] = typename Dot::Acc{};
    }
  // Three bases and four multiples of the pitch address all rows without a pointer each.
  const uint32_t* base[3] = {k, k + 5 * steps, k + 10 * steps};
  for (int64_t d = 0; d < steps; ++d, q += kQueries) {
    typename Dot::Vec w[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) w[v] = Dot::load(q + v * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      const typename Dot::Act x = Dot::broadcast(base[r / 5] + (r % 5) * steps, 0);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) Dot::step(acc[r][v], x, w[v]);
    }
    ++base[0], ++base[1], ++base[2];
  }
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) {
    vf most = vload(top + v * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      vf x = Dot::value(acc[r][v]);
      if constexpr (Dot::kInteger) x = scale ? vmul(x, vset(scale[r])) : x;
      most = vmax(most, x);
      vstore(s + r * kQueries + v * kWidth, x);
    }
    vstore(top + v * kWidth, most);
  }
}

struct ValueOutput {
  float* sums;  // [kQueries][sums_pitch], between chunks
  int64_t sums_pitch;
  const float* rescale;  // of each query: what the sums so far are scaled by; null: there are none
  const float* inverse;  // of each query: what the sums are scaled by at the end; null: this is not the end
  void* out;
  Dtype dtype;
  int64_t pitch, columns;
};

// sums[r] = sums[r] * rescale[r] + sum over dwords of p[.][r] and v[.], for MR queries and V vectors of features.
template <class Value, int MR, int V>
void value_tile(const uint32_t* p, const uint32_t* v, int64_t v_pitch, int64_t steps, const ValueOutput& o) {
  using Dot = typename Value::Dot;
  typename Dot::Acc acc[MR][V];
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 2
    for (int i = 0; i < V; ++i)
      acc[r][i] = o.rescale ? vmul(vload(o.sums + r * o.sums_pitch + i * kWidth), vset(o.rescale[r])) : vset(0.0f);
  for (int64_t j = 0; j < steps; ++j, p += kQueries, v += v_pitch) {
    typename Dot::Vec w[V];
#pragma GCC unroll 2
    for (int i = 0; i < V; ++i) w[i] = Dot::load(v + i * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      const typename Dot::Act x = Dot::broadcast(p + r, 0);
#pragma GCC unroll 2
      for (int i = 0; i < V; ++i) Dot::step(acc[r][i], x, w[i]);
    }
  }
  if (!o.inverse) {
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 2
      for (int i = 0; i < V; ++i) vstore(o.sums + r * o.sums_pitch + i * kWidth, acc[r][i]);
    return;
  }
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 2
    for (int i = 0; i < V; ++i) {
      const int64_t left = o.columns - i * kWidth, n = left < kWidth ? left : kWidth, at = r * o.pitch + i * kWidth;
      const vf y = vmul(acc[r][i], vset(o.inverse[r]));
      if (o.dtype == Dtype::f32)
        vstore_n(static_cast<float*>(o.out) + at, y, n);
      else if (o.dtype == Dtype::bf16)
        vstore_bf16_n(static_cast<uint16_t*>(o.out) + at, y, n);
      else
        vstore_f16_n(static_cast<uint16_t*>(o.out) + at, y, n);
    }
}

using ScoreTileFn = void (*)(const uint32_t*, int64_t, const uint32_t*, const int32_t*, const float*, float*, float*);
using ValueTileFn = void (*)(const uint32_t*, const uint32_t*, int64_t, int64_t, const ValueOutput&);

struct AttentionTiles {
  ScoreTileFn score[kMaxRows + 1][2];  // by rows, and vectors less one
  ValueTileFn value[kMaxRows + 1][2];
};

template <class Operand, int MR>
struct FillAttentionTiles {
  static constexpr void run(AttentionTiles& tiles) {
    FillAttentionTiles<Operand, MR - 1>::run(tiles);
    using Score = typename Operand::Score;
    using Value = typename Operand::Value;
    tiles.score[MR][0] = &score_tile<Score, MR, 1>, tiles.score[MR][1] = &score_tile<Score, MR, 2>;
    tiles.value[MR][0] = &value_tile<Value, MR, 1>, tiles.value[MR][1] = &value_tile<Value, MR, 2>;
  }
};
template <class Operand>
struct FillAttentionTiles<Operand, 0> {
  static constexpr void run(AttentionTiles&) {}
};

template <class Operand, int kMaxMr>
constexpr AttentionTiles make_attention_tiles() {
  AttentionTiles tiles{};
  FillAttentionTiles<Operand, kMaxMr>::run(tiles);
  return tiles;
}

// Calls f(first, count) for even pieces of at most `most`.
template <class F>
BK_INLINE void in_pieces(int64_t count, int64_t most, F&& f) {
  for (int64_t i = 0; i < count;) {
    const int64_t left = (count - i + most - 1) / most, n = (count - i + left - 1) / left;
    f(i, n);
    i += n;
  }
}

// ------------------------------------------------------------------------------------------------- softmax
// s = s * scale + bias, -inf where a key comes after the query; top is made anew. Biases lie by rows of keys, scores by
// columns: kWidth x kWidth of them are turned at a time.
void add_bias(const AttentionHead& h, int64_t q0, int64_t count, int64_t lanes, int64_t k0, int64_t keys, float* s,
              Running& run) {
  const vf minus_infinity = vset(-__builtin_inff());
  float places[kWidth];
  for (int64_t i = 0; i < lanes; i += kWidth) {
    const float* rows[kWidth];
    for (int64_t l = 0; l < kWidth; ++l) {
      const int64_t query = q0 + (i + l < count ? i + l : count - 1);  // idle lanes: any row will do
      const int64_t place = h.query_position ? h.query_position[query] : h.first_query + query;
      rows[l] = h.bias ? h.bias + place * h.bias_pitch : nullptr;
      places[l] = static_cast<float>(place);
    }
    const vf place = vload(places), scale = vload(run.scale + i);
    vf most = vset(kLowest);
    for (int64_t j = 0; j < keys; j += kWidth) {
      const int64_t n = keys - j < kWidth ? keys - j : kWidth;
      vf bias[kWidth];
      if (h.bias) {
        for (int64_t l = 0; l < kWidth; ++l) {
          if (!h.key_position) {
            bias[l] = vload_n(rows[l] + k0 + j, n);
            continue;
          }
          float gathered[kWidth] = {0};
          for (int64_t c = 0; c < n; ++c) gathered[c] = rows[l][h.key_position[k0 + j + c]];
          bias[l] = vload(gathered);
        }
        transpose_lanes(bias);
      }
      for (int64_t c = 0; c < n; ++c) {
        float* at = s + (j + c) * kQueries + i;
        vf x = vload(at);
        if (h.bias) x = vfma(x, scale, bias[c]);
        if (h.causal) {
          const int64_t key = h.key_position ? h.key_position[k0 + j + c] : k0 + j + c;
          x = select_lt(place, vset(static_cast<float>(key)), minus_infinity, x);
        }
        vstore(at, x);
        most = vmax(most, x);
      }
    }
    vstore(run.top + i, most);
  }
}

// s becomes p = exp2((s - most) scale), in place as dwords of kPer keys, for V vectors of lanes; sum is theirs. Where
// v_scale is given, what is stored is p times that of its key. Dwords begin no later than what they are made of, so
// none is overwritten unread.
template <class Value, int V, bool kScaled>
BK_INLINE void exponentials(float* s, int64_t keys, const vf (&most)[V], const vf (&scale)[V], const float* v_scale,
                            vf (&sum)[V]) {
  constexpr int64_t kPer = Value::kPer;
  vf p[V][kPer];
  uint32_t* out = reinterpret_cast<uint32_t*>(s);
  const auto next = [&](int v, int64_t j, int64_t i) {
    p[v][i] = exp2_negative(Value::kPower, vmul(vsub(vload(s + i * kQueries + v * kWidth), most[v]), scale[v]));
    sum[v] = vadd(sum[v], p[v][i]);
    if constexpr (kScaled) p[v][i] = vmul(p[v][i], vset(v_scale[j + i]));
  };
  int64_t j = 0;
  for (; j + kPer <= keys; j += kPer, s += kPer * kQueries, out += kQueries) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
#pragma GCC unroll 2
      for (int64_t i = 0; i < kPer; ++i) next(v, j, i);
      Value::store(out + v * kWidth, p[v]);
    }
  }
  if (j == keys) return;
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) {
    for (int64_t i = 0; i < kPer; ++i)
      if (j + i < keys)
        next(v, j, i);
      else
        p[v][i] = vset(0.0f);
    Value::store(out + v * kWidth, p[v]);
  }
}

// v_scale: of the chunk's keys where p is to take it on; else null.
template <class Value, int V>
BK_INLINE void softmax(float* s, int64_t keys, const float* v_scale, vf factor, int64_t lane, Running& run) {
  vf now[V], scale[V], sum[V];
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) {
    now[v] = vmax(vload(run.most + lane + v * kWidth), vload(run.top + lane + v * kWidth));
    scale[v] = vload(run.base + lane + v * kWidth);
    sum[v] = vset(0.0f);
  }
  if (Value::kScalesRows || !v_scale)
    exponentials<Value, V, false>(s + lane, keys, now, scale, v_scale, sum);
  else
    exponentials<Value, V, true>(s + lane, keys, now, scale, v_scale, sum);
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) {
    const int64_t i = lane + v * kWidth;
    const vf shrink = exp2_negative(kPower5, vmul(vsub(vload(run.most + i), now[v]), scale[v]));
    sum[v] = vfma(vload(run.total + i), shrink, sum[v]);
    vstore(run.most + i, now[v]), vstore(run.total + i, sum[v]), vstore(run.rescale + i, shrink);
    // A sum that is not zero is near 1 at least: the largest score's own exponential.
    vstore(run.inverse + i, select_lt(sum[v], vset(0.5f), vset(0.0f), vdiv(factor, sum[v])));
  }
}

// ------------------------------------------------------------------------------------------------- the head
template <class Operand, int kMaxMr>
void attention_head(const AttentionHead& h) {
  using Score = typename Operand::Score;
  using Value = typename Operand::Value;
  static constexpr AttentionTiles kTiles = make_attention_tiles<Operand, kMaxMr>();
  constexpr int64_t kPer = Value::kPer;
  const int64_t steps = (h.head_dim + Score::kPer - 1) / Score::kPer;
  const int64_t d_pitch = (h.head_dim + kWidth - 1) / kWidth * kWidth;
  const int64_t stage_pitch = (steps + kWidth - 1) / kWidth * kWidth;
  const auto aligned = [](int64_t dwords) { return (dwords + 15) / 16 * 16; };
  const bool codes = h.out_dtype >= Dtype::s8;
  uint32_t* k = h.scratch;
  uint32_t* v = k + aligned(h.keys * steps);
  const int64_t value_steps = (h.keys + kPer - 1) / kPer;
  float* s = reinterpret_cast<float*>(v + aligned(value_steps * d_pitch));
  float* sums = s + (kMostKeys + 2) * kQueries;
  uint32_t* q = reinterpret_cast<uint32_t*>(sums) + kQueries * d_pitch;
  uint32_t* stage = q + kQueries * stage_pitch;
  Running run;
  if (h.keys == 0) return store_nothing(h);

  pack_keys<Score>(h, steps, k);
  pack_values<Value>(h, d_pitch, value_steps, v);
  for (int64_t i = 0; i < kQueries; ++i)
    for (int64_t d = (steps - 1) / kWidth * kWidth; d < stage_pitch; ++d) stage[i * stage_pitch + d] = 0;

  const int64_t chunk = keys_of_chunk(h.keys, 2);
  for (int64_t q0 = 0; q0 < h.queries; q0 += kQueries) {
    const int64_t count = h.queries - q0 < kQueries ? h.queries - q0 : kQueries;
    const int64_t lanes = (count + kWidth - 1) / kWidth * kWidth;
    pack_queries<Score>(h, q0, count, lanes, stage, stage_pitch, q);
    if constexpr (Score::Dot::kInteger) Score::starts(q, steps, lanes, run.start);
    begin_queries(h, q0, count, lanes, run);
    const int64_t end = keys_seen(h, q0, count);
    for (int64_t k0 = 0; k0 < end; k0 += chunk) {
      const int64_t keys = end - k0 < chunk ? end - k0 : chunk;
      const bool first = k0 == 0, last = k0 + chunk >= end;
      for (int64_t i = 0; i < lanes; i += kWidth) vstore(run.top + i, vset(kLowest));
      in_pieces(keys, kMaxMr, [&](int64_t r, int64_t mr) {
        for (int64_t i = 0; i < lanes; i += 2 * kWidth)
          kTiles.score[mr][i + kWidth < lanes](k + (k0 + r) * steps, steps, q + i, run.start + i,
                                               h.k_scale ? h.k_scale + k0 + r : nullptr, s + r * kQueries + i,
                                               run.top + i);
      });
      if (h.bias || h.causal) add_bias(h, q0, count, lanes, k0, keys, s, run);
      const float* v_scale = h.v_scale ? h.v_scale + k0 : nullptr;
      for (int64_t i = 0; i < lanes; i += 2 * kWidth)
        if (i + kWidth < lanes)
          softmax<Value, 2>(s, keys, v_scale, vset(h.factor), i, run);
        else
          softmax<Value, 1>(s, keys, v_scale, vset(h.factor), i, run);
      for (int64_t d = 0; d < d_pitch; d += kFeatures) {
        const int64_t width = panel_width(d_pitch, d);
        const uint32_t* const panel = v + d * value_steps + k0 / kPer * width;
        in_pieces(count, kMaxMr, [&](int64_t r, int64_t mr) {
          ValueOutput o;
          o.sums = sums + r * d_pitch + d, o.sums_pitch = d_pitch;
          o.rescale = first ? nullptr : run.rescale + r, o.inverse = last ? run.inverse + r : nullptr;
          if (codes) {
            o.out = o.sums, o.dtype = Dtype::f32, o.pitch = d_pitch, o.columns = d_pitch - d;
          } else {
            o.out = static_cast<char*>(h.out) + ((q0 + r) * h.out_pitch + d) * dtype_size(h.out_dtype);
            o.dtype = h.out_dtype, o.pitch = h.out_pitch, o.columns = h.head_dim - d;
          }
          kTiles.value[mr][width > kWidth](reinterpret_cast<const uint32_t*>(s) + r, panel, width,
                                           (keys + kPer - 1) / kPer, o);
        });
      }
    }
    if (codes) store_code_rows(h, q0, count, sums, d_pitch);
  }
}

}  // namespace
}  // namespace bertkern::cpu

#define BERTKERN_DEFINE_ATTENTION(operand, isa, max_mr)                                       \
  namespace bertkern::cpu {                                                                   \
  extern const AttentionFn attention_##operand##_##isa;                                       \
  const AttentionFn attention_##operand##_##isa = &attention_head<Operand_##operand, max_mr>; \
  }
