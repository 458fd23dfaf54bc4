// AMX: both products are of tiles, and queries are the rows of both. A row of scores lies along its keys, so that p,
// rounded to bf16 in place, is what the second product reads; maxima and sums of 16 rows are turned into lanes
// together.
//
//   scores    [32 queries][32 keys]       += Q [32][d] K^T          K^T as panels [d dwords][32 keys]
//   values    [32 queries][32 features]   += P [32][keys] V         V as panels [pairs of keys][32 features]
//
//   tile   0 1   sums of rows 0..15  x columns 0..15, 16..31        4 5   rows 0..15, rows 16..31 of Q or P
//          2 3   sums of rows 16..31                                6 7   columns 0..15, 16..31 of K^T or V
#include "cpu/amx.h"
#include "cpu/attention/operand_bf16.h"

namespace bertkern::cpu {
namespace {

constexpr int64_t kColumns = 2 * kTileRows;  // of a block of sums, as kQueries are its rows
static_assert(kQueries == 2 * kTileRows && kMostKeys % kColumns == 0, "blocks of two by two tiles");

BK_INLINE int64_t rounded_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Dwords of a row of q or k, which are those in memory where the dtype is kDtype.
struct Pairs : Products_bf16 {
  static constexpr Dtype kDtype = Dtype::bf16;
  static constexpr int64_t kPer = 2;
  static constexpr bool kInteger = false;
  BK_INLINE void pack(const void* row, Dtype dtype, int64_t count, uint32_t* out) {
    Score_bf16::pack_query(row, dtype, count, out);
  }
};

struct Codes : Products_s8s8 {  // exact sums of s8 x s8
  static constexpr Dtype kDtype = Dtype::s8;
  static constexpr int64_t kPer = 4;
  static constexpr bool kInteger = true;
  BK_INLINE void pack(const void* row, Dtype, int64_t count, uint32_t* out) {
    for (int64_t d = 0; d < count; d += 64) {
      const int64_t n = count - d < 64 ? count - d : 64;
      const __m512i x = _mm512_maskz_loadu_epi8(~uint64_t{0} >> (64 - n), static_cast<const char*>(row) + d);
      _mm512_mask_storeu_epi32(out + d / 4, first_lanes((n + 3) / 4), x);
    }
  }
};

// sums = a b, or += where they are resumed: 32 rows (16 where !kTwo) by 32 columns (16 where !wide), over `steps` tiles
// of kTileDwords. Pitches are in dwords.
template <class Product, bool kTwo>
BK_INLINE void products(const uint32_t* a, int64_t a_pitch, const uint32_t* b, int64_t b_pitch, bool wide,
                        int64_t steps, bool resume, float* sums, int64_t pitch) {
  float* const second = sums + kTileRows * pitch;
  if (resume) {
    BK_TILE_LOAD(0, sums, pitch * 4);
    if (wide) BK_TILE_LOAD(1, sums + kTileRows, pitch * 4);
    if (kTwo) BK_TILE_LOAD(2, second, pitch * 4);
    if (kTwo && wide) BK_TILE_LOAD(3, second + kTileRows, pitch * 4);
  } else {
    BK_TILE_ZERO(0);
    BK_TILE_ZERO(1);
    BK_TILE_ZERO(2);
    BK_TILE_ZERO(3);
  }
  for (int64_t i = 0; i < steps; ++i, a += kTileDwords, b += kTileDwords * b_pitch) {
    BK_TILE_LOAD(6, b, b_pitch * 4);
    BK_TILE_LOAD(4, a, a_pitch * 4);
    Product::step0();
    if (kTwo) {
      BK_TILE_LOAD(5, a + kTileRows * a_pitch, a_pitch * 4);
      Product::step2();
    }
    if (wide) {
      BK_TILE_LOAD(7, b + kTileRows, b_pitch * 4);
      Product::step1();
      if (kTwo) Product::step3();
    }
  }
  BK_TILE_STORE(0, sums, pitch * 4);
  if (wide) BK_TILE_STORE(1, sums + kTileRows, pitch * 4);
  if (kTwo) BK_TILE_STORE(2, second, pitch * 4);
  if (kTwo && wide) BK_TILE_STORE(3, second + kTileRows, pitch * 4);
}

template <class Product>
void block(int64_t rows, const uint32_t* a, int64_t a_pitch, const uint32_t* b, int64_t b_pitch, bool wide,
           int64_t steps, bool resume, float* sums, int64_t pitch) {
  if (rows > kTileRows)
    products<Product, true>(a, a_pitch, b, b_pitch, wide, steps, resume, sums, pitch);
  else
    products<Product, false>(a, a_pitch, b, b_pitch, wide, steps, resume, sums, pitch);
}

// Rows [r0, r0 + count) as dwords, `pitch` apart, zeros beyond head_dim and up to `rows`.
template <class Operand>
void pack_rows(const void* from, const AttentionHead& h, int64_t from_pitch, int64_t total, int64_t r0, int64_t count,
               int64_t rows, int64_t pitch, uint32_t* out) {
  const int64_t steps = (h.head_dim + Operand::kPer - 1) / Operand::kPer;
  for (int64_t r = 0; r < count; ++r, out += pitch) {
    for (int64_t d = steps / kWidth * kWidth; d < pitch; d += kWidth)
      vstorei(reinterpret_cast<int32_t*>(out + d), vseti(0));
    if (r0 + r + kRowsAhead < total) fetch_row(from, h.dtype, from_pitch, r0 + r + kRowsAhead, h.head_dim);
    Operand::pack(row_of(from, h.dtype, from_pitch, r0 + r), h.dtype, h.head_dim, out);
  }
  __builtin_memset(out, 0, static_cast<size_t>((rows - count) * pitch) * 4);
}

// Whether rows in memory are whole tiles.
template <class Operand>
BK_INLINE bool lies_ready(const AttentionHead& h, int64_t pitch) {
  return h.dtype == Operand::kDtype && h.head_dim % (Operand::kPer * kTileDwords) == 0 && pitch % Operand::kPer == 0;
}

// Keys as panels [dwords][kColumns]; zeros after the last one.
template <class Operand>
void pack_key_panels(const AttentionHead& h, int64_t dwords, uint32_t* stage, uint32_t* out) {
  const bool ready = lies_ready<Operand>(h, h.k_pitch);
  for (int64_t j = 0; j < h.keys; j += kColumns, out += dwords * kColumns) {
    const int64_t count = h.keys - j < kColumns ? h.keys - j : kColumns;
    const float* rows = reinterpret_cast<const float*>(stage);
    int64_t pitch = dwords;
    if (ready && count == kColumns) {
      rows = static_cast<const float*>(row_of(h.k, h.dtype, h.k_pitch, j)), pitch = h.k_pitch / Operand::kPer;
      for (int64_t r = kColumns; r < 2 * kColumns && j + r < h.keys; ++r)
        fetch_row(h.k, h.dtype, h.k_pitch, j + r, h.head_dim);
    } else {
      pack_rows<Operand>(h.k, h, h.k_pitch, h.keys, j, count, kColumns, dwords, stage);
    }
    transpose(rows, pitch, kColumns, dwords, reinterpret_cast<float*>(out), kColumns);
  }
}

// What is added to, or hidden from, the scores of one query.
struct BiasRow {
  const AttentionHead& h;
  const float* bias;
  vf place;

