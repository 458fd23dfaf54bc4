#include "cpu/isa.h"
#include "cpu/mobilebert/affine.h"

namespace bertkern::cpu {

#define BERTKERN_AFFINE(isa) extern const AffineFn affine_##isa;
#include "cpu/mobilebert/kernels.inc"
#undef BERTKERN_AFFINE

AffineFn affine_row() {
  AffineFn best = nullptr;
  const Isa active = active_isa();
#define BERTKERN_AFFINE(isa) \
  if (Isa::isa <= active) best = affine_##isa;
#include "cpu/mobilebert/kernels.inc"
#undef BERTKERN_AFFINE
  return best;
}

}  // namespace bertkern::cpu
