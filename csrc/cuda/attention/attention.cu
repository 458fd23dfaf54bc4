// attention.h states what is computed.
#include "cuda/attention/attention.h"

#include <math.h>

#include <type_traits>

#include "cuda/ptx.h"

namespace bertkern::cuda {
namespace {

constexpr float kLog2e = 1.44269504088896341f;
constexpr float kHidden = -INFINITY;

template <int D>
struct Layout {
  static constexpr int kKeys = D > 64 ? 32 : 64;  // of a chunk
  static constexpr int kPitch = D + 8;            // elements from row to row in shared memory
  static constexpr int kChunk = 2 * kKeys * kPitch;
};

// What rows of 16-bit elements are read by: 8 at a time where all of them begin at multiples of 16 bytes, 2 or 1.
enum Piece : int { kSixteenBytes, kFourBytes, kTwoBytes };

struct Launched : AttentionParams {
  Piece piece;
  int resident;  // whether all chunks have a place of their own
  int pairs;     // whether two neighbours of a bias may be read at once
};

// x, of which the compiler knows nothing: what is made of it is made where it is needed, not kept in registers across
// the loop over the keys.
BK_DEVICE int forgotten(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
BK_DEVICE int at_most(int a, int b) { return a < b ? a : b; }
BK_DEVICE int at_least(int a, int b) { return a < b ? b : a; }

template <int N>
using Constant = std::integral_constant<int, N>;

// Rows first .. first + count of x into shared memory by all threads of the block: zeros from row `limit` on, and
// beyond head_dim.
template <class T, int D>
BK_DEVICE void fetch(T* shared, const T* x, int64_t pitch, int first, int count, int limit, const Launched& p) {
  constexpr int kPitch = Layout<D>::kPitch;
  const int thread = forgotten(thread_x());
  const auto run = [&](auto pieces, auto put) {
    constexpr int kPieces = decltype(pieces)::value, kWide = D / kPieces;
    constexpr int kAcross = kPieces <= 2 ? 2 : kPieces <= 4 ? 4 : kPieces <= 8 ? 8 : kPieces <= 16 ? 16 : 32;
    const int step = block_threads() / kAcross;
    for (int piece = thread % kAcross; piece < kPieces; piece += kAcross) {
      const bool wanted = piece * kWide < p.head_dim;
      const T* source = x + static_cast<int64_t>(first + thread / kAcross) * pitch + piece * kWide;
      T* target = shared + thread / kAcross * kPitch + piece * kWide;
#pragma unroll 1
      for (int row = thread / kAcross; row < count; row += step) {
        put(target, source, wanted && first + row < limit);
        source += step * pitch, target += step * kPitch;
      }
    }
  };
  if (p.piece == kSixteenBytes)
    run(Constant<D / 8>{}, [&](T* to, const T* from, bool valid) { cp_async16(to, valid ? from : x, valid); });
  else if (p.piece == kFourBytes)
    run(Constant<D / 2>{}, [&](T* to, const T* from, bool valid) { cp_async4(to, valid ? from : x, valid); });
  else
    run(Constant<D>{}, [&](T* to, const T* from, bool valid) { *to = valid ? *from : from_float<T>(0.0f); });
}

// Zeros in rows begin .. stop of a head of out, which the blocks of the sequence share; nearly always there are none.
template <class T>
BK_DEVICE void clear(T* out, int64_t pitch, int begin, int stop, int head_dim, int block, int blocks) {
  const int wide = head_dim % 8 == 0 ? 8 : 1;
  const int pieces = head_dim / wide;
#pragma unroll 1
  for (int row = begin + block; row < stop; row += blocks)
#pragma unroll 1
    for (int piece = thread_x(); piece < pieces; piece += block_threads()) {
      T* at = out + row * pitch + piece * wide;
      if (wide == 8)
        *reinterpret_cast<uint4*>(at) = make_uint4(0, 0, 0, 0);
      else
        *at = from_float<T>(0.0f);
    }
}

// Two neighbours of a bias; where the second is not there it is not read.
BK_DEVICE float2 bias_pair(const void* bias, Type type, int64_t at, bool both, bool aligned) {
  if (type == Type::f32) {
    const float* x = static_cast<const float*>(bias) + at;
    if (both && aligned) return *reinterpret_cast<const float2*>(x);
    return make_float2(x[0], both ? x[1] : 0.0f);
  }
  const uint16_t* x = static_cast<const uint16_t*>(bias) + at;
  uint32_t found;
  if (both && aligned)
    found = *reinterpret_cast<const uint32_t*>(x);
  else
    found = x[0] | (both ? static_cast<uint32_t>(x[1]) << 16 : 0u);
  if (type == Type::f16) return make_float2(to_float(unpack2<__half>(found, 0)), to_float(unpack2<__half>(found, 1)));
  return make_float2(to_float(unpack2<__nv_bfloat16>(found, 0)), to_float(unpack2<__nv_bfloat16>(found, 1)));
}

// What a warp holds of its 16 queries: lane 4 g + t of them rows g and g + 8.
template <int D>
struct Rows {
  uint32_t query[D / 16][4];
  float context[D / 8][4];
  float peak[2], total[2];  // total: this lane's share
};

// What a chunk's scores need beside the operands.
struct Place {
  int query, start, keys, length;  // first query of the warp, first key of the chunk, the sequence's keys and tokens
  const void* bias;
  int64_t bias_at;  // of query 0, key 0
};

// The keys of a chunk, kEdge where some of them are hidden: those from `keys` on, or after a query.
template <class T, int D, bool kBias, bool kEdge>
BK_DEVICE void take(Rows<D>& r, const T* shared, const Place& at, const Launched& p) {
  constexpr int kKeys = Layout<D>::kKeys, kPitch = Layout<D>::kPitch;
  const int lane = lane_id(), g = lane / 4, t = lane % 4;
  // Groups of 16 keys that nobody sees are left out.
  const int seen = at_most(at.keys, p.causal ? at.query + 16 : at.keys) - at.start;
  float score[kKeys / 8][4];
  const T* key = shared + (lane % 8 + lane / 16 * 8) * kPitch + lane / 8 % 2 * 8;
  BK_UNROLL
  for (int j = 0; j < kKeys / 16; ++j) {
    BK_UNROLL
    for (int i = 0; i < 4; ++i) score[2 * j][i] = score[2 * j + 1][i] = 0.0f;
    if (kEdge && 16 * j >= seen) continue;
    BK_UNROLL
    for (int d = 0; d < D / 16; ++d) {
      uint32_t both[4];
      ldmatrix_x4(both, key + 16 * j * kPitch + 16 * d);
      const uint32_t first[2] = {both[0], both[1]}, second[2] = {both[2], both[3]};
      mma_m16n8k16<T>(score[2 * j], r.query[d], first);
      mma_m16n8k16<T>(score[2 * j + 1], r.query[d], second);
    }
  }
  // In natural units beside a bias: finfo.min, which hides keys in many a mask, must not become -inf.
  if (kBias) {
    BK_UNROLL
    for (int n = 0; n < kKeys / 8; ++n) {
      const int column = at.start + 8 * n + 2 * t;
      BK_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int row = at.query + g + 8 * i;
        float2 added = make_float2(0.0f, 0.0f);
        if (row < at.length && column < at.keys)
          added = bias_pair(at.bias, p.bias_type, at.bias_at + row * p.bias_q + column, column + 1 < at.keys, p.pairs);
        score[n][2 * i] = score[n][2 * i] * p.scale + added.x;
        score[n][2 * i + 1] = score[n][2 * i + 1] * p.scale + added.y;
      }
    }
  }
  if (kEdge) {
    BK_UNROLL
    for (int n = 0; n < kKeys / 8; ++n) {
      BK_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int column = at.start + 8 * n + 2 * t + i % 2, row = at.query + g + i / 2 * 8;
        if (column >= at.keys || (p.causal && column > row)) score[n][i] = kHidden;
      }
    }
  }
  const float unit = kBias ? kLog2e : p.scale * kLog2e;
  BK_UNROLL
  for (int i = 0; i < 2; ++i) {
    float peak = r.peak[i];
    BK_UNROLL
    for (int n = 0; n < kKeys / 8; ++n) peak = fmaxf(peak, fmaxf(score[n][2 * i], score[n][2 * i + 1]));
    peak = fmaxf(peak, shfl_xor(peak, 1));
    peak = fmaxf(peak, shfl_xor(peak, 2));
    // 0 where all keys were hidden so far: -inf less -inf is NaN.
    const float base = peak == kHidden ? 0.0f : peak;
    const auto power = [&](float x) {
      return exp2_approx(kBias ? (x - base) * unit : fma_rn(x, unit, -mul_rn(base, unit)));
    };
    const float shrink = power(r.peak[i]);
    float sum = 0.0f;
    BK_UNROLL
    for (int n = 0; n < kKeys / 8; ++n) {
      score[n][2 * i] = power(score[n][2 * i]);
      score[n][2 * i + 1] = power(score[n][2 * i + 1]);
      sum += score[n][2 * i] + score[n][2 * i + 1];
    }
    r.peak[i] = peak;
    r.total[i] = fma_rn(r.total[i], shrink, sum);
    BK_UNROLL
    for (int n = 0; n < D / 8; ++n) r.context[n][2 * i] *= shrink, r.context[n][2 * i + 1] *= shrink;
  }
  const T* value = shared + (kKeys + lane % 8 + lane / 8 % 2 * 8) * kPitch + lane / 16 * 8;
  BK_UNROLL
  for (int j = 0; j < kKeys / 16; ++j) {
    if (kEdge && 16 * j >= seen) continue;
    uint32_t weight[4];
    BK_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float* pair = &score[2 * j + i / 2][i % 2 * 2];
      weight[i] = pack2<T>(pair[0], pair[1]);
    }
    BK_UNROLL
    for (int d = 0; d < D / 16; ++d) {
      uint32_t both[4];
      ldmatrix_x4_trans(both, value + 16 * j * kPitch + 16 * d);
      const uint32_t first[2] = {both[0], both[1]}, second[2] = {both[2], both[3]};
      mma_m16n8k16<T>(r.context[2 * d], weight, first);
      mma_m16n8k16<T>(r.context[2 * d + 1], weight, second);
    }
  }
}

