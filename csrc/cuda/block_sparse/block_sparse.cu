#include "cuda/block_sparse/block_sparse.h"

namespace bertkern::cuda {
namespace {

constexpr int kStepBytes = 128, kChunks = kStepBytes / 16;

// A row of a stage is 8 chunks of 16 bytes; chunk c of row r stands at c ^ (r % 8), so that the 8 rows of a matrix that
// ldmatrix reads lie in different banks.
BK_DEVICE int place_of(int row, int chunk) { return row * kStepBytes + ((chunk ^ (row & 7)) << 4); }

BK_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half) {
  mma_m16n8k16_f16(c, a, b);
}
BK_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16) {
  mma_m16n8k16_bf16(c, a, b);
}
BK_DEVICE void multiply_add(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int8_t) {
  mma_m16n8k32_s8(c, a, b);
}

template <class T>
struct Sum {
  using type = float;
};
template <>
struct Sum<int8_t> {
  using type = int32_t;
};

// What a thread block computes, and by how many warps; `blocks` of them share a multiprocessor's registers.
template <int TOKENS, int FEATURES, int WARPS_T, int WARPS_N, int STAGES, int BLOCKS>
struct Shape {
  static constexpr int kTokens = TOKENS, kFeatures = FEATURES, kWarpsT = WARPS_T, kWarpsN = WARPS_N;
  static constexpr int kStages = STAGES, kBlocks = BLOCKS, kThreads = 32 * WARPS_T * WARPS_N;
  static constexpr int kStageBytes = (TOKENS + FEATURES) * kStepBytes;
};
template <int TOKENS, int FEATURES>
struct TileOf;
template <>
struct TileOf<128, 128> : Shape<128, 128, 2, 4, 3, 2> {};
template <>
struct TileOf<128, 64> : Shape<128, 64, 2, 2, 3, 3> {};
template <>
struct TileOf<128, 32> : Shape<128, 32, 4, 1, 3, 3> {};
template <>
struct TileOf<32, 128> : Shape<32, 128, 1, 4, 4, 2> {};
template <>
struct TileOf<32, 64> : Shape<32, 64, 2, 2, 4, 4> {};
template <>
struct TileOf<32, 32> : Shape<32, 32, 2, 2, 4, 4> {};

