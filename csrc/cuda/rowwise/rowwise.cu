// One row is held in the registers of kWarps warps, 8 neighbours at a time: element 8 (kThreads i + thread) + e is
// value e of part i. Every value is read once and written once.
#include "cuda/rowwise/rowwise.h"

#include "cuda/ptx.h"

namespace bertkern::cuda {

namespace {

constexpr int kEach = 8;  // neighbours

// Parts of a row in a thread: what the registers of so many threads hold.
constexpr int kMany = 16;  // warps for rows that are too wide for one
constexpr int parts_of(int warps) { return warps > 1 ? 2 : 4; }
constexpr int widest(int warps) { return 32 * warps * kEach * parts_of(warps); }

template <class T>
struct TypeOf;
template <>
struct TypeOf<float> {
  static constexpr Type value = Type::f32;
};
template <>
struct TypeOf<__half> {
  static constexpr Type value = Type::f16;
};
template <>
struct TypeOf<__nv_bfloat16> {
  static constexpr Type value = Type::bf16;
};

struct alignas(16) Bytes16 {
  uint32_t word[4];
};
struct alignas(8) Bytes8 {
  uint32_t word[2];
};

BK_DEVICE float value_of(float x) { return x; }
BK_DEVICE float value_of(__half x) { return to_float(x); }
BK_DEVICE float value_of(__nv_bfloat16 x) { return to_float(x); }
BK_DEVICE float value_of(int8_t x) { return static_cast<float>(x); }

// 8 neighbours at once.
BK_DEVICE void load8(const float* from, float (&x)[kEach]) {
  const Bytes16 low = *reinterpret_cast<const Bytes16*>(from), high = *reinterpret_cast<const Bytes16*>(from + 4);
  BK_UNROLL
  for (int e = 0; e < 4; ++e) x[e] = float_of(low.word[e]), x[4 + e] = float_of(high.word[e]);
}
template <class T>
BK_DEVICE void load8(const T* from, float (&x)[kEach]) {
  static_assert(sizeof(T) == 2, "fp16 or bf16");
  const Bytes16 all = *reinterpret_cast<const Bytes16*>(from);
  BK_UNROLL
  for (int e = 0; e < kEach; ++e) x[e] = to_float(unpack2<T>(all.word[e / 2], e % 2));
}
BK_DEVICE void load8(const int8_t* from, float (&x)[kEach]) {
  const Bytes8 all = *reinterpret_cast<const Bytes8*>(from);
  BK_UNROLL
  for (int e = 0; e < kEach; ++e) x[e] = static_cast<float>(static_cast<int8_t>(all.word[e / 4] >> 8 * (e % 4)));
}

BK_DEVICE void store8(float* to, const float (&x)[kEach]) {
  Bytes16 low, high;
  BK_UNROLL
  for (int e = 0; e < 4; ++e) low.word[e] = bits_of(x[e]), high.word[e] = bits_of(x[4 + e]);
  *reinterpret_cast<Bytes16*>(to) = low;
  *reinterpret_cast<Bytes16*>(to + 4) = high;
}
template <class T>
BK_DEVICE void store8(T* to, const float (&x)[kEach]) {
  Bytes16 all;
  BK_UNROLL
  for (int e = 0; e < 4; ++e) all.word[e] = pack2<T>(x[2 * e], x[2 * e + 1]);
  *reinterpret_cast<Bytes16*>(to) = all;
}

// A row in the registers of its threads.
template <int kWarps>
struct Row {
  static constexpr int kThreads = 32 * kWarps, kParts = parts_of(kWarps);
  float x[kParts][kEach];
  int thread, width;

  BK_DEVICE int at(int part) const { return kEach * (kThreads * part + thread); }

  // f(x, value read there), in place; values past the width are left alone.
  template <class T, class F>
  BK_DEVICE void read_as(const T* row, bool whole, F f) {
    float y[kParts][kEach];
    BK_UNROLL
    for (int i = 0; i < kParts; ++i) {
      if (whole) {
        if (at(i) < width) load8(row + at(i), y[i]);
      } else {
        BK_UNROLL
        for (int e = 0; e < kEach; ++e)
          if (at(i) + e < width) y[i][e] = value_of(row[at(i) + e]);
      }
    }
    BK_UNROLL
    for (int i = 0; i < kParts; ++i) {
      BK_UNROLL
      for (int e = 0; e < kEach; ++e)
        if (at(i) + e < width) x[i][e] = f(x[i][e], y[i][e]);
    }
  }

