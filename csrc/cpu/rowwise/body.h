// The row kernels, written once and compiled once per ISA. rowwise.h states what each computes.
#include "cpu/rowwise/codes.h"
#include "cpu/rowwise/rowwise.h"
#include "cpu/rowwise/spread.h"
#include "cpu/simd.h"

namespace bertkern::cpu {
namespace {

#if defined(__AVX512F__)
#include "cpu/rowwise/gelu_table.inc"

// x Phi(x) = max(x, 0) - a Phi(-a) with a = |x|: the tail is smooth and the same on both sides. 32 cubics in registers,
// absolute error below 4e-7 (NaN stays NaN: max returns its second operand).
struct GeluTable {
  vf low[4], high[4];
  explicit GeluTable(const float (&table)[4][32]) {
    for (int i = 0; i < 4; ++i) low[i] = vload(table[i]), high[i] = vload(table[i] + 16);
  }
  vf operator()(vf x) const {
    const vf u = vmin(vset(31.999998f), vmul(vabs(x), vset(32.0f / 5.25f)));
    const vi index = _mm512_cvttps_epi32(u);
    const vf t = vsub(u, to_float(index));
    vf p = _mm512_permutex2var_ps(low[3], index, high[3]);
    p = vfma(p, t, _mm512_permutex2var_ps(low[2], index, high[2]));
    p = vfma(p, t, _mm512_permutex2var_ps(low[1], index, high[1]));
    p = vfma(p, t, _mm512_permutex2var_ps(low[0], index, high[0]));
    return vsub(vmax(vset(0.0f), x), p);
  }
};
struct Gelu : GeluTable {
  Gelu() : GeluTable(kGeluTail) {}
};
struct GeluTanh : GeluTable {
  GeluTanh() : GeluTable(kGeluTanhTail) {}
};
#else
// x Phi(x) with erf of Abramowitz and Stegun 7.1.26: absolute error of Phi below 1e-7.
struct Gelu {
  vf operator()(vf x) const {
    const vf z = vmul(vabs(x), vset(0.70710678118654752f));
    const vf t = vdiv(vset(1.0f), vfma(vset(0.3275911f), z, vset(1.0f)));
    vf p = vset(1.061405429f);
    p = vfma(p, t, vset(-1.453152027f));
    p = vfma(p, t, vset(1.421413741f));
    p = vfma(p, t, vset(-0.284496736f));
    p = vfma(p, t, vset(0.254829592f));
    const vf tail = vmul(vmul(p, t), vexp(vsub(vset(0.0f), vmul(z, z))));  // 1 - erf(z)
    return vsub(vmax(vset(0.0f), x), vmul(vmul(vset(0.5f), vabs(x)), tail));
  }
};
// x / (1 + exp(-2 sqrt(2/pi) (x + 0.044715 x^3)))
struct GeluTanh {
  vf operator()(vf x) const {
    const vf inner =
        vmul(x, vfma(vmul(x, x), vset(-2.0f * 0.79788456080286536f * 0.044715f), vset(-2.0f * 0.79788456080286536f)));
    return vdiv(x, vadd(vset(1.0f), vexp(inner)));
  }
};
#endif

struct Identity {
  vf operator()(vf x) const { return x; }
};
struct Relu {
  vf operator()(vf x) const { return vmax(vset(0.0f), x); }
};
struct Tanh {  // sign(x) (1 - e) / (1 + e), e = exp(-2|x|); small |x| by the odd series where that cancels
  vf operator()(vf x) const {
    const vf a = vabs(x);
    const vf e = vexp(vmul(vset(-2.0f), a));
    const vf big = vdiv(vsub(vset(1.0f), e), vadd(vset(1.0f), e));
    const vf s = vmul(x, x);
    vf p = vfma(s, vset(0.0218694885f), vset(-0.0539682540f));
    p = vfma(p, s, vset(0.1333333333f));
    p = vfma(p, s, vset(-0.3333333333f));
    const vf small = vfma(vmul(p, s), x, x);
    const vf negative = vsub(vset(0.0f), big);
    return select_lt(a, vset(0.25f), small, select_lt(x, vset(0.0f), negative, vadd(big, vsub(x, x))));
  }
};
struct Silu {
  vf operator()(vf x) const { return vdiv(x, vadd(vset(1.0f), vexp(vsub(vset(0.0f), x)))); }
};

BK_INLINE vf load_lanes(const void* x, Dtype dtype, int64_t i, int64_t n) {
  switch (dtype) {
    case Dtype::bf16:
      return vload_bf16_n(static_cast<const uint16_t*>(x) + i, n);
    case Dtype::f16:
      return vload_f16_n(static_cast<const uint16_t*>(x) + i, n);
    case Dtype::s8:
      return vload_s8_n(static_cast<const int8_t*>(x) + i, n);
    default:
      return n == kWidth ? vload(static_cast<const float*>(x) + i) : vload_n(static_cast<const float*>(x) + i, n);
  }
}

BK_INLINE void store_lanes(void* out, Dtype dtype, int64_t i, vf x, int64_t n) {
  switch (dtype) {
    case Dtype::bf16:
      return vstore_bf16_n(static_cast<uint16_t*>(out) + i, x, n);
    case Dtype::f16:
      return vstore_f16_n(static_cast<uint16_t*>(out) + i, x, n);
    default:
      if (n == kWidth) return vstore(static_cast<float*>(out) + i, x);
      return vstore_n(static_cast<float*>(out) + i, x, n);
  }
}

BK_INLINE int64_t lanes_left(int64_t n, int64_t i) { return n - i < kWidth ? n - i : kWidth; }

void load_row(const void* x, Dtype dtype, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += kWidth) {
    const int64_t m = lanes_left(n, i);
    vstore_n(out + i, load_lanes(x, dtype, i, m), m);
  }
}

void store_row(const float* x, int64_t n, Dtype dtype, void* out) {
  for (int64_t i = 0; i < n; i += kWidth) {
    const int64_t m = lanes_left(n, i);
    store_lanes(out, dtype, i, vload_n(x + i, m), m);
  }
}

void add_scaled_row(const void* x, Dtype dtype, int64_t n, float scale, float* acc) {
  for (int64_t i = 0; i < n; i += kWidth) {
    const int64_t m = lanes_left(n, i);
    vstore_n(acc + i, vfma(load_lanes(x, dtype, i, m), vset(scale), vload_n(acc + i, m)), m);
  }
}

float quantize_row(const float* x, int64_t n, float step, int32_t zero_point, uint8_t* out) {
  // As integers, the bits of |x| are ordered like the values, Inf and NaN on top: one max finds both.
  const vi magnitude = vseti(0x7fffffff);
  vi top = vseti(0);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) top = vmaxi(top, vandi(as_int(vload(x + i)), magnitude));
  if (i < n) top = vmaxi(top, vandi(as_int(vload_n(x + i, n - i)), magnitude));
  const uint32_t bits = static_cast<uint32_t>(vmaxi_lane(top));
  if (bits >= 0x7f800000u) {
    for (int64_t j = 0; j < n; ++j) out[j] = static_cast<uint8_t>(zero_point);
    return bits_to_float(0x7fc00000u);
  }
  const float absmax = bits_to_float(bits);
  float scale = step;
  if (scale <= 0.0f) scale = absmax * (1.0f / 127.0f);
  if (scale < 1.17549435e-38f) scale = 1.0f;  // zeros, or a range below the normal numbers
  const vf inverse = vset(1.0f / scale);
  const vf low = vset(zero_point == 128 ? -127.0f : static_cast<float>(-zero_point));
  const vf high = vset(static_cast<float>(zero_point == 128 ? 127 : 255 - zero_point));
  const vf zero = vset(static_cast<float>(zero_point));
  for (i = 0; i < n; i += kWidth) {
    const int64_t m = lanes_left(n, i);
    const vf q = vmin(vmax(vround(vmul(load_lanes(x, Dtype::f32, i, m), inverse)), low), high);
    vstore_u8_n(out + i, round_to_int(vadd(q, zero)), m);
  }
  return scale;
}

