// The left operand of a product: rows in groups, converted and packed for the tiles that will take them.
#include <algorithm>
#include <cstring>

#include "cpu/gemm/linear.h"
#include "cpu/scratch.h"

namespace bertkern::cpu {

namespace {

constexpr int64_t kLeastRows = 6;   // of a group that is one of several for a reason: fewer leave the dot products idle
constexpr int64_t kSplitRows = 6;   // measured: fewer rows wait for memory in any case
constexpr int64_t kVectorRows = 4;  // measured: so few are no work for a matrix unit
constexpr int64_t kListRows = 16;   // nor are so few where lists must be turned for it first

// Whether rows bring a scale and a zero point of their own.
bool own_ranges(const Linear& linear) {
  return linear.kind == WeightKind::s8 && linear.input_scale <= 0.0f && linear.input_zero == kOwnZero;
}

// Of the operand, in dwords of K.
int64_t planes_of(const Linear& linear) {
  const TileKernels& tiles = tile_kernels(linear.kind);
  if (in_lists(linear)) return 1;
  return tiles.planes + (tiles.ordered > 0 && linear.layout == Layout::grouped);
}

// Whether the rows go to a matrix unit: by the layer alone, where its sums depend on it, and elsewhere where it is
// faster.
bool for_matrix_unit(const Linear& linear, int64_t rows) {
  const MatrixKernels* const kernels = matrix_kernels(linear.kind);
  if (!kernels || scaled_along_k(linear) || linear.layout == Layout::tokens) return false;
  if (linear.layout == Layout::panels) return kernels->sparse_tile && !linear.ordered && rows > kListRows;
  return linear.kind != WeightKind::s8 || rows > (linear.layout == Layout::grouped ? kNarrowRows : kVectorRows);
}

int64_t group_pitch(const Linear& linear) {
  return linear.layout == Layout::tokens ? kGroupPitch : tile_kernels(linear.kind).pitch;
}
// A tile that takes more than half of a group has it for itself.
int64_t group_rows(const Linear& linear) {
  const TileKernels& tiles = tile_kernels(linear.kind);
  const int max_mr = scaled_along_k(linear) ? 2 * tiles.group_mr : tiles.max_mr;
  return 2 * max_mr > group_pitch(linear) && linear.layout != Layout::tokens ? max_mr : group_pitch(linear);
}

// Two groups at least: while one passes over a panel, the other fetches the next (see gemm).
int64_t group_count(const Linear& linear, int64_t rows, int64_t multiple) {
  if (for_matrix_unit(linear, rows)) {
    const int64_t tiles = (rows + 15) / 16, groups = (rows + kMatrixRows - 1) / kMatrixRows;
    const int64_t rounded = (groups + multiple - 1) / multiple * multiple;
    return rounded <= tiles ? rounded : groups;
  }
  int64_t groups = (rows + group_rows(linear) - 1) / group_rows(linear);
  if (linear.layout == Layout::tokens) return groups;  // an idle lane costs as much as a busy one
  if (groups == 1 && rows >= kSplitRows) groups = 2;
  const auto round_up = [&](int64_t count) { return (count + multiple - 1) / multiple * multiple; };
  const int64_t rounded = round_up(groups), whole = round_up((rows + group_pitch(linear) - 1) / group_pitch(linear));
  // As many tiles in half as many groups, each transposed at once.
  if (whole > 1 && 2 * whole == rounded) return whole;
  return rounded * kLeastRows <= rows ? rounded : groups;
}

thread_local Scratch staging, unspread;

// Whether the operands of both list the same dwords and sums.
bool same_groups(const Linear& a, const Linear& b) {
  if (a.along_k != b.along_k) return false;
  if (!a.along_k) return true;
  if (a.groups != b.groups || a.kd != b.kd) return false;
  for (int64_t g = 0; g < a.groups; ++g)
    if (a.group[g].first != b.group[g].first || a.group[g].length != b.group[g].length) return false;
  return true;
}

Rows shape_of_rows(const Linear& linear, int64_t rows, int64_t multiple) {
  Rows shape{};
  shape.rows = rows, shape.groups = group_count(linear, rows, multiple), shape.kd = linear.kd;
  shape.planes = planes_of(linear), shape.matrix = for_matrix_unit(linear, rows);
  shape.lists = linear.layout == Layout::panels;
  shape.pitch = shape.matrix ? kMatrixRows : group_pitch(linear);
  return shape;
}

int64_t operand_dwords(const Rows& shape) { return shape.groups * shape.group_dwords() + 64; }

}  // namespace

bool same_operand(const Linear& a, const Linear& b) {
  const bool sums = sums_of_rows(a);
  if (sums != sums_of_rows(b) || (sums && !same_groups(a, b))) return false;
  const bool unit = for_matrix_unit(a, kMatrixRows);
  if (unit != for_matrix_unit(b, kMatrixRows)) return false;
  if (unit && (a.layout == Layout::panels) != (b.layout == Layout::panels)) return false;
  if (planes_of(a) != planes_of(b)) return false;
  return a.kind == b.kind && a.k == b.k && a.input_scale == b.input_scale && a.input_zero == b.input_zero &&
         (a.layout == Layout::tokens) == (b.layout == Layout::tokens);
}

int64_t rows_dwords(const Linear& linear, int64_t rows, int64_t multiple) {
  const int64_t sums = sums_of_rows(linear) ? linear.groups * rows : 0;
  return operand_dwords(shape_of_rows(linear, rows, multiple)) + (own_ranges(linear) ? rows : 0) + sums + 16;
}

Rows make_rows(const Linear& linear, int64_t rows, uint32_t* data, float* scale, int64_t multiple) {
  Rows made = shape_of_rows(linear, rows, multiple);
  uint32_t* const after = data + operand_dwords(made);
  if (rows == made.groups && linear.layout != Layout::tokens && !made.matrix) made.pitch = 1;
  made.data = data, made.scale = scale, made.zero = linear.input_zero;
  made.zeros = own_ranges(linear) ? reinterpret_cast<int32_t*>(after) : nullptr;
  made.sum = sums_of_rows(linear) ? reinterpret_cast<float*>(after + (made.zeros ? rows : 0)) : nullptr;
  return made;
}

namespace {

// Rows in pieces of kMatrixDwords, [KD / 16][kMatrixRows][16].
template <class Convert>
void pack_matrix_rows(const Rows& rows, int64_t group, Convert&& convert) {
  const int64_t r0 = rows.begin(group), r1 = rows.begin(group + 1);
  const int64_t padded = (rows.kd + kMatrixDwords - 1) / kMatrixDwords * kMatrixDwords;
  uint32_t* const row = staging.get<uint32_t>(padded + 16);
  uint32_t* out = rows.group_data(group);
  for (int64_t r = r0; r < r1; ++r, out += kMatrixDwords) {
    convert(r, row);
    std::memset(row + rows.kd, 0, static_cast<size_t>(padded - rows.kd) * 4);
    for (int64_t d = 0; d < padded; d += kMatrixDwords) std::memcpy(out + d * kMatrixRows, row + d, kMatrixDwords * 4);
  }
}

// Calls convert(row, dwords) for each row of the group, then interleaves the rows.
template <class Convert>
void pack_rows(const Rows& rows, int64_t group, Convert&& convert) {
  if (rows.matrix && !rows.lists) return pack_matrix_rows(rows, group, convert);
  const int64_t r0 = rows.begin(group), mr = rows.begin(group + 1) - r0, kd = rows.kd;
  uint32_t* out = rows.group_data(group);
  const int64_t pitch = (kd * rows.planes + 15) / 16 * 16;
  uint32_t* stage = staging.get<uint32_t>(pitch * (rows.pitch + 1));
  uint32_t* narrow = stage + pitch * rows.pitch;
  const auto row = [&](int64_t r, uint32_t* to) {
    if (rows.planes == 1) return convert(r, to);
    convert(r, narrow);
    for (int64_t d = 0; d < kd; ++d) {
      to[2 * d] = narrow[d] & 0x00ff00ffu;
      to[2 * d + 1] = narrow[d] >> 8 & 0x00ff00ffu;
    }
    if (rows.planes == 3) std::memcpy(to + 2 * kd, narrow, static_cast<size_t>(kd) * 4);
  };
  if (rows.pitch == 1) return row(r0, out);
  for (int64_t r = 0; r < mr; ++r) row(r0 + r, stage + r * pitch);
  row_kernels().transpose(reinterpret_cast<float*>(stage), pitch, rows.pitch, kd * rows.planes,
                          reinterpret_cast<float*>(out), rows.pitch);
}

// Sums of a row's codes, and for groups along K the places that the operand has for them; `out` is the row itself where
// these are the same.
void place_codes(const Linear& linear, const Rows& rows, int64_t r, const uint8_t* codes, int32_t zero, uint8_t* out) {
  if (!linear.along_k) rows.sum[r] = 0.0f;  // the one group is there without codes, too
  row_kernels().sum_codes(codes, linear.k, linear.along_k ? linear.group_size : linear.k, zero, rows.sum + r,
                          rows.rows);
  if (out == codes) return;
  for (int64_t g = 0; g < linear.groups; ++g) {
    const Group& group = linear.group[g];
    std::memcpy(out + int64_t{group.first} * 4, codes + group.k, group.length);
  }
}

// Whether codes in the order of K are the operand already.
bool in_place(const Linear& linear) {
  if (!scaled_along_k(linear)) return true;
  for (int64_t g = 0; g < linear.groups; ++g)
    if (linear.group[g].k != linear.group[g].first * 4) return false;
  return true;
}

}  // namespace

void pack_group(const Linear& linear, const Rows& rows, int64_t group, const float* x, int64_t pitch) {
  const RowKernels& kernels = row_kernels();
  const bool straight = in_place(linear);
  uint8_t* apart = straight ? nullptr : unspread.get<uint8_t>(linear.k);
  pack_rows(rows, group, [&](int64_t r, uint32_t* out) {
    const float* row = x + r * pitch;
    if (linear.k > 0) out[rows.kd - 1] = 0;
    if (linear.kind == WeightKind::s8) {
      if (!straight) std::memset(out, 0, static_cast<size_t>(rows.kd) * 4);
      uint8_t* const to = reinterpret_cast<uint8_t*>(out);
      uint8_t* const codes = straight ? to : apart;
      rows.scale[r] = rows.zeros ? kernels.quantize_range(row, linear.k, codes, rows.zeros + r)
                                 : kernels.quantize_row(row, linear.k, linear.input_scale, linear.input_zero, codes);
      if (rows.sum) place_codes(linear, rows, r, codes, rows.zero_of(r), to);
    } else {
      kernels.store_row(row, linear.k, linear.kind == WeightKind::bf16 ? Dtype::bf16 : Dtype::f32, out);
    }
  });
}

void pack_code_group(const Linear& linear, const Rows& rows, int64_t group, const uint8_t* codes, uint8_t xor_mask) {
  const int64_t k = linear.k;
  const bool straight = in_place(linear);
  uint8_t* apart = straight ? nullptr : unspread.get<uint8_t>(k);
  pack_rows(rows, group, [&](int64_t r, uint32_t* out) {
    if (k > 0) out[rows.kd - 1] = 0;
    if (!straight) std::memset(out, 0, static_cast<size_t>(rows.kd) * 4);
    uint8_t* const to = reinterpret_cast<uint8_t*>(out);
    row_kernels().flip_row(codes + r * k, k, xor_mask, straight ? to : apart);
    if (rows.sum) place_codes(linear, rows, r, straight ? to : apart, rows.zero_of(r), to);
  });
}

}  // namespace bertkern::cpu