template <class T, class Tile>
BK_KERNEL(Tile::kThreads, Tile::kBlocks)
void multiply(BlockSparse p) {
  using S = typename Sum<T>::type;
  constexpr int kTokens = Tile::kTokens, kFeatures = Tile::kFeatures;
  constexpr int kThreads = Tile::kThreads, kStages = Tile::kStages, kStage = Tile::kStageBytes;
  constexpr int kEach = 16 / sizeof(T);  // elements of a chunk
  constexpr int kWarpT = kTokens / Tile::kWarpsT, kWarpN = kFeatures / Tile::kWarpsN;
  constexpr int kM = kWarpT / 16, kN = kWarpN / 8;
  constexpr int kRows = kThreads / kChunks;  // rows that all threads fetch at once
  constexpr int kFetchX = kTokens / kRows, kFetchW = kFeatures / kRows;
  static_assert(kM >= 1 && kN >= 2 && kN % 2 == 0 && kFetchX >= 1 && kFetchW >= 1, "a tile of whole fragments");

  char* const shared = dynamic_shared();
  const int thread = thread_x(), lane = thread & 31, warp = thread >> 5;
  const int first_token = block_y() * kTokens, first_feature = block_x() * kFeatures;
  const int tokens = p.live && *p.live < p.tokens ? *p.live : p.tokens;
  if (first_token >= tokens) return;
  const int begin = p.crow[block_x()], kept = p.crow[block_x() + 1] - begin;
  // A block's row is 2, 4, 8 or 16 chunks: 2^shift.
  const int in_block = p.block_columns / kEach, shift = in_block < 4 ? 1 : in_block < 8 ? 2 : in_block < 16 ? 3 : 4;
  const int steps = ((kept << shift) + kChunks - 1) / kChunks;

  // --- fetching: a thread's chunk is the same in every row, so a step asks for one block's column.
  const int chunk = thread % kChunks, row = thread / kChunks;
  const T* const x = static_cast<const T*>(p.x) + (first_token + row) * p.x_stride;
  const T* const values = static_cast<const T*>(p.values);
  const int live = tokens - first_token - row;  // rows row, row + kRows, ... below are tokens
  const int target = place_of(row, chunk);
  int at = chunk, place = at >> shift;                   // in the row of kept blocks side by side
  int column = place < kept ? p.col[begin + place] : 0;  // known a step ahead
  const auto fetch = [&](int stage) {
    char* const to = shared + stage * kStage + target;
    const bool there = place < kept;
    const int inside = (at & (in_block - 1)) * kEach;
    const int k = column * p.block_columns + inside;
    const int bytes = there ? clamp((p.k - k) * static_cast<int>(sizeof(T)), 0, 16) : 0;
    // Where nothing is read the address may lead anywhere.
    const T* from = x + k;
    BK_UNROLL
    for (int i = 0; i < kFetchX; ++i, from += kRows * p.x_stride)
      cp_async16_part(to + i * kRows * kStepBytes, from, i * kRows < live ? bytes : 0);
    const T* w = values + (static_cast<int64_t>(begin + place) * kFeatures + row) * p.block_columns + inside;
    BK_UNROLL
    for (int i = 0; i < kFetchW; ++i)
      cp_async16(to + (kTokens + i * kRows) * kStepBytes, w + i * kRows * p.block_columns, there);
    at += kChunks;
    place = at >> shift;
    if (place < kept) column = p.col[begin + place];
  };

  BK_UNROLL
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < steps) fetch(s);
    cp_async_commit();
  }

  // --- multiplying
  const int warp_t = warp / Tile::kWarpsN * kWarpT, warp_n = warp % Tile::kWarpsN * kWarpN;
  const int a_place = place_of(warp_t + (lane & 15), lane >> 4);
  const int b_place = kTokens * kStepBytes + place_of(warp_n + (lane & 7) + (lane >> 4 << 3), lane >> 3 & 1);
  S sum[kM][kN][4] = {};
  int stage = 0, filled = kStages - 1;
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<kStages - 2>();
    block_sync();
    if (step + kStages - 1 < steps) fetch(filled);
    cp_async_commit();
    filled = filled + 1 == kStages ? 0 : filled + 1;
    const char* const now = shared + stage * kStage;
    stage = stage + 1 == kStages ? 0 : stage + 1;
    BK_UNROLL
    for (int kk = 0; kk < kChunks / 2; ++kk) {
      uint32_t a[kM][4], b[kN / 2][4];
      // Two chunks on: bits 5 and 6 of the place, whose chunk is exclusive-or'ed.
      BK_UNROLL
      for (int m = 0; m < kM; ++m) ldmatrix_x4(a[m], now + (a_place ^ (kk << 5)) + m * 16 * kStepBytes);
      BK_UNROLL
      for (int n = 0; n < kN / 2; ++n) ldmatrix_x4(b[n], now + (b_place ^ (kk << 5)) + n * 16 * kStepBytes);
      BK_UNROLL
      for (int m = 0; m < kM; ++m) {
        BK_UNROLL
        for (int n = 0; n < kN; ++n) {
          const uint32_t of_n[2] = {b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]};
          multiply_add(sum[m][n], a[m], of_n, T());
        }
      }
    }
  }

  // --- finishing: through shared memory, whose rows are a step of banks apart
  constexpr int kPitch = kFeatures + 8;
  static_assert(kTokens * kPitch * 4 <= kStages * kStage, "the sums fit where the stages were");
  cp_async_wait<0>();
  block_sync();
  S* const sums = reinterpret_cast<S*>(shared);
  BK_UNROLL
  for (int m = 0; m < kM; ++m) {
    BK_UNROLL
    for (int n = 0; n < kN; ++n) {
      BK_UNROLL
      for (int i = 0; i < 4; ++i)
        sums[(warp_t + m * 16 + (lane >> 2) + i / 2 * 8) * kPitch + warp_n + n * 8 + (lane & 3) * 2 + i % 2] =
            sum[m][n][i];
    }
  }
  block_sync();
  constexpr int kAcross = kFeatures / 8, kDown = kThreads / kAcross;
  const int offset = thread % kAcross * 8, feature = first_feature + offset, count = clamp(p.n - feature, 0, 8);
  if (count <= 0) return;
  float bias[8] = {}, weight_scale[8] = {};
  if (p.bias) load8(p.bias, feature, p.bias_type, count, bias);
  if (sizeof(T) == 1) load8(p.weight_scale, feature, Type::f32, count, weight_scale);