// The ends of a row, and the largest |x| as an integer; several at once, as one chain of minima would wait for itself.
struct Ends {
  vi top;
  vf least, most;
  Ends() : top(vseti(0)), least(vset(0.0f)), most(vset(0.0f)) {}
  void see(vf y) {
    top = vmaxi(top, vandi(as_int(y), vseti(0x7fffffff)));
    least = vmin(y, least), most = vmax(y, most);
  }
  void see(const Ends& other) {
    top = vmaxi(top, other.top);
    least = vmin(other.least, least), most = vmax(other.most, most);
  }
};

float quantize_range(const float* x, int64_t n, uint8_t* out, int32_t* zero_point) {
  constexpr int kChains = 4;
  Ends ends[kChains];
  int64_t i = 0;
  for (; i + kChains * kWidth <= n; i += kChains * kWidth) {
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) ends[c].see(vload(x + i + c * kWidth));
  }
  for (; i < n; i += kWidth) ends[0].see(load_lanes(x, Dtype::f32, i, lanes_left(n, i)));
#pragma GCC unroll 4
  for (int c = 1; c < kChains; ++c) ends[0].see(ends[c]);
  if (static_cast<uint32_t>(vmaxi_lane(ends[0].top)) >= 0x7f800000u) {
    for (int64_t j = 0; j < n; ++j) out[j] = 128;
    *zero_point = 128;
    return bits_to_float(0x7fc00000u);
  }
  const float lo = -vmax_lane(vsub(vset(0.0f), ends[0].least)), hi = vmax_lane(ends[0].most);
  float scale = hi * (1.0f / 255.0f) - lo * (1.0f / 255.0f);
  if (scale < 1.17549435e-38f) scale = 1.0f;  // zeros, or a range below the normal numbers
  const vf inverse = vset(1.0f / scale);
  float lanes[kWidth];
  vstore(lanes, vmin(vround(vmul(vset(-lo), inverse)), vset(255.0f)));
  const vi zero = vseti(static_cast<int32_t>(lanes[0])), first = vseti(0), last = vseti(255);
  const auto codes = [&](vf y) { return vmini(vmaxi(vaddi(round_to_int(vmul(y, inverse)), zero), first), last); };
  i = 0;