// The warp's rows, first .. of `length`, by way of `stage`, its own 16 rows in shared memory.
template <class T, int D>
BK_DEVICE void store(const Rows<D>& r, T* stage, int begin, int head, int first, int length, float factor,
                     const Launched& p, bool biased) {
  const int64_t pitch = static_cast<int64_t>(p.heads) * p.head_dim;
  T* out = static_cast<T*>(p.out) + begin * pitch + head * p.head_dim;
  float* statistics = p.statistics ? p.statistics + static_cast<int64_t>(head) * p.tokens + begin : nullptr;
  constexpr int kPitch = Layout<D>::kPitch;
  const int lane = lane_id(), g = lane / 4, t = lane % 4;
  warp_sync();  // the queries, which lay there, have been read
  BK_UNROLL
  for (int i = 0; i < 2; ++i) {
    float total = r.total[i];
    total += shfl_xor(total, 1);
    total += shfl_xor(total, 2);
    const float inverse = total == 0.0f ? 0.0f : 1.0f / total, share = inverse * factor;
    T* row = stage + (g + 8 * i) * kPitch + 2 * t;
    BK_UNROLL
    for (int n = 0; n < D / 8; ++n)
      *reinterpret_cast<uint32_t*>(row + 8 * n) =
          pack2<T>(r.context[n][2 * i] * share, r.context[n][2 * i + 1] * share);
    if (statistics && t == 0 && first + g + 8 * i < length) {
      const float peak = r.peak[i] == kHidden ? 0.0f : r.peak[i];
      statistics[first + g + 8 * i] = biased ? peak : peak * (p.scale * kLog2e);
      statistics[static_cast<int64_t>(p.heads) * p.tokens + first + g + 8 * i] = inverse;
    }
  }
  warp_sync();
  const int wide = p.head_dim % 8 == 0 ? 8 : 1;
  const int pieces = p.head_dim / wide, count = at_most(length - first, 16);
#pragma unroll 1
  for (int i = lane; i < count * pieces; i += 32) {
    const int row = i / pieces, column = i % pieces * wide;
    T* to = out + (first + row) * pitch + column;
    const T* from = stage + row * kPitch + column;
    if (wide == 8)
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    else
      *to = *from;
  }
}

