#include "cuda/groupwise/groupwise.h"

namespace bertkern::cuda {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps, kStrip = 32, kPad = 128, kMostShared = 96 * 1024;

// --- codes to numbers ------------------------------------------------------------------------------------------------

// 2^10 and 2^7: numbers whose last mantissa bit counts 1.
template <class T>
struct Base;
template <>
struct Base<__half> {
  static constexpr uint32_t kBits = 0x64006400;
  static constexpr int kMantissa = 10, kExponent = 15;
};
template <>
struct Base<__nv_bfloat16> {
  static constexpr uint32_t kBits = 0x43004300;
  static constexpr int kMantissa = 7, kExponent = 127;
};

// Both halves of a register: whole / 2^down or its negative, of a whole number from 1 that the mantissa holds.
template <class T>
BK_DEVICE uint32_t pair_of(int whole, int down = 0, bool negative = false) {
  constexpr int kMantissa = Base<T>::kMantissa;
  int top = 0;
  BK_UNROLL
  for (int i = 1; i < 11; ++i) top = whole >> i ? i : top;
  const int fraction =
      (top > kMantissa ? whole >> (top - kMantissa) : whole << (kMantissa - top)) & ((1 << kMantissa) - 1);
  const uint32_t bits = (negative ? 0x8000u : 0u) |
                        static_cast<uint32_t>(Base<T>::kExponent + top - down) << kMantissa |
                        static_cast<uint32_t>(fraction);
  return bits | bits << 16;
}

// Fields of `width` bits at bit `low` of each byte of a word: of bytes 0 and 2, and of 1 and 3, less 2^(width - 1).
template <class T>
BK_DEVICE void decode_field(uint32_t word, int width, int low, uint32_t (&pairs)[2]) {
  if (low + width > Base<T>::kMantissa) word >>= low, low = 0;
  const uint32_t mask = ((1u << width) - 1) << low, both = mask | mask << 16;
  // (base + code 2^low) / 2^low - (base / 2^low + middle): nothing is rounded.
  const uint32_t down = pair_of<T>(1, low);
  const uint32_t less = pair_of<T>((1 << (Base<T>::kMantissa - low)) + (1 << (width - 1)), 0, true);
  // (a & b) | c at once: the compiler makes two instructions of two constants.
  pairs[0] = fma2<T>(lop3<(0xf0 & 0xcc) | 0xaa>(word, both, Base<T>::kBits), down, less);
  pairs[1] = fma2<T>(lop3<(0xf0 & 0xcc) | 0xaa>(word >> 8, both, Base<T>::kBits), down, less);
}

// Whole bytes, less 128.
BK_DEVICE void decode_bytes(uint32_t word, uint32_t (&pairs)[2], __half) {
  const uint32_t one = pair_of<__half>(1), less = pair_of<__half>(1024 + 128, 0, true);
  pairs[0] = fma2<__half>(prmt(word, Base<__half>::kBits, 0x5250), one, less);
  pairs[1] = fma2<__half>(prmt(word, Base<__half>::kBits, 0x5351), one, less);
}
BK_DEVICE void decode_bytes(uint32_t word, uint32_t (&pairs)[2], __nv_bfloat16) {
  // bf16 counts no further than 256 in ones: by way of 2^23 in fp32.
  float x[4];
  BK_UNROLL
  for (uint32_t i = 0; i < 4; ++i) x[i] = float_of(prmt(word, 0x4b000000, 0x7440 + i)) - (8388608.0f + 128.0f);
  pairs[0] = round_bf16x2(x[0], x[2]);
  pairs[1] = round_bf16x2(x[1], x[3]);
}

// --- what a step and a stage are -------------------------------------------------------------------------------------

template <int BITS, bool ALONG_K, int FEATURE_TILES, int TOKEN_TILES>
struct Step {
  static constexpr int kStrips = BITS % 2 ? 8 : 4;
  static constexpr int kFeatures = 16 * FEATURE_TILES, kTokens = 8 * TOKEN_TILES;
  // Tiles of the plane of 8, 4 or 2 bits, then one of the plane of 1 bit.
  static constexpr int kWidth = BITS == 3 ? 2 : BITS, kWide = kStrips * kWidth / 8, kPlanes = kWide + (BITS == 3);
  static constexpr int kTileBytes = kFeatures * 32;
  static constexpr int kScales = kPlanes * kTileBytes;  // where [group][scale, shift][features] begin
  static constexpr int kBytes = kScales + (ALONG_K ? kStrips * 2 * kFeatures * 4 : 0);
  static constexpr int kFit = kMostShared / (kWarps * kBytes);
  static constexpr int kStages = kFit < 4 ? kFit : 4;
  static constexpr int kSums = kWarps * (kFeatures + 1) * kTokens * 4;
  static constexpr int kShared = kWarps * kStages * kBytes > kSums ? kWarps * kStages * kBytes : kSums;
  static_assert(kStages >= 2, "a stage is fetched while another is read");
};

// x[0 .. 7], zeros from `count` on.
template <class T>
BK_DEVICE uint4 load_columns(const T* x, int count, bool aligned) {
  uint4 found = {0, 0, 0, 0};
  if (count >= 8 && aligned) {
    found = *reinterpret_cast<const uint4*>(x);
  } else if (count > 0) {
    uint32_t pairs[4];
    BK_UNROLL
    for (int i = 0; i < 4; ++i) {
      const T zero = from_float<T>(0.0f);
      pairs[i] = pack2<T>(2 * i < count ? x[2 * i] : zero, 2 * i + 1 < count ? x[2 * i + 1] : zero);
    }
    found = {pairs[0], pairs[1], pairs[2], pairs[3]};
  }
  return found;
}

template <class T, int BITS, bool ALONG_K, int FEATURE_TILES, int TOKEN_TILES>
BK_KERNEL(kThreads, 1)
void multiply(Groupwise p) {
  using At = Step<BITS, ALONG_K, FEATURE_TILES, TOKEN_TILES>;
  constexpr int kStrips = At::kStrips, kStages = At::kStages, kFeatures = At::kFeatures, kTokens = At::kTokens;
  constexpr int kAhead = 4;  // strips of x that are held
  const int thread = thread_x(), lane = thread & 31, warp = thread >> 5, g = lane >> 2, q = lane & 3;
  const int first_feature = block_x() * kFeatures, first_token = block_y() * kTokens;
  const bool shifted = p.shift != nullptr;

  // This thread block's steps; the warp takes every eighth.
  const int all = (p.strips + kStrips - 1) / kStrips, each_split = (all + p.splits - 1) / p.splits;
  const int from = block_z() * each_split, end = from + each_split < all ? from + each_split : all;

  // Groups along K: `each` strips a group; a scale multiplies the sums of `together` strips, 2^log.
  const int each = ALONG_K ? (p.group + kStrip - 1) / kStrip : 1;
  const int log = each % 8 == 0 && kStrips == 8 ? 3 : each % 4 == 0 ? 2 : each % 2 == 0 ? 1 : 0, together = 1 << log;
  const uint32_t magic = 0xffffffffu / static_cast<uint32_t>(each) + 1;  // floor(s / each) of s < 2^16, each > 1
  const auto group_of = [&](int strip) {
    return each == 1 ? strip : static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(strip)) * magic >> 32);
  };

  // --- fetching weights, and the scales of their groups
  const int64_t pitch = static_cast<int64_t>((p.features + kPad - 1) / kPad) * (kPad * 32);
  const int wide_tiles = p.strips * At::kWidth / 8;
  const uint8_t* const source = p.codes + static_cast<int64_t>(first_feature) * 32 + lane * 16;
  char* const stages = dynamic_shared() + warp * kStages * At::kBytes;
  const auto fetch = [&](int step, int stage) {
    char* const to = stages + stage * At::kBytes;
    BK_UNROLL
    for (int i = 0; i < At::kPlanes; ++i) {
      int64_t tile = static_cast<int64_t>(step) * At::kWide + i;
      bool there = true;
      if (BITS == 3) {
        there = i == At::kWide || tile < wide_tiles;  // S may be no multiple of 8
        if (i == At::kWide) tile = wide_tiles + step;
      }
      BK_UNROLL
      for (int m = 0; m < FEATURE_TILES; ++m)
        cp_async16(to + i * At::kTileBytes + m * 512 + lane * 16, source + (there ? tile * pitch : 0) + m * 512, there);
    }
    if (ALONG_K) {
      const bool second = lane >= 16;
      const float* const values = second ? p.shift : p.scale;
      BK_UNROLL
      for (int slot = 0; slot < kStrips; ++slot) {
        if (slot << log >= kStrips) break;
        const int place = group_of(step * kStrips + (slot << log));
        const int number = p.members && place < p.held ? p.members[place] : place;
        BK_UNROLL
        for (int m = 0; m < FEATURE_TILES; ++m) {
          const int feature = first_feature + m * 16 + (lane & 15);
          const bool there = place < p.held && feature < p.n && (!second || shifted);
          char* const at = to + At::kScales + ((slot * 2 + second) * kFeatures + m * 16 + (lane & 15)) * 4;
          cp_async4(at, there ? values + static_cast<int64_t>(number) * p.n + feature : p.scale, there);
        }
      }
    }
  };

  // --- fetching x, strip by strip
  const T* rows[TOKEN_TILES];
  bool live[TOKEN_TILES];
  BK_UNROLL
  for (int t = 0; t < TOKEN_TILES; ++t) {
    const int token = first_token + t * 8 + g;
    live[t] = token < p.tokens;
    rows[t] = static_cast<const T*>(p.x) + (live[t] ? token : 0) * p.x_stride;
  }
  const bool whole = !ALONG_K || (p.group % kStrip == 0 && !p.members);  // strips follow each other in x
  const bool aligned = aligned16(p.x) && p.x_stride % 8 == 0 && (!ALONG_K || p.group % 8 == 0);
  uint4 x[TOKEN_TILES][kAhead];
  const auto fetch_x = [&](int strip, int slot) {
    int column = strip * kStrip + q * 8, count = p.k - column;
    if (ALONG_K && !whole) {
      const int place = group_of(strip), inside = (strip - place * each) * kStrip + q * 8;
      const int number = p.members && place < p.held ? p.members[place] : place;
      column = number * p.group + inside;
      count = place < p.held ? (p.group - inside < p.k - column ? p.group - inside : p.k - column) : 0;
    }
    BK_UNROLL
    for (int t = 0; t < TOKEN_TILES; ++t)
      x[t][slot] = load_columns(rows[t] + (count > 0 ? column : 0), live[t] ? count : 0, aligned);
  };

  float sum[FEATURE_TILES][TOKEN_TILES][4] = {};                 // [features][tokens]
  float part[ALONG_K ? FEATURE_TILES : 1][TOKEN_TILES][4] = {};  // of the strips that share a scale
  float x_sum[TOKEN_TILES][4] = {};  // of x, in every row: along N of all strips, along K of those
  const uint32_t one = pair_of<T>(1);
  const uint32_t ones[4] = {one, one, one, one};

  int step = from + warp;
  BK_UNROLL
  for (int s = 0; s < kStages - 1; ++s) {
    if (step + s * kWarps < end) fetch(step + s * kWarps, s);
    cp_async_commit();
  }
  if (step < end) {
    BK_UNROLL
    for (int j = 0; j < kAhead; ++j) fetch_x(step * kStrips + j, j);
  }

  int stage = 0, filled = kStages - 1;
  for (; step < end; step += kWarps) {
    cp_async_wait<kStages - 2>();
    warp_sync();
    if (step + (kStages - 1) * kWarps < end) fetch(step + (kStages - 1) * kWarps, filled);
    cp_async_commit();
    filled = filled + 1 == kStages ? 0 : filled + 1;
    const char* const now = stages + stage * At::kBytes;
    stage = stage + 1 == kStages ? 0 : stage + 1;
    const char* const mine = now + g * 32 + q * 8;

    uint2 wide[FEATURE_TILES][2], bit[FEATURE_TILES][2];  // [features 0-15, 16-31][g, g + 8]
    BK_UNROLL
    for (int j = 0; j < kStrips; ++j) {
      constexpr int kShare = 8 / At::kWidth;  // strips in a byte
      BK_UNROLL
      for (int m = 0; m < FEATURE_TILES; ++m) {
        BK_UNROLL
        for (int h = 0; h < 2; ++h) {
          const char* const word = mine + m * 512 + h * 256;
          if (j % kShare == 0) wide[m][h] = *reinterpret_cast<const uint2*>(word + j / kShare * At::kTileBytes);
          if (BITS == 3 && j == 0) bit[m][h] = *reinterpret_cast<const uint2*>(word + At::kWide * At::kTileBytes);
        }
      }
      // x in the order in which the codes come.
      uint32_t b[TOKEN_TILES][2][2];
      BK_UNROLL
      for (int t = 0; t < TOKEN_TILES; ++t) {
        const uint4 v = x[t][j % kAhead];
        b[t][0][0] = prmt(v.x, v.y, 0x5410), b[t][0][1] = prmt(v.x, v.y, 0x7632);
        b[t][1][0] = prmt(v.z, v.w, 0x5410), b[t][1][1] = prmt(v.z, v.w, 0x7632);
        if (shifted) {
          mma_m16n8k16<T>(x_sum[t], ones, b[t][0]);
          mma_m16n8k16<T>(x_sum[t], ones, b[t][1]);
        }
      }
      const int next = j + kAhead < kStrips ? step * kStrips + j + kAhead : (step + kWarps - 1) * kStrips + j + kAhead;
      if (j + kAhead < kStrips || step + kWarps < end) fetch_x(next, j % kAhead);
      BK_UNROLL
      for (int m = 0; m < FEATURE_TILES; ++m) {
        BK_UNROLL
        for (int half = 0; half < 2; ++half) {  // words 0 and 1: columns 8 q .. + 3, and + 4 .. + 7
          uint32_t pairs[2][2];
          BK_UNROLL
          for (int h = 0; h < 2; ++h) {
            uint32_t word = half ? wide[m][h].y : wide[m][h].x;
            if constexpr (BITS == 8) {
              decode_bytes(word, pairs[h], T());
            } else if constexpr (BITS == 3) {
              const uint32_t third = half ? bit[m][h].y : bit[m][h].x;
              const uint32_t top = j < 2 ? third << (2 - j) : third >> (j - 2);
              // Two bits of the one, the rest of the other, of which the third counts.
              word = lop3<(0xf0 & 0xcc) | (0xaa & 0x33)>(word >> 2 * (j % kShare), 0x03030303u, top);
              decode_field<T>(word, 3, 0, pairs[h]);
            } else {
              decode_field<T>(word, BITS, BITS * (j % kShare), pairs[h]);
            }
          }
          const uint32_t a[4] = {pairs[0][0], pairs[1][0], pairs[0][1], pairs[1][1]};
          BK_UNROLL
          for (int t = 0; t < TOKEN_TILES; ++t) mma_m16n8k16<T>(ALONG_K ? part[m][t] : sum[m][t], a, b[t][half]);
        }
      }
      if (ALONG_K && ((j + 1) & (together - 1)) == 0) {
        const float* const of_group =
            reinterpret_cast<const float*>(now + At::kScales) + (j >> log) * 2 * kFeatures + g;
        BK_UNROLL
        for (int m = 0; m < FEATURE_TILES; ++m) {
          BK_UNROLL
          for (int h = 0; h < 2; ++h) {
            const float scale = of_group[m * 16 + h * 8], shift = of_group[kFeatures + m * 16 + h * 8];
            BK_UNROLL
            for (int t = 0; t < TOKEN_TILES; ++t) {
              BK_UNROLL
              for (int i = 0; i < 2; ++i) {
                float& total = sum[m][t][2 * h + i];
                total = fma_rn(scale, part[m][t][2 * h + i], total);
                total = fma_rn(-shift, x_sum[t][i], total);
                part[m][t][2 * h + i] = 0.0f;
              }
            }
          }
        }
        BK_UNROLL
        for (int t = 0; t < TOKEN_TILES; ++t) {
          BK_UNROLL
          for (int i = 0; i < 4; ++i) x_sum[t][i] = 0.0f;
        }
      }
    }
  }

  // --- the warps' sums, in their order
  cp_async_wait<0>();
  block_sync();
  float* const sums = reinterpret_cast<float*>(dynamic_shared());  // [warps][tokens][features]
  float* const x_sums = sums + kWarps * kTokens * kFeatures;       // [warps][tokens]
  BK_UNROLL
  for (int t = 0; t < TOKEN_TILES; ++t) {
    BK_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int token = t * 8 + q * 2 + i % 2;
      BK_UNROLL
      for (int m = 0; m < FEATURE_TILES; ++m)
        sums[(warp * kTokens + token) * kFeatures + m * 16 + g + i / 2 * 8] = sum[m][t][i];
      if (!ALONG_K && g == 0 && i < 2) x_sums[warp * kTokens + token] = x_sum[t][i];
    }
  }
  block_sync();
