#include "cpu/gemm/gemm.h"

namespace bertkern::cpu {

#define BERTKERN_TILE(kind, isa, max_mr) extern const TileKernels tiles_##kind##_##isa;
#include "cpu/gemm/kernels.inc"
#undef BERTKERN_TILE

namespace {
struct Row {
  WeightKind kind;
  Isa isa;
  const TileKernels* kernels;
};
const Row kRows[] = {
#define BERTKERN_TILE(kind, isa, max_mr) {WeightKind::kind, Isa::isa, &tiles_##kind##_##isa},
#include "cpu/gemm/kernels.inc"
#undef BERTKERN_TILE
};
}  // namespace

const TileKernels* tile_kernels(WeightKind kind, Isa isa) {
  for (const Row& row : kRows)
    if (row.kind == kind && row.isa == isa) return row.kernels;
  return nullptr;
}

const TileKernels& tile_kernels(WeightKind kind) {
  const TileKernels* best = nullptr;
  for (const Row& row : kRows)
    if (row.kind == kind && row.isa <= active_isa()) best = row.kernels;
  return *best;
}

}  // namespace bertkern::cpu
