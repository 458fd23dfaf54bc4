// The left operand of a product, and the loops over its tiles.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/gemm/linear.h"
#include "cpu/scratch.h"

namespace bertkern::cpu {

namespace {

constexpr int64_t kLeastRows = 6;  // of a group that is one of several for a reason: fewer leave the dot products idle
constexpr int64_t kFetchingRows = 70;  // more take so long over a panel that the processor's own fetching suffices
constexpr int64_t kSplitRows = 6;      // measured: fewer rows wait for memory in any case
constexpr int64_t kVectorRows = 4;     // measured: so few are no work for a matrix unit

bool sums_of_rows(const Linear& linear) { return linear.layout == Layout::grouped && linear.kind == WeightKind::s8; }

// Whether rows bring a scale and a zero point of their own.
bool own_ranges(const Linear& linear) {
  return linear.kind == WeightKind::s8 && linear.input_scale <= 0.0f && linear.input_zero == kOwnZero;
}

bool scaled_along_k(const Linear& linear) { return sums_of_rows(linear) && linear.along_k; }

// Whether all tiles take lists that the weights were packed with.
bool in_lists(const Linear& linear) {
  return linear.ordered > 0 && linear.ordered == tile_kernels(linear.kind).ordered;
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
  if (scaled_along_k(linear) || !matrix_kernels(linear.kind)) return false;
  if (linear.layout != Layout::dense && linear.layout != Layout::grouped) return false;
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
  shape.pitch = shape.matrix ? kMatrixRows : group_pitch(linear);
  return shape;
}

int64_t operand_dwords(const Rows& shape) { return shape.groups * shape.group_dwords() + 64; }

}  // namespace

bool same_operand(const Linear& a, const Linear& b) {
  const bool sums = sums_of_rows(a);
  if (sums != sums_of_rows(b) || (sums && !same_groups(a, b))) return false;
  if (for_matrix_unit(a, kMatrixRows) != for_matrix_unit(b, kMatrixRows)) return false;
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
  if (rows.matrix) return pack_matrix_rows(rows, group, convert);
  const int64_t r0 = rows.begin(group), mr = rows.begin(group + 1) - r0, kd = rows.kd;
  uint32_t* out = rows.group_data(group);
  const int64_t pitch = (kd * rows.planes + 15) / 16 * 16;
  uint32_t* stage = staging.get<uint32_t>(pitch * (kGroupPitch + 1));
  uint32_t* narrow = stage + pitch * kGroupPitch;
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
  for (int64_t g = 0; g < linear.groups; ++g) {
    const int64_t begin = linear.along_k ? linear.group[g].k : 0,
                  length = linear.along_k ? linear.group[g].length : linear.k;
    int32_t sum = 0;
    for (int64_t i = begin; i < begin + length; ++i) sum += codes[i];
    rows.sum[g * rows.rows + r] = static_cast<float>(sum - zero * static_cast<int32_t>(length));
    if (out == codes) continue;
    uint8_t* to = out + int64_t{linear.group[g].first} * 4;
    std::memcpy(to, codes + begin, static_cast<size_t>(length));
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

namespace {

// Where a tile's sums go: straight to the rows of Y where nothing but the sums, or their bf16, is asked for; else
// through a buffer of floats that the epilogue makes rows of Y from.
class Sink {
 public:
  Sink(const Linear& linear, const Output& output) : linear_(linear), output_(output) {}

  bool in_tile() const {
    return output_.activation == Activation::none && linear_.output_scale <= 0.0f && output_.dtype <= Dtype::bf16 &&
           !linear_.column;
  }
  void* row(int64_t r, int64_t column) const {
    return static_cast<char*>(output_.out) + (r * output_.out_pitch + column) * dtype_size(output_.dtype);
  }
  const float* residual(int64_t r, int64_t column) const {
    return output_.residual ? output_.residual + r * output_.residual_pitch + column : nullptr;
  }
  // Rows [r, r + mr) x columns [column, column + columns) from a buffer of kPanel columns.
  void write(const float* buffer, int64_t r, int64_t mr, int64_t column, int64_t columns) const {
    Epilogue e;
    e.output_scale = linear_.output_scale;
    e.activation = output_.activation;
    e.residual = residual(r, column), e.residual_pitch = output_.residual_pitch;
    e.out = row(r, column), e.out_pitch = output_.out_pitch;
    e.dtype = output_.dtype;
    e.code_step = output_.code_step, e.code_zero = output_.code_zero;
    if (linear_.column) return scatter(buffer, r, mr, linear_.column + column, columns, e);
    kernels_.epilogue(buffer, static_cast<int>(mr), columns, e);
  }

 private:
  // The same for outputs that stand in another order than the columns of Y.
  void scatter(const float* buffer, int64_t r, int64_t mr, const uint32_t* to, int64_t columns, Epilogue e) const {
    alignas(64) float gathered[kMatrixRows * kPanel], made[kMatrixRows * kPanel];
    e.out = made, e.out_pitch = kPanel;
    if (output_.residual) {
      for (int64_t i = 0; i < mr; ++i)
        for (int64_t c = 0; c < columns; ++c) gathered[i * kPanel + c] = *residual(r + i, to[c]);
      e.residual = gathered, e.residual_pitch = kPanel;
    }
    kernels_.epilogue(buffer, static_cast<int>(mr), columns, e);
    switch (dtype_size(output_.dtype)) {
      case 4:
        return place<uint32_t>(made, r, mr, to, columns);
      case 2:
        return place<uint16_t>(made, r, mr, to, columns);
      default:
        return place<uint8_t>(made, r, mr, to, columns);
    }
  }
  template <class T>
  void place(const void* made, int64_t r, int64_t mr, const uint32_t* to, int64_t columns) const {
    const T* from = static_cast<const T*>(made);
    for (int64_t i = 0; i < mr; ++i, from += kPanel) {
      T* out = static_cast<T*>(row(r + i, 0));
      for (int64_t c = 0; c < columns; ++c) out[to[c]] = from[c];
    }
  }

  const Linear& linear_;
  const Output& output_;
  const RowKernels& kernels_ = row_kernels();
};

// 1, 2 or 4 rows at a time straight from the planes.
class Narrow {
 public:
  Narrow(const Linear& linear, const Rows& rows) : linear_(linear), rows_(rows) {}

  // Whether the panel is for these tiles; the others' is decoded.
  bool takes(int64_t panel) {
    const int bits = rows_.rows <= kNarrowRows && rows_.sum ? narrow_bits(linear_, panel) : 0;
    if (bits && bits != bits_) prepare(bits);
    return bits > 0;
  }
  static int64_t rows_of(int64_t left) { return left >= 4 ? 4 : left >= 2 ? 2 : 1; }
  void run(int64_t mr, const TileKernels& tiles, const uint32_t* a, const uint32_t* planes, int64_t r,
           const GroupPanel& scaled, const TileOutput& sums) const {
    const int64_t tile = mr / 2;  // of 1, 2, 4
    if (linear_.along_k)
      tiles.narrow_group_tile[bits_][tile](a, rows_.pitch, planes, scaled, shift_ + r, sums);
    else
      tiles.narrow_tile[bits_][tile](a, rows_.pitch, planes, linear_.kd, shift_ + r, sums);
  }

 private:
  void prepare(int bits) {
    const Linear& linear = linear_;
    const Rows& rows = rows_;
    const int32_t middle = 1 << (bits - 1);
    bits_ = bits, shift_ = shifts.get<int32_t>(rows.rows * linear.groups + 16);
    for (int64_t i = 0; i < rows.rows * linear.groups; ++i) shift_[i] = -middle * static_cast<int32_t>(rows.sum[i]);
    // sum (u - z) (q - middle) = sum u q - z sum q - middle sum (u - z), and the layer's init says z sum (q - middle).
    if (!linear.along_k)
      for (int64_t r = 0; r < rows.rows; ++r) shift_[r] -= static_cast<int32_t>(rows.zero_of(r) * linear.k * middle);
    else
      for (int64_t g = 0; g < linear.groups; ++g)
        for (int64_t r = 0; r < rows.rows; ++r)
          shift_[g * rows.rows + r] -= static_cast<int32_t>(rows.zero_of(r) * int64_t{linear.group[g].length} * middle);
  }
  static thread_local Scratch shifts;
  const Linear& linear_;
  const Rows& rows_;
  int bits_ = 0;
  int32_t* shift_ = nullptr;
};
thread_local Scratch Narrow::shifts;

// A tile's rows, and where its operand begins.
struct Cut {
  int64_t r, mr, group;
  const uint32_t* a;
};
thread_local Scratch cut_memory;

// The tiles of groups [g0, g1): cut once, as a tile is over in some hundred cycles. `part(rows)`: how many come first.
template <class Part>
const Cut* cut_tiles(const Rows& rows, int64_t g0, int64_t g1, int64_t& count, Part&& part) {
  Cut* cuts = cut_memory.get<Cut>(rows.rows + 1);
  count = 0;
  for (int64_t g = g0; g < g1; ++g) {
    const int64_t begin = rows.begin(g), end = rows.begin(g + 1);
    for (int64_t r = begin; r < end; r += cuts[count++].mr)
      cuts[count] = {r, part(end - r), g, rows.group_data(g) + (r - begin)};
  }
  return cuts;
}

// The first of as many parts as `rows` takes of at most `most`, even ones.
int64_t even_part(int64_t rows, int64_t most) {
  const int64_t parts = (rows + most - 1) / most;
  return (rows + parts - 1) / parts;
}

// The thread has the unit as long as this lives.
class MatrixUnit {
 public:
  explicit MatrixUnit(const MatrixKernels* kernels) : kernels_(kernels) {
    if (kernels_) kernels_->begin();
  }
  ~MatrixUnit() {
    if (kernels_) kernels_->end();
  }
  MatrixUnit(const MatrixUnit&) = delete;
  MatrixUnit& operator=(const MatrixUnit&) = delete;
  void tile(const uint32_t* a, int64_t mr, const uint32_t* b, int64_t kd, const TileOutput& output) const {
    kernels_->tile(a, mr, b, kd, output);
  }

 private:
  const MatrixKernels* const kernels_;
};

thread_local Scratch restored, carried;

// Pieces of K after each of which sums are put aside. Few tiles do not come back to a panel's part often enough.
constexpr int64_t kCarryingTiles = 3;
int64_t blocks_of_k(const TileKernels& tiles, bool dense, int64_t kd, int64_t tile_count) {
  if (!dense || !tiles.k_block || tile_count < kCarryingTiles) return 1;
  return std::max<int64_t>(1, (kd + tiles.k_block - 1) / tiles.k_block);
}

const uint32_t* restored_panel(const Linear& linear, int64_t panel) {
  uint32_t* dwords = restored.get<uint32_t>(linear.kd * kPanel + 16);
  restore_panel(linear, panel, dwords);
  return dwords;
}

void gemm_tiles(const Linear& linear, const Rows& rows, int64_t g0, int64_t g1, int64_t p0, int64_t p1,
                const Output& output, const void* start) {
  const TileKernels& tiles = tile_kernels(linear.kind);
  const bool integer = linear.kind == WeightKind::s8, grouped = linear.layout == Layout::grouped;
  const bool dense = linear.layout == Layout::dense || grouped, along_k = scaled_along_k(linear);
  const bool may_list = tiles.ordered > 0 && grouped && !along_k && linear.kd <= kMostOrdered;
  const bool listed_all = in_lists(linear);
  const bool foreign = linear.ordered && !listed_all;  // packed under another ISA
  const Sink sink(linear, output);
  Narrow narrow(linear, rows);
  alignas(64) float buffer[kMatrixRows * kPanel];
  const MatrixUnit unit(rows.matrix ? matrix_kernels(linear.kind) : nullptr);
  const Cut* cuts = nullptr;
  int64_t count = 0, cut_most = 0;  // 0: for narrow tiles
  for (int64_t p = p0; p < p1; ++p) {
    const int64_t column = p * kPanel, columns = std::min(kPanel, linear.n - column);
    const bool direct = sink.in_tile() && columns == kPanel;
    const SparsePanel listed = dense ? SparsePanel{} : sparse_panel(linear, p);
    const bool straight = narrow.takes(p);
    const int bits = grouped && !along_k ? static_cast<int>(linear.grouped_panel[p].bits) : 0;
    const bool ordered = listed_all || (may_list && bits <= kOrderedBits);
    const int64_t most = straight      ? 0
                         : rows.matrix ? kMatrixRows
                         : along_k     ? tiles.group_mr
                         : ordered     ? tiles.ordered_mr
                                       : tiles.max_mr;
    if (!cuts || most != cut_most) {
      cut_most = most;
      cuts = straight ? cut_tiles(rows, g0, g1, count, [](int64_t left) { return Narrow::rows_of(left); })
                      : cut_tiles(rows, g0, g1, count, [&](int64_t left) { return even_part(left, most); });
    }
    const uint32_t* panel = straight  ? panel_weights(linear, p).data
                            : grouped ? decoded_panel(linear, p)
                            : foreign ? restored_panel(linear, p)
                            : dense   ? panel_weights(linear, p).data
                                      : listed.weights;
    const PanelOrder order = !ordered     ? PanelOrder{}
                             : listed_all ? panel_order(linear, p)
                                          : order_of_bits(bits, panel, linear.kd, tiles.ordered);
    const int64_t blocks = blocks_of_k(tiles, dense && !rows.matrix, linear.kd, count);
    const auto block_begin = [&](int64_t block) { return linear.kd * block / blocks; };
    const int64_t steps = dense ? block_begin(1) : listed.both + listed.half[0] + listed.half[1];
    TileOutput sums{};
    sums.init = static_cast<const char*>(start) + column * 4;
    if (integer) sums.weight_scale = linear.scale + column, sums.bias = linear.bias + column;
    if (integer && grouped) sums.weight_zero = linear.zero + column;
    const int64_t at = p * linear.groups * kPanel;
    GroupPanel scaled{linear.group, linear.groups, linear.scale + at, linear.zero + at, nullptr, rows.rows};
    sums.out = buffer, sums.pitch = direct ? output.out_pitch : kPanel;
    sums.bf16 = direct && output.dtype == Dtype::bf16;
    sums.residual_pitch = output.residual_pitch;
    // Few rows take weights from memory: the groups fetch the next panel while they compute, each its share, evenly.
    // (All at once, or a fixed distance ahead, is slower than nothing: it holds up the loads of the running panel.)
    const Piece next = p + 1 < p1 ? panel_weights(linear, p + 1) : output.after;
    const bool few = (g1 - g0 > 1 || rows.matrix) && rows.begin(g1) - rows.begin(g0) <= kFetchingRows;
    const int64_t share = few && steps > 0 ? next.bytes / ((g1 - g0) * blocks) : 0;
    const char* const ahead = reinterpret_cast<const char*>(share ? next.data : panel);
    if (share) sums.ahead_step = std::min<int64_t>(64, (share + steps - 1) / steps);
    float* const carry = blocks > 1 ? carried.get<float>((rows.begin(g1) - rows.begin(g0)) * kPanel + 16) : nullptr;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t k0 = block_begin(block), kd = block_begin(block + 1) - k0;
      sums.resume = block > 0, sums.suspend = block + 1 < blocks;
      for (const Cut *cut = cuts, *end = cuts + count; cut < end; ++cut) {
        const int64_t r = cut->r;
        sums.ahead = ahead + (block * (g1 - g0) + cut->group - g0) * share;
        if (carry) sums.carry = carry + (r - rows.begin(g0)) * kPanel;
        if (integer) {
          sums.row_scale = rows.scale + r;
          sums.row_sum = rows.sum ? rows.sum + r : nullptr;
          sums.row_zero = rows.zeros ? rows.zeros + r : nullptr;
        }
        if (direct) sums.residual = sink.residual(r, column), sums.out = sink.row(r, column);
        if (rows.matrix) {
          unit.tile(cut->a, cut->mr, panel, linear.kd, sums);
        } else if (straight || along_k) {
          scaled.row_sum = sums.row_sum;
          straight ? narrow.run(cut->mr, tiles, cut->a, panel, r, scaled, sums)
                   : tiles.group_tile[cut->mr](cut->a, rows.pitch, panel, scaled, sums);
        } else if (ordered) {
          const uint32_t* const dwords = cut->a + linear.kd * (rows.planes - 1) * rows.pitch;
          tiles.ordered_tile[cut->mr](dwords, rows.pitch, linear.kd, order, sums);
        } else if (dense) {
          tiles.tile[cut->mr](cut->a + k0 * rows.pitch * tiles.planes, rows.pitch, panel + k0 * kPanel, kd, sums);
        } else {
          tiles.sparse_tile[cut->mr](cut->a, rows.pitch, listed, sums);
        }
        if (!direct && !sums.suspend) sink.write(buffer, r, cut->mr, column, columns);
      }
    }
  }
}

thread_local Scratch token_sums;

void gemm_tokens(const Linear& linear, const Rows& rows, int64_t g0, int64_t g1, int64_t p0, int64_t p1,
                 const Output& output, const void* start) {
  static constexpr int32_t kNothing[kPanel] = {};
  const TileKernels& tiles = tile_kernels(linear.kind);
  const Sink sink(linear, output);
  const auto run = tiles.tokens[linear.features / 2];
  const int64_t blocks = token_panel(linear, 0).blocks;
  const int64_t panels_at_once = blocks > 1 ? kTokenPanels : 1;
  uint32_t* const sums = token_sums.get<uint32_t>(panels_at_once * kPanel * kTokenGroups * kTokens);
  alignas(64) float buffer[kTokens * kPanel];
  for (int64_t g = g0; g < g1; g += kTokenGroups) {
    const int64_t groups = std::min(kTokenGroups, g1 - g), pitch = groups * kTokens;
    for (int64_t first = p0; first < p1; first += panels_at_once) {
      const int64_t last = std::min(first + panels_at_once, p1);
      const auto init = [&](int64_t p) { return static_cast<const char*>(start) + p * kPanel * 4; };
      const auto panel_sums = [&](int64_t p) { return sums + (p - first) * kPanel * pitch; };
      for (int64_t block = 0; block < blocks; ++block)
        for (int64_t p = first; p < last; ++p) {
          // Lanes are rows: where these have zero points of their own, the finish takes them away.
          const void* begin = block > 0 ? nullptr : rows.zeros ? static_cast<const void*>(kNothing) : init(p);
          run(rows.group_data(g), rows.group_dwords(), groups, token_panel(linear, p), block, begin, panel_sums(p),
              pitch);
        }
      for (int64_t p = first; p < last; ++p) {
        const int64_t column = p * kPanel, columns = std::min(kPanel, linear.n - column);
        const bool direct = sink.in_tile() && columns == kPanel && !output.residual && output.dtype == Dtype::f32;
        for (int64_t i = 0; i < groups; ++i) {
          const int64_t r = rows.begin(g + i), mr = rows.begin(g + i + 1) - r;
          TileOutput tile{};
          if (rows.scale) tile.row_scale = rows.scale + r, tile.weight_scale = linear.scale + column;
          if (rows.zeros) tile.row_zero = rows.zeros + r, tile.init = init(p);
          tile.bias = linear.bias + column;
          tile.out = direct ? sink.row(r, column) : buffer;
          tile.pitch = direct ? output.out_pitch : kPanel;
          tiles.finish_tokens(panel_sums(p) + i * kTokens, pitch, mr, tile);
          if (!direct) sink.write(buffer, r, mr, column, columns);
        }
      }
    }
  }
}

}  // namespace

void gemm(const Linear& linear, const Rows& rows, int64_t g0, int64_t g1, int64_t p0, int64_t p1, const Output& output,
          const int32_t* init) {
  const bool integer = linear.kind == WeightKind::s8;
  const int32_t* sums = init ? init : rows.zeros ? linear.column_sum : linear.init;
  const void* start = integer ? static_cast<const void*>(sums) : linear.bias;
  if (linear.layout == Layout::tokens)
    gemm_tokens(linear, rows, g0, g1, p0, p1, output, start);
  else
    gemm_tiles(linear, rows, g0, g1, p0, p1, output, start);
}

}  // namespace bertkern::cpu