#pragma unroll 1
  for (int r = thread / kAcross; r < kTokens && first_token + r < tokens; r += kDown) {
    const int64_t token = first_token + r;
    float result[8];
    if constexpr (sizeof(T) == 1) {
      const float x_scale = p.x_scale[token];
      const int zero = p.x_zero ? p.x_zero[token] : 0;
      BK_UNROLL
      for (int e = 0; e < 8; ++e) {
        int32_t whole = sums[r * kPitch + offset + e];
        // Wrapping: the difference fits, its parts need not.
        if (p.x_zero && e < count)
          whole = static_cast<int32_t>(static_cast<uint32_t>(whole) -
                                       static_cast<uint32_t>(zero) * static_cast<uint32_t>(p.column_sum[feature + e]));
        result[e] = mul_rn(static_cast<float>(whole), mul_rn(x_scale, weight_scale[e]));
        if (p.bias) result[e] = add_rn(result[e], bias[e]);
      }
    } else {
      BK_UNROLL
      for (int e = 0; e < 8; ++e) result[e] = sums[r * kPitch + offset + e] + bias[e];
    }
    activate(result, p.activation);
    if (p.residual) {
      float more[8];
      load8(p.residual, token * p.residual_stride + feature, p.residual_type, count, more);
      BK_UNROLL
      for (int e = 0; e < 8; ++e) result[e] = add_rn(result[e], more[e]);
    }
    store8(p.y, token * p.y_stride + feature, p.y_type, count, result);
  }
}

template <class T, int TOKENS, int FEATURES>
cudaError_t start(const BlockSparse& p, cudaStream_t stream) {
  using Tile = TileOf<TOKENS, FEATURES>;
  const dim3 grid((p.n + FEATURES - 1) / FEATURES, (p.tokens + TOKENS - 1) / TOKENS);
  return BK_LAUNCH((multiply<T, Tile>), grid, dim3(Tile::kThreads), Tile::kStages * Tile::kStageBytes, stream, p);
}

template <class T, int FEATURES>
cudaError_t with_tokens(const BlockSparse& p, cudaStream_t stream, int tile_tokens) {
  if (!tile_tokens) {
    // Large tiles read a weight a quarter as often, once they fill a GPU of 128 multiprocessors.
    const int64_t large = static_cast<int64_t>((p.tokens + 127) / 128) * ((p.n + FEATURES - 1) / FEATURES);
    tile_tokens = large >= 128 || p.tokens > 32 * 65535 ? 128 : 32;
  }
  return tile_tokens == 128 ? start<T, 128, FEATURES>(p, stream) : start<T, 32, FEATURES>(p, stream);
}

template <class T>
cudaError_t with_features(const BlockSparse& p, cudaStream_t stream, int tile_tokens) {
  if (p.block_rows == 32) return with_tokens<T, 32>(p, stream, tile_tokens);
  if (p.block_rows == 64) return with_tokens<T, 64>(p, stream, tile_tokens);
  return with_tokens<T, 128>(p, stream, tile_tokens);
}

}  // namespace

cudaError_t launch_block_sparse(const BlockSparse& p, cudaStream_t stream, int tile_tokens) {
  if (!block_sparse_supported(p.block_rows, p.block_columns) || p.tokens > 128 * 65535) return cudaErrorInvalidValue;
  if (p.tokens <= 0 || p.n <= 0) return cudaSuccess;
  if (p.operand == Operand::f16) return with_features<__half>(p, stream, tile_tokens);
  if (p.operand == Operand::bf16) return with_features<__nv_bfloat16>(p, stream, tile_tokens);
  return with_features<int8_t>(p, stream, tile_tokens);
}

}  // namespace bertkern::cuda