#pragma unroll 1
  for (int i = thread; i < kTokens * kFeatures; i += kThreads) {
    const int token = first_token + i / kFeatures, feature = first_feature + i % kFeatures;
    if (token >= p.tokens || feature >= p.features) continue;
    float total = 0.0f, of_x = 0.0f;
    BK_UNROLL
    for (int w = 0; w < kWarps; ++w) {
      total += sums[w * kTokens * kFeatures + i];
      if (!ALONG_K) of_x += x_sums[w * kTokens + i / kFeatures];
    }
    const int column = !ALONG_K && p.members ? p.members[feature] : feature;
    if (!ALONG_K) {
      total *= p.scale[column];
      if (shifted) total = fma_rn(-p.shift[column], of_x, total);
    }
    if (p.partial) {
      p.partial[(static_cast<int64_t>(p.slot + block_z()) * p.tokens + token) * p.n + column] = total;
      continue;
    }
    float result[1] = {total + (p.bias ? p.bias[column] : 0.0f)};
    activate(result, p.activation);
    if (p.residual) result[0] += load_float(p.residual, token * p.residual_stride + column, p.residual_type);
    store_float(p.y, token * p.y_stride + column, p.y_type, result[0]);
  }
}

BK_KERNEL(256, 1) void add_in_order(Groupwise p, int slots) {
  const int64_t place = static_cast<int64_t>(block_x()) * 256 + thread_x(), size = static_cast<int64_t>(p.tokens) * p.n;
  if (place >= size) return;
  const int64_t token = place / p.n;
  const int column = static_cast<int>(place - token * p.n);
  float total = 0.0f;
  for (int slot = 0; slot < slots; ++slot) total += p.partial[slot * size + place];
  float result[1] = {total + (p.bias ? p.bias[column] : 0.0f)};
  activate(result, p.activation);
  if (p.residual) result[0] += load_float(p.residual, token * p.residual_stride + column, p.residual_type);
  store_float(p.y, token * p.y_stride + column, p.y_type, result[0]);
}