#if defined(__AVX512BW__)
  // The same of four vectors: packing saturates as codes() does.
  const vi zeros16 = _mm512_set1_epi16(static_cast<int16_t>(lanes[0]));
  const vi in_order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  for (; i + 4 * kWidth <= n; i += 4 * kWidth) {
    const auto rounded = [&](int64_t v) { return round_to_int(vmul(vload(x + i + v * kWidth), inverse)); };
    const vi low = _mm512_adds_epi16(_mm512_packs_epi32(rounded(0), rounded(1)), zeros16);
    const vi high = _mm512_adds_epi16(_mm512_packs_epi32(rounded(2), rounded(3)), zeros16);
    _mm512_storeu_si512(out + i, _mm512_permutexvar_epi32(in_order, _mm512_packus_epi16(low, high)));
  }
#endif
  for (; i + kWidth <= n; i += kWidth) vstore_u8_n(out + i, codes(vload(x + i)), kWidth);
  if (i < n) vstore_u8_n(out + i, codes(vload_n(x + i, n - i)), n - i);
  *zero_point = static_cast<int32_t>(lanes[0]);
  return scale;
}

void flip_row(const uint8_t* codes, int64_t n, uint8_t mask, uint8_t* out) {
#pragma GCC ivdep  // in place, or apart
  for (int64_t i = 0; i < n; ++i) out[i] = codes[i] ^ mask;
}

BK_INLINE int32_t sum_of_codes(const uint8_t* codes, int64_t n) {
  int64_t i = 0;
  int32_t sum = 0;
#if defined(__AVX512F__)
  __m512i eights = _mm512_setzero_si512();
  for (; i < n; i += 64) {
    const __mmask64 mask = n - i < 64 ? (uint64_t{1} << (n - i)) - 1 : ~uint64_t{0};
    eights =
        _mm512_add_epi64(eights, _mm512_sad_epu8(_mm512_maskz_loadu_epi8(mask, codes + i), _mm512_setzero_si512()));
  }
  return static_cast<int32_t>(_mm512_reduce_add_epi64(eights));
#elif defined(__AVX2__)
  __m256i eights = _mm256_setzero_si256();
  for (; i + 32 <= n; i += 32) {
    const __m256i some = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i));
    eights = _mm256_add_epi64(eights, _mm256_sad_epu8(some, _mm256_setzero_si256()));
  }
  int64_t lanes[4];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), eights);
  sum = static_cast<int32_t>(lanes[0] + lanes[1] + lanes[2] + lanes[3]);
#endif
  for (; i < n; ++i) sum += codes[i];
  return sum;
}

void sum_codes(const uint8_t* codes, int64_t n, int64_t group, int32_t zero, float* sums, int64_t pitch) {
  for (int64_t i = 0; i < n; i += group, sums += pitch) {
    const int64_t length = n - i < group ? n - i : group;
    *sums = static_cast<float>(sum_of_codes(codes + i, length) - zero * static_cast<int32_t>(length));
  }
}

// The sum of `of` each vector and how many of its lanes count, in several chains: one would wait for itself.
template <class Of>
BK_INLINE float sum_of(const float* x, int64_t n, Of&& of) {
  constexpr int kChains = 4;
  vf sum[kChains] = {vset(0.0f), vset(0.0f), vset(0.0f), vset(0.0f)};
  int64_t i = 0;
  for (; i + kChains * kWidth <= n; i += kChains * kWidth) {
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) of(sum[c], vload(x + i + c * kWidth));
  }
  for (; i + kWidth <= n; i += kWidth) of(sum[0], vload(x + i));
  float total = 0.0f;
  if (i < n) {  // lanes past the end would count, too
    float lanes[kWidth];
    vf last = vset(0.0f);
    of(last, vload_n(x + i, n - i));
    vstore(lanes, last);
    total = vsum(vload_n(lanes, n - i));
  }
  return total + vsum(vadd(vadd(sum[0], sum[1]), vadd(sum[2], sum[3])));
}

