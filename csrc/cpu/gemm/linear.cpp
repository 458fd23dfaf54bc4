// The loops over the tiles of a product.
#include <algorithm>
#include <cstring>

#include "cpu/gemm/loops.h"
#include "cpu/scratch.h"

namespace bertkern::cpu {

namespace {

constexpr int64_t kFetchingRows = 70;  // more take so long over a panel that the processor's own fetching suffices

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

}  // namespace

const uint32_t* dense_panel(const Linear& linear, int64_t panel) {
  if (linear.layout == Layout::grouped) return decoded_panel(linear, panel);
  if (!linear.ordered) return panel_weights(linear, panel).data;
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
  alignas(64) float buffer[kMaxRows * kPanel];
  const Cut* cuts = nullptr;
  int64_t count = 0, cut_most = 0;  // 0: for narrow tiles
  for (int64_t p = p0; p < p1; ++p) {
    const int64_t column = p * kPanel, columns = std::min(kPanel, linear.n - column);
    const bool direct = sink.in_tile() && columns == kPanel;
    const SparsePanel listed = sparse && !linear.ordered ? sparse_panel(linear, p) : SparsePanel{};
    const bool straight = narrow.takes(p);
    const int bits = grouped && !along_k ? static_cast<int>(linear.grouped_panel[p].bits) : 0;
    const bool ordered = listed_all || (may_list && bits <= kOrderedBits);
    const int64_t most = straight ? 0 : along_k ? tiles.group_mr : ordered ? tiles.ordered_mr : tiles.max_mr;
    if (!cuts || most != cut_most) {
      cut_most = most;
      cuts = straight ? cut_tiles(rows, g0, g1, count, [](int64_t left) { return Narrow::rows_of(left); })
                      : cut_tiles(rows, g0, g1, count, [&](int64_t left) { return even_part(left, most); });
    }
    const uint32_t* panel =
        straight || listed_all || (sparse && !foreign) ? panel_weights(linear, p).data : dense_panel(linear, p);
    const PanelOrder order = !ordered     ? PanelOrder{}
                             : listed_all ? panel_order(linear, p)
                                          : order_of_bits(bits, panel, linear.kd, tiles.ordered);
    const int64_t blocks = blocks_of_k(tiles, !sparse, linear.kd, count);
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
    const bool fetched = g1 - g0 > 1 && (grouped || sparse || rows.begin(g1) - rows.begin(g0) <= kFetchingRows);
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
        if (straight || along_k) {
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

void gemm(const Linear& linear, const Rows& rows, int64_t g0, int64_t g1, int64_t p0, int64_t p1, const Output& output,
          const int32_t* init) {
  const bool integer = linear.kind == WeightKind::s8;
  const int32_t* sums = init ? init : rows.zeros ? linear.column_sum : linear.init;
  const void* start = integer ? static_cast<const void*>(sums) : linear.bias;
  if (linear.layout == Layout::tokens)
    gemm_tokens(linear, rows, g0, g1, p0, p1, output, start);
  else if (rows.matrix)
    gemm_matrix(linear, rows, g0, g1, p0, p1, output, start);
  else
    gemm_tiles(linear, rows, g0, g1, p0, p1, output, start);
}

}  // namespace bertkern::cpu
