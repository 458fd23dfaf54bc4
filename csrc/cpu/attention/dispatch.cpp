#include "cpu/attention/attention.h"

namespace bertkern::cpu {

#define BERTKERN_ATTENTION(score, value, name, isa) extern const AttentionFn attention_##name##_##isa;
#include "cpu/attention/kernels.inc"
#undef BERTKERN_ATTENTION

AttentionFn attention_kernel(WeightKind operand, Dtype dtype) {
  AttentionFn best = nullptr;
  const Isa active = active_isa();
#define BERTKERN_ATTENTION(score, value, name, isa)                \
  if (WeightKind::value == operand && Isa::isa <= active &&        \
      (WeightKind::score != WeightKind::s8 || dtype == Dtype::s8)) \
    best = attention_##name##_##isa;
#include "cpu/attention/kernels.inc"
#undef BERTKERN_ATTENTION
  return best;
}

}  // namespace bertkern::cpu