template <class T, int D, bool kBias>
BK_KERNEL(256, kBias || D > 64 ? 1 : 2)
void attend(const Launched p) {
  constexpr int kKeys = Layout<D>::kKeys, kPitch = Layout<D>::kPitch, kChunk = Layout<D>::kChunk;
  const int rows = block_threads() / 2;  // 16 a warp
  const int blocks = (p.max_length + rows - 1) / rows;
  const int block = block_x() % blocks, head = block_x() / blocks % p.heads, sequence = block_x() / blocks / p.heads;
  const int number = p.numbers ? p.numbers[head] : head;
  const int begin = sequence ? at_most(at_least(p.cu_seqlens[sequence], 0), p.tokens) : 0;
  const int end = at_most(at_least(p.cu_seqlens[sequence + 1], 0), p.tokens);
  int length = at_least(at_most(end - begin, p.max_length), 0);
  float factor = 1.0f;
  if (p.factors) {
    factor = p.factors[sequence * p.factors_b + number * p.factors_h];
    if (factor == 0.0f) length = 0;
  }
  // Behind the last sequence lie the tokens of none.
  const int stop = sequence == p.sequences - 1 ? p.tokens : end;
  const int64_t pitch = static_cast<int64_t>(p.heads) * p.head_dim;
  clear(static_cast<T*>(p.out) + head * p.head_dim, pitch, begin + length, stop, p.head_dim, block, blocks);
  const int first = block * rows;
  if (first >= length) return;
  const int keys = p.key_counts ? at_most(at_least(p.key_counts[sequence], 0), length) : length;
  const int last = p.causal ? at_most(keys, first + rows) : keys;
  const int chunks = (last + kKeys - 1) / kKeys;

  T* queries = reinterpret_cast<T*>(dynamic_shared());
  T* ring = queries + rows * kPitch;

  Rows<D> r;
  BK_UNROLL
  for (int n = 0; n < D / 8; ++n) {
    BK_UNROLL
    for (int i = 0; i < 4; ++i) r.context[n][i] = 0.0f;
  }
  r.peak[0] = r.peak[1] = kHidden;
  r.total[0] = r.total[1] = 0.0f;
  Place at{};
  at.query = first + 16 * warp_id(), at.keys = keys, at.length = length;
  at.bias = p.bias, at.bias_at = sequence * p.bias_b + number * p.bias_h;
  const bool live = at.query < length;
  T* own = queries + 16 * warp_id() * kPitch;

  // Steps -2 and -1 send for the queries and the first chunk, and for as many others as have a place; step n takes
  // chunk n and, where chunks come in turns, sends for chunk n + 2. Each step is a group of copies.
  int sent = -1;  // the queries are number -1
  for (int step = -2; step < chunks; ++step) {
    if (step >= 0) {
      if (step == 0 || !p.resident) {
        cp_async_wait<1>();
        block_sync();
      } else if (step == 1) {
        cp_async_wait<0>();
        block_sync();
      }
      if (live && step == 0) {
        const int lane = lane_id();
        BK_UNROLL
        for (int d = 0; d < D / 16; ++d) ldmatrix_x4(r.query[d], own + lane % 16 * kPitch + lane / 16 * 8 + 16 * d);
      }
      at.start = step * kKeys;
      if (live && !(p.causal && at.start > at.query + 15)) {
        const T* place = ring + (p.resident ? step : step % 2) * kChunk;
        if (at.start + kKeys > keys || (p.causal && at.start + kKeys > at.query + 1))
          take<T, D, kBias, true>(r, place, at, p);
        else
          take<T, D, kBias, false>(r, place, at, p);
      }
      if (p.resident) continue;
      block_sync();
    }
    const int until = step == -2 ? at_most(chunks, 1) : at_most(chunks, p.resident ? chunks : step + 3);
    if (chunks > 0) {
      for (; sent < until; ++sent) {
        // Whole groups of 16 rows; what lies behind them is not read.
        const int start = sent < 0 ? first : sent * kKeys, end = sent < 0 ? length : last;
        const int count = at_most((end - start + 15) / 16 * 16, sent < 0 ? rows : kKeys);
        T* place = sent < 0 ? queries : ring + (p.resident ? sent : sent % 2) * kChunk;
#pragma unroll 1
        for (int values = 0; values < (sent < 0 ? 1 : 2); ++values) {
          const void* data = sent < 0 ? p.q : values ? p.v : p.k;
          const int64_t pitch = sent < 0 ? p.q_t : values ? p.v_t : p.k_t;
          const int64_t next = sent < 0 ? p.q_h : values ? p.v_h : p.k_h;
          const T* x = static_cast<const T*>(data) + forgotten(begin) * pitch + forgotten(head) * next;
          fetch<T, D>(place + values * kKeys * kPitch, x, pitch, start, count, sent < 0 ? length : keys, p);
        }
      }
    }
    cp_async_commit();
  }
  if (!live) return;
  store<T, D>(r, own, forgotten(begin), forgotten(head), at.query, length, factor, p, kBias);
}