  // The branch stands outside the loops: all reads of a row are under way before the first is waited for.
  template <bool kCodes = false, class F>
  BK_DEVICE void read(const Rows& rows, int64_t row, F f) {
    const int64_t first = row * rows.pitch;
    if (rows.type == Type::bf16) return read_as(static_cast<const __nv_bfloat16*>(rows.data) + first, rows.whole, f);
    if (rows.type == Type::f16) return read_as(static_cast<const __half*>(rows.data) + first, rows.whole, f);
    if (kCodes && rows.type == Type::s8) return read_as(static_cast<const int8_t*>(rows.data) + first, rows.whole, f);
    read_as(static_cast<const float*>(rows.data) + first, rows.whole, f);
  }

  // Stores the row, and keeps what was stored.
  template <class T>
  BK_DEVICE void write_as(T* row, bool whole) {
    BK_UNROLL
    for (int i = 0; i < kParts; ++i) {
      if (whole) {
        if (at(i) < width) store8(row + at(i), x[i]);
      } else {
        BK_UNROLL
        for (int e = 0; e < kEach; ++e)
          if (at(i) + e < width) row[at(i) + e] = from_float<T>(x[i][e]);
      }
      BK_UNROLL
      for (int e = 0; e < kEach; ++e) x[i][e] = to_float(from_float<T>(x[i][e]));
    }
  }
  BK_DEVICE void write(const Rows& rows, int64_t row) {
    const int64_t first = row * rows.pitch;
    if (rows.type == Type::bf16) return write_as(static_cast<__nv_bfloat16*>(rows.data) + first, rows.whole);
    if (rows.type == Type::f16) return write_as(static_cast<__half*>(rows.data) + first, rows.whole);
    write_as(static_cast<float*>(rows.data) + first, rows.whole);
  }

  BK_DEVICE void clear() {
    BK_UNROLL
    for (int i = 0; i < kParts; ++i) {
      BK_UNROLL
      for (int e = 0; e < kEach; ++e) x[i][e] = 0.0f;
    }
  }

