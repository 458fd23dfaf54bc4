// What the operators that pack int8 operands share.
#pragma once

#include <cmath>

#include "cpu/check.h"
#include "cpu/gemm/linear.h"

namespace bertkern::ops {

inline void check_input(const char* op, double input_scale, int64_t input_zero_point) {
  require(std::isfinite(input_scale) && input_scale >= 0.0, op, ": expected input_scale >= 0 (0: per token). Got ",
          input_scale, ".");
  require(input_zero_point >= 0 && input_zero_point <= 255, op, ": expected input_zero_point in [0, 255]. Got ",
          input_zero_point, ".");
  require(input_scale > 0.0 || input_zero_point == 0 || input_zero_point == cpu::kSignedZero, op,
          ": expected input_zero_point = 0, or 128 for symmetric ranges, beside input_scale = 0 (per token). Got ",
          input_zero_point, ".");
}

// LinearHeader::input_zero. 0 says signed codes of a static scale, but ranges with a zero point per row.
inline int32_t input_zero_of(double input_scale, int64_t input_zero_point) {
  if (input_zero_point != 0) return static_cast<int32_t>(input_zero_point);
  return input_scale > 0.0 ? cpu::kSignedZero : cpu::kOwnZero;
}

}  // namespace bertkern::ops
