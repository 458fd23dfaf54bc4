#include "cuda/gemm/gemm.h"

#include <type_traits>

namespace bertkern::cuda {
namespace {

template <Code kType>
struct Product {
  using Sum = int32_t;
};
template <>
struct Product<Code::e4m3> {
  using Sum = float;
};

template <Code kType>
BK_DEVICE void multiply(typename Product<kType>::Sum (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (kType == Code::s8)
    mma_m16n8k32_s8(c, a, b);
  else if constexpr (kType == Code::u8)
    mma_m16n8k32_u8s8(c, a, b);
  else
    mma_m16n8k32_e4m3(c, a, b);
}

// Whether the target multiplies float8 by mma.sync itself: sm_90 and 100 would turn it into fp16, in too many
// registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 890 && __CUDA_ARCH__ < 1200
constexpr bool kFloat8 = false;
#else
constexpr bool kFloat8 = true;
#endif

// A block of kWarpsM x kWarpsN x KW warps, each WM x WN outputs.
template <Code kType_, int WM_, int WN_, int kWarpsM_, int kWarpsN_, int KW_, int kSlice_, int kStages_>
struct Tile {
  static constexpr Code kType = kType_;
  using Sum = typename Product<kType>::Sum;
  static constexpr int WM = WM_, WN = WN_, KW = KW_, kWarpsM = kWarpsM_, kWarpsN = kWarpsN_;
  static constexpr int kSlice = kSlice_, kStages = kStages_;
  static constexpr int BM = WM * kWarpsM, BN = WN * kWarpsN, kWarps = kWarpsM * kWarpsN * KW, kThreads = 32 * kWarps;
  static constexpr int kStep = KW * kSlice;  // bytes of K
  static constexpr int kStageBytes = (BM + BN) * kStep;
  // Sums on their way out: 16 rows of every warp. 8 more columns than outputs: pairs of 4 rows go to different banks.
  static constexpr int kRows = 16 * kWarpsM, kPitch = BN + 8;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static_assert(KW * kRows * kPitch * 4 <= kSharedBytes, "the sums take the place of the stages");
  static_assert(kSlice == 64 || kSlice == 128, "the swizzle is one of these");
};

// Where 16 bytes of an operand with kCount rows lie in a stage. Adding 8 rows adds 8 kSlice.
template <class T, int kCount>
BK_DEVICE int place_of(int slice, int row, int chunk) {
  const int other = T::kSlice == 128 ? row : row ^ (slice & 1);
  return (slice * kCount + other) * T::kSlice + (T::kSlice == 128 ? chunk ^ (row & 7) : chunk ^ (row >> 1 & 3)) * 16;
}

// One thread's share of an operand's rows in every step: a column of 16 bytes, each kStride-th row.
template <class T, int kCount>
struct Fetch {
  static constexpr int kChunks = T::kStep / 16, kStride = T::kThreads / kChunks, kEach = kCount / kStride;
  static_assert(T::kThreads % kChunks == 0 && kStride % 8 == 0 && kCount % kStride == 0, "the same column in all rows");
  const char* from;
  int64_t pitch;  // of kStride rows
  int left;       // rows from this thread's first one on
  int chunk, place;

  BK_DEVICE Fetch(const void* data, int64_t row_bytes, int64_t first, int64_t end) {
    const int row = thread_x() / kChunks;
    chunk = thread_x() % kChunks;
    const int64_t there = end - first - row;
    left = static_cast<int>(there < kCount ? there : kCount);
    from = static_cast<const char*>(data) + (left > 0 ? (first + row) * row_bytes : 0) + chunk * 16;
    pitch = row_bytes * kStride;
    constexpr int kInSlice = T::kSlice / 16;
    place = place_of<T, kCount>(chunk / kInSlice, row, chunk % kInSlice);
  }

  // The next step's, of which `chunks` x 16 bytes of K are left.
  BK_DEVICE void operator()(char* stage, int chunks) {
    const bool inside = chunk < chunks;
    BK_UNROLL
    for (int i = 0; i < kEach; ++i)
      cp_async16(stage + place + i * kStride * T::kSlice, from + (i * kStride < left ? i * pitch : 0),
                 inside && i * kStride < left);
    from += inside ? T::kStep : 0;
  }
};

// Where a warp reads its operands in a stage: lane's row and half of the 32 bytes, see ldmatrix in ptx.h.
template <class T>
struct Fragments {
  static constexpr int kM = T::WM / 16, kN = T::WN / 8;
  int a_row, b_row, a_half, b_half, slice;

  BK_DEVICE Fragments(int warp_m, int warp_n, int slice_) : slice(slice_) {
    const int lane = lane_id();
    a_row = warp_m * T::WM + (lane & 15), a_half = lane >> 4;
    b_row = warp_n * T::WN + (lane >> 4) * 8 + (lane & 7), b_half = lane >> 3 & 1;
  }

  BK_DEVICE void read_a(const char* stage, int step, uint32_t (&a)[kM][4]) const {
    const char* rows = stage + place_of<T, T::BM>(slice, a_row, 2 * step + a_half);
    BK_UNROLL
    for (int i = 0; i < kM; ++i) ldmatrix_x4(a[i], rows + i * 16 * T::kSlice);
  }
  BK_DEVICE void read_b(const char* stage, int step, uint32_t (&b)[kN][2]) const {
    const char* rows = stage + T::BM * T::kStep + place_of<T, T::BN>(slice, b_row, 2 * step + b_half);
    BK_UNROLL
    for (int i = 0; i < kN / 2; ++i) {
      uint32_t pair[4];
      ldmatrix_x4(pair, rows + i * 16 * T::kSlice);
      b[2 * i][0] = pair[0], b[2 * i][1] = pair[1];
      b[2 * i + 1][0] = pair[2], b[2 * i + 1][1] = pair[3];
    }
  }
};

template <class Sum>
struct alignas(8) Pair {
  Sum v[2];
};
template <class Sum>
struct alignas(16) Four {
  Sum v[4];
};
struct alignas(8) Halves {
  uint32_t v[2];
};

// 4 neighbours from `at` on, of which `count` are there.
template <class V>
BK_DEVICE void load4(float (&x)[4], const V* data, int count) {
  BK_UNROLL
  for (int i = 0; i < 4; ++i) x[i] = i < count ? static_cast<float>(to_float(data[i])) : 0.0f;
}
BK_DEVICE void load_residual(float (&x)[4], const Rows& rows, int64_t at, int count) {
  if (rows.type == Type::f32) {
    const float* data = static_cast<const float*>(rows.data) + at;
    if (!rows.whole) return load4(x, data, count);
    const Four<float> all = *reinterpret_cast<const Four<float>*>(data);
    BK_UNROLL
    for (int i = 0; i < 4; ++i) x[i] = all.v[i];
    return;
  }
  const bool half = rows.type == Type::f16;
  if (!rows.whole) {
    if (half) return load4(x, static_cast<const __half*>(rows.data) + at, count);
    return load4(x, static_cast<const __nv_bfloat16*>(rows.data) + at, count);
  }
  const Halves all = *reinterpret_cast<const Halves*>(static_cast<const char*>(rows.data) + 2 * at);
  BK_UNROLL
  for (int i = 0; i < 4; ++i)
    x[i] =
        half ? to_float(unpack2<__half>(all.v[i / 2], i % 2)) : to_float(unpack2<__nv_bfloat16>(all.v[i / 2], i % 2));
}

template <class V>
BK_DEVICE void store_halves(const float (&y)[4], V* data, bool whole, int count) {
  if (whole) {
    *reinterpret_cast<Halves*>(data) = {{pack2<V>(y[0], y[1]), pack2<V>(y[2], y[3])}};
    return;
  }
  BK_UNROLL
  for (int i = 0; i < 4; ++i)
    if (i < count) data[i] = from_float<V>(y[i]);
}

BK_DEVICE void store_codes(const float (&y)[4], const GemmParams& p, int64_t at, int count) {
  const bool is_signed = p.y.type == Type::s8;
  // Without a zero point signed codes lie around it.
  const float zero = static_cast<float>(p.out_zero), low = !is_signed ? 0.0f : p.out_zero ? -128.0f : -127.0f;
  const float high = is_signed ? 127.0f : 255.0f, inverse = div_rn(1.0f, p.out_step);
  uint32_t all = 0;
  BK_UNROLL
  for (int i = 0; i < 4; ++i) {
    float q = add_rn(rintf(mul_rn(y[i], inverse)), zero);
    q = q > low ? q : low;
    q = q < high ? q : high;
    all |= (static_cast<uint32_t>(static_cast<int32_t>(q)) & 255) << 8 * i;
  }
  uint8_t* data = static_cast<uint8_t*>(p.y.data) + at;
  if (p.y.whole) {
    *reinterpret_cast<uint32_t*>(data) = all;
    return;
  }
  BK_UNROLL
  for (int i = 0; i < 4; ++i)
    if (i < count) data[i] = static_cast<uint8_t>(all >> 8 * i);
}

BK_DEVICE bool finite(float x) { return x - x == 0.0f; }

// From the sums of 4 neighbours to y. `whole` rows have a multiple of 4 columns.
template <class Sum>
BK_DEVICE void finish(const GemmParams& p, int64_t row, int column, const Sum (&sum)[4]) {
  const int count = p.n - column < 4 ? p.n - column : 4;
  const float scale = p.scale[row * p.scale_step];
  const int32_t zero = p.zero ? p.zero[row * p.zero_step] : 0;
  float y[4];
  BK_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int at = column + (i < count ? i : 0);
    Sum c = sum[i];
    if constexpr (std::is_same_v<Sum, int32_t>) {
      // Wrapping: the difference fits, its parts need not.
      if (p.zero) c = static_cast<int32_t>(static_cast<uint32_t>(c) - static_cast<uint32_t>(zero) * p.weight_sums[at]);
    }
    y[i] = mul_rn(static_cast<float>(c), mul_rn(scale, p.weight_scale[at * p.weight_step]));
    if (p.bias) y[i] = add_rn(y[i], p.bias[at]);
  }
  if (p.output_step > 0.0f) {
    const float inverse = div_rn(1.0f, p.output_step);
    BK_UNROLL
    for (int i = 0; i < 4; ++i) {
      float q = rintf(mul_rn(y[i], inverse));
      q = q < -127.0f ? -127.0f : q > 127.0f ? 127.0f : q;  // a NaN stays one
      y[i] = mul_rn(q, p.output_step);
    }
  }
  activate(y, p.activation);
  if (p.residual.data) {
    float r[4];
    load_residual(r, p.residual, row * p.residual.pitch + column, count);
    BK_UNROLL
    for (int i = 0; i < 4; ++i) y[i] = add_rn(y[i], r[i]);
  }
  const int64_t at = row * p.y.pitch + column;
  if (p.y.type == Type::bf16) return store_halves(y, static_cast<__nv_bfloat16*>(p.y.data) + at, p.y.whole, count);
  if (p.y.type == Type::f16) return store_halves(y, static_cast<__half*>(p.y.data) + at, p.y.whole, count);
  if (p.y.type != Type::f32) {
    // A code cannot say NaN: the row's step does.
    if (column == 0) p.steps[row] = finite(scale) ? p.out_step : float_of(0x7fc00000u);
    return store_codes(y, p, at, count);
  }
  float* out = static_cast<float*>(p.y.data) + at;
  if (p.y.whole) {
    *reinterpret_cast<Four<float>*>(out) = {{y[0], y[1], y[2], y[3]}};
    return;
  }
  BK_UNROLL
  for (int i = 0; i < 4; ++i)
    if (i < count) out[i] = y[i];
}

template <class T>
BK_DEVICE void gemm(const GemmParams& p) {
  using Sum = typename T::Sum;
  constexpr int kM = Fragments<T>::kM, kN = Fragments<T>::kN;
  const int64_t rows = p.live && *p.live < p.m ? *p.live : p.m;
  const int tiles = static_cast<int>((p.m + T::BM - 1) / T::BM);
  const int64_t top = static_cast<int64_t>(block_x() % tiles) * T::BM;
  const int left = block_x() / tiles * T::BN;
  if (top >= rows) return;
  char* const shared = dynamic_shared();
  const int warp = warp_id(), slice = warp / (T::kWarpsM * T::kWarpsN);
  const int warp_m = warp % T::kWarpsM, warp_n = warp / T::kWarpsM % T::kWarpsN;

  Fetch<T, T::BM> fetch_a(p.a, p.a_pitch, top, rows);
  Fetch<T, T::BN> fetch_b(p.weight, p.weight_pitch, left, p.n);
  int chunks = (p.k + 15) / 16;  // of 16 bytes, that are not fetched yet
  const auto fetch = [&](int stage) {
    char* const to = shared + stage * T::kStageBytes;
    if (chunks > 0) {
      fetch_a(to, chunks);
      fetch_b(to + T::BM * T::kStep, chunks);
      chunks -= T::kStep / 16;
    }
    cp_async_commit();  // an empty group too: the wait counts them
  };
  BK_UNROLL
  for (int s = 0; s + 1 < T::kStages; ++s) fetch(s);

  Sum sum[kM][kN][4];
  BK_UNROLL
  for (int i = 0; i < kM; ++i) {
    BK_UNROLL
    for (int j = 0; j < kN; ++j) {
      BK_UNROLL
      for (int e = 0; e < 4; ++e) sum[i][j][e] = 0;
    }
  }
  const Fragments<T> read(warp_m, warp_n, slice);
  const int steps = (p.k + T::kStep - 1) / T::kStep;
  int now = 0, next = T::kStages - 1;
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<T::kStages - 2>();
    block_sync();  // all have the copies of all, and none reads the stage that is filled next
    fetch(next);
    const char* const stage = shared + now * T::kStageBytes;
    uint32_t a[2][kM][4], b[2][kN][2];
    read.read_a(stage, 0, a[0]);
    read.read_b(stage, 0, b[0]);
    BK_UNROLL
    for (int s = 0; s < T::kSlice / 32; ++s) {
      if (s + 1 < T::kSlice / 32) {
        read.read_a(stage, s + 1, a[(s + 1) % 2]);
        read.read_b(stage, s + 1, b[(s + 1) % 2]);
      }
      BK_UNROLL
      for (int i = 0; i < kM; ++i) {
        BK_UNROLL
        for (int j = 0; j < kN; ++j) multiply<T::kType>(sum[i][j], a[s % 2][i], b[s % 2][j]);
      }
    }
    now = now + 1 == T::kStages ? 0 : now + 1;
    next = next + 1 == T::kStages ? 0 : next + 1;
  }
  cp_async_wait<0>();