  // f(running, value) over this thread's values of the row.
  template <class F>
  BK_DEVICE void each(F f) {
    BK_UNROLL
    for (int i = 0; i < kParts; ++i) {
      BK_UNROLL
      for (int e = 0; e < kEach; ++e)
        if (at(i) + e < width) f(x[i][e]);
    }
  }
};

// Over all threads of a row, in one order; `partial` is shared and used for one reduction alone.
template <int kWarps, bool kSum>
BK_DEVICE float reduce(float v, float* partial) {
  v = kSum ? warp_sum(v) : warp_max(v);
  if (kWarps == 1) return v;
  if (lane_id() == 0) partial[warp_id()] = v;
  block_sync();
  v = partial[0];
  BK_UNROLL
  for (int w = 1; w < kWarps; ++w) v = kSum ? v + partial[w] : (v < partial[w] ? partial[w] : v);
  return v;
}

template <int kWarps>
BK_DEVICE void layer_norm(Row<kWarps>& row, const Rows& gamma, const Rows& beta, float eps, float (*partial)[kWarps]) {
  float sum = 0.0f;
  row.each([&](float x) { sum += x; });
  const float width = static_cast<float>(row.width);
  const float mean = div_rn(reduce<kWarps, true>(sum, partial[0]), width);
  float square = 0.0f;
  row.each([&](float& x) {
    x -= mean;
    square += x * x;
  });
  const float variance = div_rn(reduce<kWarps, true>(square, partial[1]), width);
  const float scale = div_rn(1.0f, sqrt_rn(variance + eps));
  row.read(gamma, 0, [&](float x, float g) { return x * scale * g; });
  row.read(beta, 0, [](float x, float b) { return x + b; });
}

// Codes [low, high] around zero.
template <int kWarps>
BK_DEVICE void store_codes(Row<kWarps>& row, const Codes& out, int64_t number, float (*partial)[kWarps]) {
  float low = 0.0f, high = 0.0f;
  row.each([&](float x) {
    const bool finite = x - x == 0.0f;
    high = finite ? (x > high ? x : high) : float_of(0x7f800000u);
    low = x < low ? x : low;
  });
  high = reduce<kWarps, false>(high, partial[2]);
  low = -reduce<kWarps, false>(-low, partial[3]);
  const bool finite = high < float_of(0x7f800000u);
  float scale = out.step;
  if (out.grid == Grid::own) scale = add_rn(mul_rn(high, 1.0f / 255.0f), -mul_rn(low, 1.0f / 255.0f));
  if (out.grid == Grid::symmetric) scale = mul_rn(high > -low ? high : -low, 1.0f / 127.0f);
  if (scale < 1.17549435e-38f) scale = 1.0f;  // zeros, or a range below the normal numbers
  const float inverse = div_rn(1.0f, scale);
  const bool symmetric = out.grid == Grid::symmetric || (out.grid == Grid::fixed && out.symmetric_codes);
  int32_t zero = symmetric ? 0 : out.zero_point;
  if (out.grid == Grid::own) {
    const int32_t steps = finite ? round_to_int(mul_rn(-low, inverse)) : 128;
    zero = (steps < 255 ? steps : 255) - 128;
  }
  if (row.thread == 0) {
    out.scale[number] = finite ? scale : float_of(0x7fc00000u);
    if (out.zero) out.zero[number] = zero;
  }
  const int32_t least = symmetric ? -127 : -128 - zero, most = 127 - zero;  // before the zero point is added
  const uint32_t flip = out.codes.type == Type::u8 ? 0x80808080u : 0;
  uint8_t* to = static_cast<uint8_t*>(out.codes.data) + number * out.codes.pitch;
  BK_UNROLL
  for (int i = 0; i < Row<kWarps>::kParts; ++i) {
    Bytes8 all = {{0, 0}};
    BK_UNROLL
    for (int e = 0; e < kEach; ++e) {
      int32_t code = finite ? round_to_int(mul_rn(row.x[i][e], inverse)) : 0;
      code = (code < least ? least : code > most ? most : code) + zero;
      all.word[e / 4] |= (static_cast<uint32_t>(code) & 255) << 8 * (e % 4);
    }
    BK_UNROLL
    for (int w = 0; w < 2; ++w) all.word[w] ^= flip;
    if (out.codes.whole) {
      if (row.at(i) < row.width) *reinterpret_cast<Bytes8*>(to + row.at(i)) = all;
    } else {
      BK_UNROLL
      for (int e = 0; e < kEach; ++e)
        if (row.at(i) + e < row.width) to[row.at(i) + e] = static_cast<uint8_t>(all.word[e / 4] >> 8 * (e % 4));
    }
  }
}

// Which row this thread works on; a row of one warp has neighbours in its block.
template <int kWarps>
BK_DEVICE int64_t row_number() {
  if (kWarps > 1) return block_x();
  return static_cast<int64_t>(block_x()) * (block_threads() / 32) + warp_id();
}

// What stands for a row that is not there.
template <int kWarps>
BK_DEVICE void store_nothing(Row<kWarps>& row, const RowParams& p, int64_t number) {
  if (p.y.data) row.write(p.y, number);
  if (p.out.grid == Grid::none) return;
  uint8_t* to = static_cast<uint8_t*>(p.out.codes.data) + number * p.out.codes.pitch;
  const uint8_t code = p.out.codes.type == Type::u8 ? 128 : 0;
  for (int i = row.thread; i < p.width; i += Row<kWarps>::kThreads) to[i] = code;
  if (row.thread) return;
  p.out.scale[number] = 1.0f;
  if (p.out.zero) p.out.zero[number] = 0;
}

template <int kWarps, bool kNormalize>
BK_KERNEL((kWarps == 1 ? 128 : 32 * kWarps), (kWarps == 1 ? 2 : 1))
void row_kernel(const RowParams p) {
  BK_SHARED(float, partial, [4][kWarps]);
  const int64_t number = row_number<kWarps>();
  if (number >= p.rows) return;
  Row<kWarps> row;
  row.thread = kWarps == 1 ? lane_id() : thread_x();
  row.width = p.width;
  row.clear();
  if (p.live && number >= *p.live) return store_nothing(row, p, number);
  row.read(p.x, number, [](float, float x) { return x; });
  if (kNormalize) {
    if (p.residual.data) row.read(p.residual, number, [](float x, float r) { return x + r; });
    layer_norm(row, p.gamma, p.beta, p.eps, partial);
    row.write(p.y, number);
  }
  if (!kNormalize || p.out.grid != Grid::none) store_codes(row, p.out, number, partial);
}

// Adds a row of codes of few bits, a little-endian stream behind the row's scale and zero point (fp32, unaligned).
template <int kWarps>
BK_DEVICE void add_bits(Row<kWarps>& row, const uint8_t* data, int bits, float step) {
  uint32_t word[2] = {};
  BK_UNROLL
  for (int i = 0; i < 8; ++i) word[i / 4] |= static_cast<uint32_t>(data[i]) << 8 * (i % 4);
  const float scale = float_of(word[0]) * step, zero = float_of(word[1]);
  const int bytes = (row.width * bits + 7) / 8;
  BK_UNROLL
  for (int i = 0; i < Row<kWarps>::kParts; ++i) {
    // 8 codes are `bits` whole bytes.
    const int first = row.at(i) / 8 * bits;
    uint64_t stream = 0;
    for (int b = 0; b < bits; ++b)
      if (row.at(i) < row.width && first + b < bytes) stream |= static_cast<uint64_t>(data[8 + first + b]) << 8 * b;
    BK_UNROLL
    for (int e = 0; e < kEach; ++e) {
      const float code = static_cast<float>(static_cast<uint32_t>(stream >> bits * e) & ((1u << bits) - 1));
      if (row.at(i) + e < row.width) row.x[i][e] += (code - zero) * scale;
    }
  }
}

template <int kWarps>
BK_KERNEL((kWarps == 1 ? 128 : 32 * kWarps), (kWarps == 1 ? 2 : 1))
void embed_kernel(const EmbedParams p) {
  BK_SHARED(float, partial, [4][kWarps]);
  const int64_t number = row_number<kWarps>();
  if (number >= p.rows) return;
  Row<kWarps> row;
  row.thread = kWarps == 1 ? lane_id() : thread_x();
  row.width = p.width;
  row.clear();
  float fine = 0.0f;
  for (int t = 0; t < p.tables; ++t) {
    const Table& table = p.table[t];
    int64_t id = table.ids[number];
    if (id < 0 || id >= table.count) id = 0, fine = float_of(0x7fc00000u);
    if (!table.count) continue;
    const float scale = table.scale[table.scale_per_row ? id : 0];
    if (table.bits)
      add_bits(row, static_cast<const uint8_t*>(table.rows.data) + id * table.rows.pitch, table.bits, scale);
    else
      row.template read<true>(table.rows, id, [&](float x, float y) { return fma_rn(y, scale, x); });
  }
  row.each([&](float& x) { x += fine; });
  layer_norm(row, p.gamma, p.beta, p.eps, partial);
  row.write(p.y, number);
  if (p.out.grid != Grid::none) store_codes(row, p.out, number, partial);
}

int64_t size_of(Type type) { return type == Type::f32 ? 4 : type <= Type::f16 ? 2 : 1; }

void find_whole(Rows& rows, int64_t width) {
  const int64_t bytes = size_of(rows.type), unit = bytes == 1 ? 8 : 16;
  rows.whole =
      width % kEach == 0 && reinterpret_cast<uintptr_t>(rows.data) % unit == 0 && rows.pitch * bytes % unit == 0;
}

// Rows that one warp holds: as many blocks as there can be while cards have idle processors, then fewer and larger
// ones.
int rows_of_block(int64_t rows) { return rows <= 1024 ? 1 : 4; }

static_assert(kWidestRow == widest(kMany), "what the launchers have a kernel for");

template <bool kNormalize>
cudaError_t launch_rows(RowParams p, cudaStream_t stream) {
  if (p.rows <= 0) return cudaSuccess;
  if (p.width <= 0 || p.width > kWidestRow) return cudaErrorInvalidValue;
  for (Rows* rows : {&p.x, &p.residual, &p.gamma, &p.beta, &p.y, &p.out.codes}) find_whole(*rows, p.width);
  const unsigned rows = static_cast<unsigned>(p.rows);
  if (p.width > widest(1)) return BK_LAUNCH(row_kernel<kMany, kNormalize>, dim3(rows), dim3(32 * kMany), 0, stream, p);
  const unsigned each = static_cast<unsigned>(rows_of_block(p.rows));
  return BK_LAUNCH(row_kernel<1, kNormalize>, dim3((rows + each - 1) / each), dim3(32 * each), 0, stream, p);
}

}  // namespace

cudaError_t launch_quantize(const RowParams& p, cudaStream_t stream) { return launch_rows<false>(p, stream); }

cudaError_t launch_normalize(const RowParams& p, cudaStream_t stream) { return launch_rows<true>(p, stream); }

cudaError_t launch_embed(const EmbedParams& params, cudaStream_t stream) {
  EmbedParams p = params;
  if (p.rows <= 0) return cudaSuccess;
  if (p.width <= 0 || p.width > kWidestRow || p.tables < 0 || p.tables > kTables) return cudaErrorInvalidValue;
  for (int t = 0; t < p.tables; ++t) find_whole(p.table[t].rows, p.width);
  for (Rows* rows : {&p.gamma, &p.beta, &p.y, &p.out.codes}) find_whole(*rows, p.width);
  const unsigned rows = static_cast<unsigned>(p.rows);
  if (p.width > widest(1)) return BK_LAUNCH(embed_kernel<kMany>, dim3(rows), dim3(32 * kMany), 0, stream, p);
  const unsigned each = static_cast<unsigned>(rows_of_block(p.rows));
  return BK_LAUNCH(embed_kernel<1>, dim3((rows + each - 1) / each), dim3(32 * each), 0, stream, p);
}

}  // namespace bertkern::cuda