Piece piece_of(const AttentionParams& p) {
  uintptr_t bits = 0;
  for (const void* x : {p.q, p.k, p.v}) bits |= reinterpret_cast<uintptr_t>(x);
  for (const int64_t stride : {p.q_t, p.q_h, p.k_t, p.k_h, p.v_t, p.v_h}) bits |= static_cast<uintptr_t>(2 * stride);
  bits |= static_cast<uintptr_t>(2 * p.head_dim);
  return bits % 16 == 0 ? kSixteenBytes : bits % 4 == 0 ? kFourBytes : kTwoBytes;
}

bool pairs_of(const AttentionParams& p) {
  const int size = p.bias_type == Type::f32 ? 4 : 2;
  const uintptr_t bits = reinterpret_cast<uintptr_t>(p.bias) | static_cast<uintptr_t>(size * p.bias_b) |
                         static_cast<uintptr_t>(size * p.bias_h) | static_cast<uintptr_t>(size * p.bias_q);
  return bits % (2 * size) == 0;
}

template <class T, int D>
cudaError_t launch_for(const AttentionParams& params, cudaStream_t stream) {
  Launched p{params, piece_of(params), 0, pairs_of(params)};
  const int64_t pairs = static_cast<int64_t>(p.sequences) * p.heads;
  // 128 queries read K and V half as often as 64 do; where there are few blocks they had better be small.
  int warps = p.warps;
  if (!warps) warps = p.max_length > 64 && pairs * ((p.max_length + 127) / 128) >= 256 ? 8 : 4;
  const int64_t blocks = (p.max_length + 16 * warps - 1) / (16 * warps) * pairs;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  const int chunks = (p.max_length + Layout<D>::kKeys - 1) / Layout<D>::kKeys;
  const auto bytes = [&](int places) {
    return sizeof(T) * (16 * warps * Layout<D>::kPitch + static_cast<size_t>(places) * Layout<D>::kChunk);
  };
  p.resident = p.places ? p.places >= chunks : chunks <= 2 || bytes(chunks) <= kResidentBytes;
  const size_t shared = bytes(p.resident ? chunks : 2);
  const dim3 grid(static_cast<unsigned>(blocks)), threads(32 * warps);
  return params.bias ? BK_LAUNCH((attend<T, D, true>), grid, threads, shared, stream, p)
                     : BK_LAUNCH((attend<T, D, false>), grid, threads, shared, stream, p);
}

template <class T>
cudaError_t launch_of(const AttentionParams& p, cudaStream_t stream) {
  if (p.head_dim <= 16) return launch_for<T, 16>(p, stream);
  if (p.head_dim <= 32) return launch_for<T, 32>(p, stream);
  if (p.head_dim <= 64) return launch_for<T, 64>(p, stream);
  if (p.head_dim <= 96) return launch_for<T, 96>(p, stream);
  return launch_for<T, 128>(p, stream);
}

}  // namespace

cudaError_t launch_attention(const AttentionParams& p, cudaStream_t stream) {
  if (p.head_dim < 1 || p.head_dim > 128 || p.type == Type::f32) return cudaErrorInvalidValue;
  if (!p.tokens || !p.heads || !p.sequences || !p.max_length) return cudaSuccess;
  return p.type == Type::f16 ? launch_of<__half>(p, stream) : launch_of<__nv_bfloat16>(p, stream);
}

}  // namespace bertkern::cuda