  Sum* const out = reinterpret_cast<Sum*>(shared);
  BK_UNROLL
  for (int i = 0; i < kM; ++i) {
    block_sync();  // the stages, or the rows before, have been read
    Sum* const place =
        out + (slice * T::kRows + warp_m * 16 + lane_id() / 4) * T::kPitch + warp_n * T::WN + lane_id() % 4 * 2;
    BK_UNROLL
    for (int j = 0; j < kN; ++j) {
      BK_UNROLL
      for (int h = 0; h < 2; ++h)
        *reinterpret_cast<Pair<Sum>*>(place + h * 8 * T::kPitch + j * 8) = {{sum[i][j][2 * h], sum[i][j][2 * h + 1]}};
    }
    block_sync();
    for (int unit = thread_x(); unit < T::kRows * T::BN / 4; unit += T::kThreads) {
      const int r = unit / (T::BN / 4), c = unit % (T::BN / 4) * 4;
      const int64_t row = top + r / 16 * T::WM + i * 16 + r % 16;
      if (row >= rows || left + c >= p.n) continue;
      Four<Sum> all = *reinterpret_cast<const Four<Sum>*>(out + r * T::kPitch + c);
      BK_UNROLL
      for (int k = 1; k < T::KW; ++k) {
        const Four<Sum> more = *reinterpret_cast<const Four<Sum>*>(out + (k * T::kRows + r) * T::kPitch + c);
        BK_UNROLL
        for (int e = 0; e < 4; ++e) all.v[e] += more.v[e];
      }
      finish<Sum>(p, row, left + c, all.v);
    }
  }
}

template <class T>
BK_KERNEL(T::kThreads, 2)
void gemm_kernel(const GemmParams p) {
  if constexpr (T::kType != Code::e4m3 || kFloat8)
    gemm<T>(p);
  else
    trap();  // the operator asks for the device first
}

template <Code kType>
struct Tiles {
  using Large = Tile<kType, 64, 64, 2, 2, 1, 64, 3>;
  using Middle = Tile<kType, 32, 32, 2, 2, 1, 128, 3>;
  using Slices = Tile<kType, 32, 32, 1, 1, 4, 64, 3>;
  using Few = Tile<kType, 16, 16, 1, 1, 8, 64, 3>;
  using Rows = Tile<kType, 16, 16, 1, 4, 1, 128, 4>;
};

template <class T>
cudaError_t launch_tile(const GemmParams& p, cudaStream_t stream) {
  const int64_t blocks = (p.m + T::BM - 1) / T::BM * ((p.n + T::BN - 1) / T::BN);
  if (blocks > 0x7fffffff) return cudaErrorInvalidValue;
  return BK_LAUNCH(gemm_kernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(T::kThreads), T::kSharedBytes, stream, p);
}

// The largest tile that leaves no multiprocessor idle, else the smallest that its rows fill.
GemmTile choose(const GemmParams& p) {
  const auto blocks = [&](int64_t rows, int64_t columns) {
    return (p.m + rows - 1) / rows * ((p.n + columns - 1) / columns);
  };
  const bool slices = p.code != Code::e4m3;
  if (p.m <= 16) return slices ? GemmTile::few : GemmTile::rows;
  if (p.m > 64 && blocks(128, 128) >= p.processors) return GemmTile::large;
  if (p.m > 32 && blocks(64, 64) >= p.processors) return GemmTile::middle;
  return slices ? GemmTile::slices : blocks(64, 64) * 2 >= p.processors ? GemmTile::middle : GemmTile::rows;
}

template <Code kType>
cudaError_t launch_type(const GemmParams& p, cudaStream_t stream) {
  using All = Tiles<kType>;
  const GemmTile tile = p.tile == GemmTile::automatic ? choose(p) : p.tile;
  if (tile == GemmTile::large) return launch_tile<typename All::Large>(p, stream);
  if (tile == GemmTile::middle) return launch_tile<typename All::Middle>(p, stream);
  if constexpr (kType == Code::e4m3) {
    if (tile == GemmTile::rows) return launch_tile<typename All::Rows>(p, stream);
  } else {
    if (tile == GemmTile::slices) return launch_tile<typename All::Slices>(p, stream);
    if (tile == GemmTile::few) return launch_tile<typename All::Few>(p, stream);
  }
  return cudaErrorInvalidValue;
}

int64_t size_of(Type type) { return type == Type::f32 ? 4 : type <= Type::f16 ? 2 : 1; }

// Whether 4 neighbours may be read and written at once.
void find_whole(Rows& rows, int64_t width) {
  const int64_t bytes = 4 * size_of(rows.type);
  rows.whole = width % 4 == 0 && rows.pitch % 4 == 0 && reinterpret_cast<uintptr_t>(rows.data) % bytes == 0;
}

}  // namespace

cudaError_t launch_gemm(const GemmParams& params, cudaStream_t stream) {
  GemmParams p = params;
  if (p.m <= 0 || p.n <= 0) return cudaSuccess;
  const auto aligned = [](const void* data, int64_t pitch) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && pitch % 16 == 0;
  };
  const bool rows = p.k == 0 || (aligned(p.a, p.a_pitch) && aligned(p.weight, p.weight_pitch));
  const bool fits = p.k >= 0 && rows && p.a_pitch >= p.k && p.weight_pitch >= p.k &&
                    (p.code != Code::e4m3 || !p.zero) && (!p.zero || p.weight_sums) &&
                    (p.y.type <= Type::f16 || (p.steps && p.out_step > 0.0f));
  if (!fits) return cudaErrorInvalidValue;
  find_whole(p.y, p.n);
  find_whole(p.residual, p.n);
  if (p.code == Code::s8) return launch_type<Code::s8>(p, stream);
  if (p.code == Code::u8) return launch_type<Code::u8>(p, stream);
  return launch_type<Code::e4m3>(p, stream);
}

}  // namespace bertkern::cuda