void layer_norm_row(const float* x, int64_t n, const float* gamma, const float* beta, float eps, float* out) {
  const float mean = sum_of(x, n, [](vf& sum, vf y) { sum = vadd(sum, y); }) / static_cast<float>(n);
  const float square = sum_of(x, n, [middle = vset(mean)](vf& sum, vf y) {
    const vf d = vsub(y, middle);
    sum = vfma(d, d, sum);
  });
  const vf denominator = vset(square / static_cast<float>(n) + eps);
  float root[kWidth];
#if defined(__AVX512F__)
  vstore(root, _mm512_sqrt_ps(denominator));
#elif defined(__AVX2__)
  vstore(root, _mm256_sqrt_ps(denominator));
#else
  vstore(root, denominator);
  root[0] = __builtin_sqrtf(root[0]);
#endif
  const vf scale = vset(1.0f / root[0]), middle = vset(mean);
  const auto norm = [&](vf y, vf g, vf b) { return vfma(vmul(vsub(y, middle), scale), g, b); };
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) vstore(out + i, norm(vload(x + i), vload(gamma + i), vload(beta + i)));
  if (i < n) {
    const int64_t m = n - i;
    vstore_n(out + i, norm(vload_n(x + i, m), vload_n(gamma + i, m), vload_n(beta + i, m)), m);
  }
}

template <class Act>
BK_INLINE void epilogue_with(const float* tile, int mr, int64_t columns, const Epilogue& e) {
  const Act act;
  // Most tiles, with nothing to decide inside the loop.
  if (columns == kPanel && e.output_scale <= 0.0f && !e.residual && e.dtype == Dtype::f32) {
    for (int r = 0; r < mr; ++r) {
      float* out = static_cast<float*>(e.out) + r * e.out_pitch;
#pragma GCC unroll 8
      for (int64_t j = 0; j < kPanel; j += kWidth) vstore(out + j, act(vload(tile + r * kPanel + j)));
    }
    return;
  }
  const vf output_step = vset(e.output_scale);
  const vf output_inverse = vset(e.output_scale > 0.0f ? 1.0f / e.output_scale : 0.0f);
  const int64_t bytes = dtype_size(e.dtype);
  for (int r = 0; r < mr; ++r) {
    const float* c = tile + r * kPanel;
    char* out = static_cast<char*>(e.out) + r * e.out_pitch * bytes;
    for (int64_t j = 0; j < columns; j += kWidth) {
      const int64_t m = lanes_left(columns, j);
      vf y = vload(c + j);
      if (e.output_scale > 0.0f) {
        const vf q = vround(vmul(y, output_inverse));
        y = vmul(vmin(vset(127.0f), vmax(vset(-127.0f), q)), output_step);  // the second operand survives a NaN
      }
      y = act(y);
      if (e.residual) y = vadd(y, load_lanes(e.residual + r * e.residual_pitch, Dtype::f32, j, m));
      if (bytes == 1)
        store_codes(reinterpret_cast<uint8_t*>(out) + j, y, code_grid(e.code_step, e.code_zero, e.dtype == Dtype::s8),
                    m);
      else
        store_lanes(out, e.dtype, j, y, m);
    }
  }
}

void epilogue(const float* tile, int mr, int64_t columns, const Epilogue& e) {
  switch (e.activation) {
    case Activation::gelu:
      return epilogue_with<Gelu>(tile, mr, columns, e);
    case Activation::gelu_tanh:
      return epilogue_with<GeluTanh>(tile, mr, columns, e);
    case Activation::relu:
      return epilogue_with<Relu>(tile, mr, columns, e);
    case Activation::tanh:
      return epilogue_with<Tanh>(tile, mr, columns, e);
    case Activation::silu:
      return epilogue_with<Silu>(tile, mr, columns, e);
    default:
      return epilogue_with<Identity>(tile, mr, columns, e);
  }
}

constexpr RowKernels make_row_kernels() {
  return {load_row,       store_row, quantize_row, quantize_range, flip_row, sum_codes, layer_norm_row,
          add_scaled_row, epilogue,  kHoles,       spread,         collect,  transpose};
}

}  // namespace
}  // namespace bertkern::cpu

#define BERTKERN_DEFINE_ROWS(isa)                   \
  namespace bertkern::cpu {                         \
  extern const RowKernels rows_##isa;               \
  const RowKernels rows_##isa = make_row_kernels(); \
  }