template <class T, int BITS, bool ALONG_K, int FEATURE_TILES, int TOKEN_TILES>
cudaError_t start(const Groupwise& p, cudaStream_t stream) {
  using At = Step<BITS, ALONG_K, FEATURE_TILES, TOKEN_TILES>;
  const dim3 grid((p.features + At::kFeatures - 1) / At::kFeatures, (p.tokens + At::kTokens - 1) / At::kTokens,
                  p.splits);
  return BK_LAUNCH((multiply<T, BITS, ALONG_K, FEATURE_TILES, TOKEN_TILES>), grid, dim3(kThreads), At::kShared, stream,
                   p);
}

template <class T, int BITS, bool ALONG_K>
cudaError_t with_axis(const Groupwise& p, cudaStream_t stream, int tile_tokens) {
  if (tile_tokens ? tile_tokens == 16 : p.tokens > 8) return start<T, BITS, ALONG_K, 2, 2>(p, stream);
  // 32 features share the work on x, where thread blocks of them are enough for a GPU.
  if (p.features >= 3072) return start<T, BITS, ALONG_K, 2, 1>(p, stream);
  return start<T, BITS, ALONG_K, 1, 1>(p, stream);
}

template <class T, int BITS>
cudaError_t with_bits(const Groupwise& p, cudaStream_t stream, int tile_tokens) {
  return p.group ? with_axis<T, BITS, true>(p, stream, tile_tokens) : with_axis<T, BITS, false>(p, stream, tile_tokens);
}

