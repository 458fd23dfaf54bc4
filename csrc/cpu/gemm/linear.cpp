// The loops over the tiles of a product.
#include <algorithm>
#include <cstring>

#include "cpu/gemm/linear.h"
#include "cpu/scratch.h"

namespace bertkern::cpu {

namespace {

constexpr int64_t kFetchingRows = 70;  // more take so long over a panel that the processor's own fetching suffices

// Where a tile's sums go: straight to the rows of Y where nothing but the sums, or their bf16, is asked for; else
// through a buffer of floats that the epilogue makes rows of Y from.
class Sink {
 public:
  Sink(const Linear& linear, const Output& output) : linear_(linear), output_(output) {}

  bool in_tile() const { return nothing_to_do() && output_.dtype <= Dtype::bf16 && !linear_.column; }
  void* row(int64_t r, int64_t column) const {
    return static_cast<char*>(output_.out) + (r * output_.out_pitch + column) * dtype_size(output_.dtype);
  }
  const float* residual(int64_t r, int64_t column) const {
    return output_.residual ? output_.residual + r * output_.residual_pitch + column : nullptr;
  }
  // Rows [r, r + mr) x columns [column, column + columns) from a buffer of kPanel columns.
  void write(const float* buffer, int64_t r, int64_t mr, int64_t column, int64_t columns) {
    Epilogue e;
    e.output_scale = linear_.output_scale;
    e.activation = output_.activation;
    e.residual = residual(r, column), e.residual_pitch = output_.residual_pitch;
    e.out = row(r, column), e.out_pitch = output_.out_pitch;
    e.dtype = output_.dtype;
    e.code_step = output_.code_step, e.code_zero = output_.code_zero;
    if (linear_.column) return scatter(buffer, r, mr, column, columns, e);
    kernels_.epilogue(buffer, static_cast<int>(mr), columns, e);
  }

 private:
  bool nothing_to_do() const { return output_.activation == Activation::none && linear_.output_scale <= 0.0f; }

  static constexpr int64_t kRowsForPlaces = 4;  // fewer are over before places are found

  // The same for outputs that stand in another order than the columns of Y.
  void scatter(const float* buffer, int64_t r, int64_t mr, int64_t column, int64_t columns, Epilogue e) {
    alignas(64) float gathered[kMatrixRows * kPanel + kPlaces], made[kMatrixRows * kPanel];
    const bool apart = mr < kRowsForPlaces;
    if (!apart && places_at_ != column) find_places(column, columns);
    if (output_.residual) {
      if (apart)
        each(mr, column, columns,
             [&](int64_t i, int64_t c, int64_t to) { gathered[i * kPanel + c] = *residual(r + i, to); });
      else
        kernels_.collect(residual(r, 0), output_.residual_pitch, mr, places_, place_count_, gathered);
      e.residual = gathered, e.residual_pitch = kPanel;
    }
    const void* outputs = buffer;
    if (output_.residual || !nothing_to_do() || output_.dtype != Dtype::f32) {
      e.out = made, e.out_pitch = kPanel;
      kernels_.epilogue(buffer, static_cast<int>(mr), columns, e);
      outputs = made;
    }
    const int64_t bytes = dtype_size(output_.dtype);
    if (!apart) return kernels_.spread(outputs, mr, places_, place_count_, bytes, row(r, 0), output_.out_pitch);
    switch (bytes) {
      case 4:
        return place<uint32_t>(outputs, r, mr, column, columns);
      case 2:
        return place<uint16_t>(outputs, r, mr, column, columns);
      default:
        return place<uint8_t>(outputs, r, mr, column, columns);
    }
  }
  template <class T>
  void place(const void* outputs, int64_t r, int64_t mr, int64_t column, int64_t columns) const {
    const T* from = static_cast<const T*>(outputs);
    T* out = static_cast<T*>(output_.out) + r * output_.out_pitch;
    const int64_t pitch = output_.out_pitch;
    each(mr, column, columns, [&](int64_t i, int64_t c, int64_t to) { out[i * pitch + to] = from[i * kPanel + c]; });
  }

