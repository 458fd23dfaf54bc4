// What the linear layers of the sparse and the low-bit kernels do to a sum before they store it: bias, activation,
// residual, rounding; eight neighbours of a row at a time, so that rows that begin at multiples of 16 bytes are read
// and written 16 bytes at a time.
#pragma once

#include "cuda/activation.h"
#include "cuda/types.h"

namespace bertkern::cuda {

BK_DEVICE int clamp(int x, int low, int high) { return x < low ? low : x > high ? high : x; }

BK_DEVICE bool aligned16(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; }

BK_DEVICE float load_float(const void* p, int64_t i, Type type) {
  if (type == Type::f32) return static_cast<const float*>(p)[i];
  if (type == Type::f16) return to_float(static_cast<const __half*>(p)[i]);
  return to_float(static_cast<const __nv_bfloat16*>(p)[i]);
}

BK_DEVICE void store_float(void* p, int64_t i, Type type, float x) {
  if (type == Type::f32)
    static_cast<float*>(p)[i] = x;
  else if (type == Type::f16)
    static_cast<__half*>(p)[i] = from_float<__half>(x);
  else
    static_cast<__nv_bfloat16*>(p)[i] = from_float<__nv_bfloat16>(x);
}

// Elements i .. i + count - 1 (count from 1 to 8) of p; zeros behind.
BK_DEVICE void load8(const void* p, int64_t i, Type type, int count, float (&x)[8]) {
  const char* at = static_cast<const char*>(p) + i * (type == Type::f32 ? 4 : 2);
  if (count == 8 && aligned16(at)) {
    const uint4 low = *reinterpret_cast<const uint4*>(at);
    if (type == Type::f32) {
      const uint4 high = *reinterpret_cast<const uint4*>(at + 16);
      const uint32_t bits[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
      BK_UNROLL
      for (int e = 0; e < 8; ++e) x[e] = float_of(bits[e]);
      return;
    }
    const uint32_t pairs[4] = {low.x, low.y, low.z, low.w};
    BK_UNROLL
    for (int e = 0; e < 8; ++e)
      x[e] = type == Type::f16 ? to_float(unpack2<__half>(pairs[e / 2], e % 2))
                               : to_float(unpack2<__nv_bfloat16>(pairs[e / 2], e % 2));
    return;
  }
  BK_UNROLL
  for (int e = 0; e < 8; ++e) x[e] = e < count ? load_float(p, i + e, type) : 0.0f;
}

BK_DEVICE void store8(void* p, int64_t i, Type type, int count, const float (&x)[8]) {
  char* at = static_cast<char*>(p) + i * (type == Type::f32 ? 4 : 2);
  if (count == 8 && aligned16(at)) {
    uint4 low, high;
    if (type == Type::f32) {
      low = {bits_of(x[0]), bits_of(x[1]), bits_of(x[2]), bits_of(x[3])};
      high = {bits_of(x[4]), bits_of(x[5]), bits_of(x[6]), bits_of(x[7])};
      *reinterpret_cast<uint4*>(at + 16) = high;
    } else if (type == Type::f16) {
      low = {pack2<__half>(x[0], x[1]), pack2<__half>(x[2], x[3]), pack2<__half>(x[4], x[5]),
             pack2<__half>(x[6], x[7])};
    } else {
      low = {round_bf16x2(x[0], x[1]), round_bf16x2(x[2], x[3]), round_bf16x2(x[4], x[5]), round_bf16x2(x[6], x[7])};
    }
    *reinterpret_cast<uint4*>(at) = low;
    return;
  }
  BK_UNROLL
  for (int e = 0; e < 8; ++e)
    if (e < count) store_float(p, i + e, type, x[e]);
}

}  // namespace bertkern::cuda