template <class T>
cudaError_t with_type(const Groupwise& p, cudaStream_t stream, int tile_tokens) {
  switch (p.bits) {
    case 2:
      return with_bits<T, 2>(p, stream, tile_tokens);
    case 3:
      return with_bits<T, 3>(p, stream, tile_tokens);
    case 4:
      return with_bits<T, 4>(p, stream, tile_tokens);
    case 8:
      return with_bits<T, 8>(p, stream, tile_tokens);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

int groupwise_splits(int n, int strips) {
  const int wanted = 64 / ((n + 15) / 16 > 1 ? (n + 15) / 16 : 1), most = strips / 64;
  const int found = wanted < most ? wanted : most;
  return found < 1 ? 1 : found > 4 ? 4 : found;
}

cudaError_t launch_groupwise(const Groupwise& p, cudaStream_t stream, int tile_tokens) {
  if (p.strips >= 1 << 16 || p.splits < 1 || (!p.partial && p.splits > 1)) return cudaErrorInvalidValue;
  if (p.tokens <= 0 || p.features <= 0) return cudaSuccess;
  return p.bf16 ? with_type<__nv_bfloat16>(p, stream, tile_tokens) : with_type<__half>(p, stream, tile_tokens);
}

cudaError_t launch_add_in_order(const Groupwise& p, int slots, cudaStream_t stream) {
  const int64_t size = static_cast<int64_t>(p.tokens) * p.n;
  if (size <= 0) return cudaSuccess;
  return BK_LAUNCH(add_in_order, dim3(static_cast<unsigned>((size + 255) / 256)), dim3(256), 0, stream, p, slots);
}

}  // namespace bertkern::cuda