  // Calls see(row, place in the panel, column of Y).
  template <class See>
  void each(int64_t mr, int64_t column, int64_t columns, See&& see) const {
    const uint32_t* const to = linear_.column + column;
    for (int64_t i = 0; i < mr; ++i)
      for (int64_t c = 0; c < columns; ++c) see(i, c, int64_t{to[c]});
  }

  void find_places(int64_t column, int64_t columns) {
    const uint32_t* const to = linear_.column + column;
    places_at_ = column, place_count_ = 0;
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t bit = c ? to[c] - places_[place_count_ - 1].to : 0;
      if (bit > 0 && bit < kPlaces && to[c] > to[c - 1] && (kernels_.holes || to[c] == to[c - 1] + 1))
        places_[place_count_ - 1].mask |= 1u << bit;
      else
        places_[place_count_++] = {static_cast<int32_t>(c), 1, to[c]};
    }
  }

  const Linear& linear_;
  const Output& output_;
  const RowKernels& kernels_ = row_kernels();
  int64_t places_at_ = -1, place_count_ = 0;  // the column that the panel whose places these are begins with
  Places places_[kPanel];
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

void fetch(const char* data, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(data + at, 0, 2);
}

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
  const bool sparse = linear.layout == Layout::panels, along_k = scaled_along_k(linear);
  const bool may_list = tiles.ordered > 0 && grouped && !along_k && linear.kd <= kMostOrdered;
  const bool listed_all = in_lists(linear);
  const bool foreign = linear.ordered && !listed_all;  // packed under another ISA: panels are restored, whole
  Sink sink(linear, output);
  Narrow narrow(linear, rows);
  alignas(64) float buffer[kMatrixRows * kPanel];
  const MatrixUnit unit(rows.matrix ? matrix_kernels(linear.kind) : nullptr);
  const Cut* cuts = nullptr;
  int64_t count = 0, cut_most = 0;  // 0: for narrow tiles
  for (int64_t p = p0; p < p1; ++p) {
    const int64_t column = p * kPanel, columns = std::min(kPanel, linear.n - column);
    const bool direct = sink.in_tile() && columns == kPanel;
    const SparsePanel listed = sparse && !linear.ordered ? sparse_panel(linear, p) : SparsePanel{};
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
                                      : panel_weights(linear, p).data;
    const PanelOrder order = !ordered     ? PanelOrder{}
                             : listed_all ? panel_order(linear, p)
                                          : order_of_bits(bits, panel, linear.kd, tiles.ordered);
    const int64_t blocks = blocks_of_k(tiles, !sparse && !rows.matrix, linear.kd, count);
    const auto block_begin = [&](int64_t block) { return linear.kd * block / blocks; };
    const int64_t steps = sparse ? 1 : block_begin(1);
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
    // Planes are decoded at once, and would be waited for with any number of rows. So would lists: their panels are
    // short, and fetched a tile's share before each tile.
    const Piece next = p + 1 < p1 ? panel_weights(linear, p + 1) : output.after;
    const bool fetched =
        (g1 - g0 > 1 || rows.matrix) && (grouped || sparse || rows.begin(g1) - rows.begin(g0) <= kFetchingRows);
    const int64_t share = fetched && steps > 0 ? next.bytes / ((g1 - g0) * blocks) : 0;
    const char* const ahead = reinterpret_cast<const char*>(share ? next.data : panel);
    const bool lists = share && sparse;
    const int64_t index_share = lists ? next.index_bytes / (g1 - g0) : 0;
    if (share && !sparse) sums.ahead_step = std::min<int64_t>(64, (share + steps - 1) / steps);
    if (lists && p + 1 < p1) {
      const void* const vectors[] = {sums.init, sums.weight_scale, sums.bias};
      for (const void* vector : vectors)
        if (vector) fetch(static_cast<const char*>(vector) + kPanel * 4, kPanel * 4);
    }
    float* const carry = blocks > 1 ? carried.get<float>((rows.begin(g1) - rows.begin(g0)) * kPanel + 16) : nullptr;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t k0 = block_begin(block), kd = block_begin(block + 1) - k0;
      sums.resume = block > 0, sums.suspend = block + 1 < blocks;
      for (const Cut *cut = cuts, *end = cuts + count; cut < end; ++cut) {
        const int64_t r = cut->r;
        sums.ahead = ahead + (block * (g1 - g0) + cut->group - g0) * share;
        if (lists) {
          fetch(sums.ahead, share);
          fetch(static_cast<const char*>(next.index) + (cut->group - g0) * index_share, index_share);
        }
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
          tiles.ordered_tile[cut->mr](dwords, rows.pitch, order, sums);
        } else if (!sparse || foreign) {
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
  Sink sink(linear, output);
  const auto run = tiles.tokens[linear.features / 2];
  const int64_t blocks = token_blocks(linear);
  uint32_t* const sums = token_sums.get<uint32_t>(kTokenPanels * kPanel * kTokenGroups * kTokens);
  // Rows are written in long pieces: lines of many rows that lie 4 KiB apart would drive each other out of the L1.
  const bool straight = sink.in_tile() && !output.residual && output.dtype == Dtype::f32;
  constexpr int64_t kTokenPitch = kTokenPanels * kPanel + 16;
  alignas(64) float buffer[kTokens * kTokenPitch];
  for (int64_t g = g0; g < g1; g += kTokenGroups) {
    const int64_t groups = std::min(kTokenGroups, g1 - g), pitch = groups * kTokens;
    const auto init = [&](int64_t p) { return static_cast<const char*>(start) + p * kPanel * 4; };
    const auto tile_at = [&](int64_t p, int64_t r) {
      TileOutput tile{};
      if (rows.scale) tile.row_scale = rows.scale + r, tile.weight_scale = linear.scale + p * kPanel;
      if (rows.zeros) tile.row_zero = rows.zeros + r, tile.init = init(p);
      tile.bias = linear.bias + p * kPanel;
      return tile;
    };
    for (int64_t first = p0, last; first < p1; first = last) {
      last = std::min((first / kTokenPanels + 1) * kTokenPanels, p1);  // as they lie
      const auto panel_sums = [&](int64_t p) { return sums + (p - first) * kPanel * pitch; };
      for (int64_t block = 0; block < blocks; ++block)
        for (int64_t p = first; p < last; ++p) {
          // Lanes are rows: where these have zero points of their own, the finish takes them away.
          const void* begin = block > 0 ? nullptr : rows.zeros ? static_cast<const void*>(kNothing) : init(p);
          run(rows.group_data(g), rows.group_dwords(), groups, token_panel(linear, p, block), begin, panel_sums(p),
              pitch);
        }
      const int64_t column = first * kPanel, columns = std::min(last * kPanel, linear.n) - column;
      for (int64_t i = 0; i < groups; ++i) {
        const int64_t r = rows.begin(g + i), mr = rows.begin(g + i + 1) - r;
        for (int64_t p = first; p < last; ++p) {
          TileOutput tile = tile_at(p, r);
          tile.out = buffer + (straight ? (p - first) * kPanel : 0), tile.pitch = straight ? kTokenPitch : kPanel;
          tiles.finish_tokens(panel_sums(p) + i * kTokens, pitch, mr, tile);
          if (!straight) sink.write(buffer, r, mr, p * kPanel, std::min(kPanel, linear.n - p * kPanel));
        }
        for (int64_t t = 0; straight && t < mr; ++t)
          std::memcpy(sink.row(r + t, column), buffer + t * kTokenPitch, static_cast<size_t>(columns) * 4);
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
