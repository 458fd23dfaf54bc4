// Codes of a fixed step from vectors of floats, for files compiled for one ISA.
#pragma once

#include "cpu/simd.h"

namespace bertkern::cpu {
namespace {

struct CodeGrid {
  vf inverse, zero, low, high;
};

// Signed codes lie around 0, in [-127, 127]; unsigned ones in [0, 255].
BK_INLINE CodeGrid code_grid(float step, int32_t zero, bool is_signed) {
  return {vset(1.0f / step), vset(static_cast<float>(zero)), vset(is_signed ? -127.0f : 0.0f),
          vset(is_signed ? 127.0f : 255.0f)};
}

// The first n lanes; NaN gives the lowest code.
BK_INLINE void store_codes(uint8_t* out, vf y, const CodeGrid& grid, int64_t n) {
  const vf q = vadd(vround(vmul(y, grid.inverse)), grid.zero);
  vstore_u8_n(out, vandi(round_to_int(vmin(vmax(q, grid.low), grid.high)), vseti(255)), n);
}

}  // namespace
}  // namespace bertkern::cpu
