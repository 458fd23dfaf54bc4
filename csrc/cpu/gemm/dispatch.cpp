#include "cpu/gemm/gemm.h"

namespace bertkern::cpu {

#define BERTKERN_TILE(kind, isa, max_mr) extern const TileKernels tiles_##kind##_##isa;
#define BERTKERN_MATRIX_TILE(kind, isa) extern const MatrixKernels matrix_##kind##_##isa;
#include "cpu/gemm/kernels.inc"
#undef BERTKERN_MATRIX_TILE
#undef BERTKERN_TILE

namespace {

template <class Kernels>
struct Row {
  WeightKind kind;
  Isa isa;
  const Kernels* kernels;
};

const Row<TileKernels> kRows[] = {
#define BERTKERN_TILE(kind, isa, max_mr) {WeightKind::kind, Isa::isa, &tiles_##kind##_##isa},
#define BERTKERN_MATRIX_TILE(kind, isa)
#include "cpu/gemm/kernels.inc"
#undef BERTKERN_MATRIX_TILE
#undef BERTKERN_TILE
};

const Row<MatrixKernels> kUnits[] = {
    {WeightKind::f32, Isa::portable, nullptr},  // no processor multiplies matrices of these
#define BERTKERN_TILE(kind, isa, max_mr)
#define BERTKERN_MATRIX_TILE(kind, isa) {WeightKind::kind, Isa::isa, &matrix_##kind##_##isa},
#include "cpu/gemm/kernels.inc"
#undef BERTKERN_MATRIX_TILE
#undef BERTKERN_TILE
};

// The last row of the kind not above `active`, null where there is none.
template <class Kernels, int kCount>
const Kernels* best(const Row<Kernels> (&rows)[kCount], WeightKind kind, Isa active) {
  const Kernels* found = nullptr;
  for (const Row<Kernels>& row : rows)
    if (row.kind == kind && row.isa <= active) found = row.kernels;
  return found;
}

}  // namespace

const TileKernels* tile_kernels(WeightKind kind, Isa isa) {
  for (const Row<TileKernels>& row : kRows)
    if (row.kind == kind && row.isa == isa) return row.kernels;
  return nullptr;
}

const TileKernels& tile_kernels(WeightKind kind) { return *best(kRows, kind, active_isa()); }

const MatrixKernels* matrix_kernels(WeightKind kind) { return best(kUnits, kind, active_isa()); }

}  // namespace bertkern::cpu