  BiasRow(const AttentionHead& head, int64_t query) : h(head) {
    const int64_t at = h.query_position ? h.query_position[query] : h.first_query + query;
    bias = h.bias ? h.bias + at * h.bias_pitch : nullptr, place = vset(static_cast<float>(at));
  }
  // Scores of the n keys from `key` on.
  inline vf of(vf x, vf scale, int64_t key, int64_t n) const {
    const __mmask16 lanes = first_lanes(n);
    const vi at = h.key_position
                      ? _mm512_maskz_loadu_epi32(lanes, h.key_position + key)
                      : _mm512_add_epi32(vseti(static_cast<int32_t>(key)),
                                         _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    if (bias) {
      const vf b = h.key_position ? _mm512_mask_i32gather_ps(vset(0.0f), lanes, at, bias, 4) : vload_n(bias + key, n);
      x = vfma(x, scale, b);
    }
    if (h.causal) x = select_lt(place, to_float(at), vset(-__builtin_inff()), x);
    return x;
  }
};

// The largest of, or the sum of, each of 16 vectors' lanes, as lanes.
template <class Join>
BK_INLINE vf across(vf (&rows)[kWidth], Join&& join) {
  transpose_lanes(rows);
#pragma GCC unroll 4
  for (int n = kWidth / 2; n > 0; n /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) rows[i] = join(rows[i], rows[i + n]);
  return rows[0];
}

// A row of scores made floats of, biased, and hidden.
template <class Operand>
BK_INLINE void change_scores(const AttentionHead& h, int64_t query, vf scale, int64_t k0, int64_t keys, float* row) {
  const bool biased = h.bias || h.causal;
  const BiasRow bias(h, query);
  for (int64_t j = 0; j < keys; j += kWidth) {
    const int64_t n = keys - j < kWidth ? keys - j : kWidth;
    vf x = vload(row + j);
    if (Operand::kInteger) {
      x = to_float(as_int(x));
      if (h.k_scale) x = vmul(x, vload_n(h.k_scale + k0 + j, n));
    }
    if (biased) x = bias.of(x, scale, k0 + j, n);
    vstore(row + j, x);
  }
}

// Scores [16][kMostKeys] of queries q0 + lane, ...: made floats of, biased and hidden where that is to be, -inf after
// the last key; then p in their place, bf16. Statistics of the rows as in softmax() of body.h.
template <class Operand>
void softmax_rows(const AttentionHead& h, int64_t q0, int64_t count, int64_t k0, int64_t keys, int64_t lane, float* s,
                  Running& run) {
  const int64_t padded = rounded_up(keys, kColumns);
  const bool changed = Operand::kInteger || h.bias || h.causal;
  vf lanes[kWidth];
  for (int64_t i = 0; i < kWidth; ++i) {
    float* const row = s + i * kMostKeys;
    int64_t j = 0;
    vf most[2] = {vset(kLowest), vset(kLowest)};
    if (changed) {
      const int64_t query = q0 + (lane + i < count ? lane + i : count - 1);  // idle rows: any query will do
      change_scores<Operand>(h, query, vset(run.scale[lane + i]), k0, keys, row);
    }
    for (; j + 2 * kWidth <= keys; j += 2 * kWidth)
#pragma GCC unroll 2
      for (int c = 0; c < 2; ++c) most[c] = vmax(most[c], vload(row + j + c * kWidth));
    for (; j < padded; j += kWidth) {
      const int64_t left = keys - j, n = left < 0 ? 0 : left < kWidth ? left : kWidth;
      const vf x = _mm512_mask_blend_ps(first_lanes(n), vset(-__builtin_inff()), vload(row + j));
      vstore(row + j, x);
      most[0] = vmax(most[0], x);
    }
    lanes[i] = vmax(most[0], most[1]);
  }
  const vf top = across(lanes, [](vf a, vf b) { return vmax(a, b); });
  const vf before = vload(run.most + lane), scale = vload(run.base + lane), now = vmax(before, top);
  vstore(run.most + lane, now), vstore(run.top + lane, now);
  for (int64_t i = 0; i < kWidth; ++i) {
    const float* const row = s + i * kMostKeys;
    uint16_t* const p = reinterpret_cast<uint16_t*>(s + i * kMostKeys);
    const vf most = vset(run.top[lane + i]), factor = vset(run.base[lane + i]);
    vf sum[2] = {vset(0.0f), vset(0.0f)};
    for (int64_t j = 0; j < padded; j += 2 * kWidth) {
      vf x[2];
#pragma GCC unroll 2
      for (int c = 0; c < 2; ++c) {
        x[c] = exp2_negative(Value_bf16::kPower, vmul(vsub(vload(row + j + c * kWidth), most), factor));
        sum[c] = vadd(sum[c], x[c]);
        if (h.v_scale) {
          const int64_t left = keys - j - c * kWidth, n = left < kWidth ? left : kWidth;
          if (n > 0) x[c] = vmul(x[c], vload_n(h.v_scale + k0 + j + c * kWidth, n));
        }
      }
      _mm512_storeu_si512(p + j, (__m512i)_mm512_cvtne2ps_pbh(x[1], x[0]));
    }
    lanes[i] = vadd(sum[0], sum[1]);
  }
  const vf shrink = exp2_negative(kPower5, vmul(vsub(before, now), scale));
  const vf total = vfma(vload(run.total + lane), shrink, across(lanes, [](vf a, vf b) { return vadd(a, b); }));
  vstore(run.total + lane, total), vstore(run.rescale + lane, shrink);
  // A sum that is not zero is near 1 at least: the largest score's own exponential.
  vstore(run.inverse + lane, select_lt(total, vset(0.5f), vset(0.0f), vdiv(vset(h.factor), total)));
}

// Rows of sums times what belongs to each.
void scale_rows(float* sums, int64_t pitch, int64_t count, const float* by) {
  for (int64_t i = 0; i < count; ++i, sums += pitch)
    for (int64_t d = 0; d < pitch; d += kWidth) vstore(sums + d, vmul(vload(sums + d), vset(by[i])));
}

void store_rows(const AttentionHead& h, int64_t q0, int64_t count, const float* sums, int64_t pitch,
                const float* inverse) {
  for (int64_t i = 0; i < count; ++i, sums += pitch) {
    char* const out = static_cast<char*>(h.out) + (q0 + i) * h.out_pitch * dtype_size(h.out_dtype);
    for (int64_t d = 0; d < h.head_dim; d += kWidth) {
      const int64_t n = h.head_dim - d < kWidth ? h.head_dim - d : kWidth;
      const vf y = vmul(vload(sums + d), vset(inverse[i]));
      if (h.out_dtype == Dtype::f32)
        vstore_n(reinterpret_cast<float*>(out) + d, y, n);
      else if (h.out_dtype == Dtype::bf16)
        vstore_bf16_n(reinterpret_cast<uint16_t*>(out) + d, y, n);
      else
        vstore_f16_n(reinterpret_cast<uint16_t*>(out) + d, y, n);
    }
  }
}

template <class Operand>
void attention_head(const AttentionHead& h) {
  if (h.keys == 0) return store_nothing(h);
  const int64_t steps = (h.head_dim + Operand::kPer - 1) / Operand::kPer;
  const int64_t dwords = rounded_up(steps, kTileDwords), d_pitch = rounded_up(h.head_dim, kWidth);
  const int64_t padded_keys = rounded_up(h.keys, kColumns), pairs = padded_keys / 2;
  uint32_t* const k = h.scratch;
  uint32_t* const v = k + padded_keys * dwords;
  float* const s = reinterpret_cast<float*>(v + pairs * d_pitch);
  float* const sums = s + kQueries * kMostKeys;
  uint32_t* const q = reinterpret_cast<uint32_t*>(sums) + kQueries * d_pitch;
  uint32_t* const stage = q + kQueries * dwords;
  const bool codes = h.out_dtype >= Dtype::s8, ready = lies_ready<Operand>(h, h.q_pitch);
  Running run;
  pack_key_panels<Operand>(h, dwords, stage, k);
  pack_values<Value_bf16>(h, d_pitch, pairs, v);
  begin_tiles();

  const int64_t chunk = keys_of_chunk(h.keys, kColumns);
  for (int64_t q0 = 0; q0 < h.queries; q0 += kQueries) {
    const int64_t count = h.queries - q0 < kQueries ? h.queries - q0 : kQueries;
    const int64_t rows = rounded_up(count, kTileRows);
    const uint32_t* queries = q;
    int64_t q_pitch = dwords;
    if (ready && count == rows)
      queries = static_cast<const uint32_t*>(row_of(h.q, h.dtype, h.q_pitch, q0)), q_pitch = h.q_pitch / Operand::kPer;
    else
      pack_rows<Operand>(h.q, h, h.q_pitch, h.queries, q0, count, rows, dwords, q);
    for (int64_t r = q0 + kQueries; r < q0 + 2 * kQueries && r < h.queries; ++r)
      fetch_row(h.q, h.dtype, h.q_pitch, r, h.head_dim);
    begin_queries(h, q0, count, rows, run);
    const int64_t end = keys_seen(h, q0, count);
    for (int64_t k0 = 0; k0 < end; k0 += chunk) {
      const int64_t keys = end - k0 < chunk ? end - k0 : chunk;
      for (int64_t j = 0; j < keys; j += kColumns)
        block<Operand>(rows, queries, q_pitch, k + (k0 + j) * dwords, kColumns, true, dwords / kTileDwords, false,
                       s + j, kMostKeys);
      for (int64_t lane = 0; lane < rows; lane += kWidth)
        softmax_rows<Operand>(h, q0, count, k0, keys, lane, s + lane * kMostKeys, run);
      if (k0 > 0) scale_rows(sums, d_pitch, count, run.rescale);
      for (int64_t d = 0; d < d_pitch; d += kFeatures) {
        const int64_t width = panel_width(d_pitch, d);
        block<Pairs>(rows, reinterpret_cast<const uint32_t*>(s), kMostKeys, v + d * pairs + k0 / 2 * width, width,
                     width > kTileRows, rounded_up(keys, kColumns) / kColumns, k0 > 0, sums + d, d_pitch);
      }
    }
    if (codes) {
      scale_rows(sums, d_pitch, count, run.inverse);
      store_code_rows(h, q0, count, sums, d_pitch);
    } else {
      store_rows(h, q0, count, sums, d_pitch, run.inverse);
    }
  }
  end_tiles();
}

}  // namespace

extern const AttentionFn attention_bf16_amx, attention_s8_bf16_amx;
const AttentionFn attention_bf16_amx = &attention_head<Pairs>;
const AttentionFn attention_s8_bf16_amx = &attention_head<Codes>;

}  // namespace bertkern::cpu
