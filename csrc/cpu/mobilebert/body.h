// affine_row, written once and compiled once per ISA.
#include "cpu/mobilebert/affine.h"
#include "cpu/simd.h"

namespace bertkern::cpu {
namespace {

void affine(const float* x, int64_t n, const float* gamma, const float* beta, float* out) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) vstore(out + i, vfma(vload(x + i), vload(gamma + i), vload(beta + i)));
  if (i < n) vstore_n(out + i, vfma(vload_n(x + i, n - i), vload_n(gamma + i, n - i), vload_n(beta + i, n - i)), n - i);
}

}  // namespace
}  // namespace bertkern::cpu

#define BERTKERN_DEFINE_AFFINE(isa)     \
  namespace bertkern::cpu {             \
  extern const AffineFn affine_##isa;   \
  const AffineFn affine_##isa = affine; \
  }
