#include "cpu/rowwise/rowwise.h"

namespace bertkern::cpu {

#define BERTKERN_ROWS(isa) extern const RowKernels rows_##isa;
#include "cpu/rowwise/kernels.inc"
#undef BERTKERN_ROWS

const RowKernels& row_kernels() {
  const RowKernels* best = nullptr;
  const Isa active = active_isa();
#define BERTKERN_ROWS(isa) \
  if (Isa::isa <= active) best = &rows_##isa;
#include "cpu/rowwise/kernels.inc"
#undef BERTKERN_ROWS
  return *best;
}

}  // namespace bertkern::cpu
