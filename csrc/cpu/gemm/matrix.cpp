// The loop over the tiles of a matrix unit: each is finished while the unit multiplies the next one.
#include <algorithm>

#include "cpu/gemm/loops.h"
#include "cpu/scratch.h"

namespace bertkern::cpu {

namespace {

// The thread has the unit as long as this lives.
class MatrixUnit {
 public:
  explicit MatrixUnit(const MatrixKernels& kernels) : kernels_(kernels) { kernels_.begin(); }
  ~MatrixUnit() { kernels_.end(); }
  MatrixUnit(const MatrixUnit&) = delete;
  MatrixUnit& operator=(const MatrixUnit&) = delete;

  // The tile that is multiplied next, to be filled in before multiply().
  MatrixTile& next() { return tiles_[turn_]; }
  float* buffer() { return buffers_[turn_]; }  // for its outputs, [kMatrixRows][kPanel]
  void multiply(const uint32_t* a, const uint32_t* b, int64_t kd, const char* ahead, int64_t ahead_bytes) {
    MatrixTile& tile = begin(false);
    kernels_.tile(a, b, kd, ahead, ahead_bytes, tile, before_);
    before_ = &tile;
  }
  void multiply(const uint32_t* a, const SparseMatrixPanel& b, const char* ahead, int64_t ahead_bytes) {
    MatrixTile& tile = begin(true);
    kernels_.sparse_tile(a, b, ahead, ahead_bytes, tile, before_);
    before_ = &tile;
  }
  void finish() {
    if (before_) kernels_.finish(*before_);
    before_ = nullptr;
  }

 private:
  MatrixTile& begin(bool turned) {
    MatrixTile& tile = tiles_[turn_];
    tile.sums = sums_[turn_], tile.turned = turned;
    turn_ ^= 1;
    return tile;
  }

  const MatrixKernels& kernels_;
  alignas(64) uint32_t sums_[2][kMatrixRows * kPanel];
  alignas(64) float buffers_[2][kMatrixRows * kPanel];
  MatrixTile tiles_[2];
  const MatrixTile* before_ = nullptr;
  int turn_ = 0;
};

thread_local Scratch turned_lists;

// The panel's lists as the unit takes them, in memory of the thread's.
SparseMatrixPanel sparse_matrix_panel(const MatrixKernels& kernels, const Linear& linear, int64_t panel) {
  const SparsePanel lists = sparse_panel(linear, panel);
  uint32_t* const tiles = turned_lists.get<uint32_t>(list_tile_dwords(lists));
  kernels.turn_lists(lists, tiles);
  return {lists, tiles};
}

// Where the rows of a tile go, once they are floats.
struct Written {
  Sink* sink;
  const float* buffer;
  int64_t r, column, columns;
  static void rows_done(void* context, int64_t i, int64_t rows) {
    const Written& w = *static_cast<const Written*>(context);
    w.sink->write(w.buffer + i * kPanel, w.r + i, rows, w.column, w.columns);
  }
};

// Bytes of rows that all panels pass over before the next rows come: they stay in the L2 meanwhile, beside two panels.
int64_t rows_in_cache() {
  static const int64_t bytes = std::max<int64_t>(cache_sizes().l2 / 2, 1 << 18);
  return bytes;
}

}  // namespace

void gemm_matrix(const Linear& linear, const Rows& rows, int64_t g0, int64_t g1, int64_t p0, int64_t p1,
                 const Output& output, const void* start) {
  const bool integer = linear.kind == WeightKind::s8, grouped = linear.layout == Layout::grouped;
  const bool sparse = linear.layout == Layout::panels;
  const MatrixKernels& kernels = *matrix_kernels(linear.kind);
  Sink sink(linear, output);
  MatrixUnit unit(kernels);
  Written written[2];
  int turn = 0;
  const int64_t block = std::max<int64_t>(1, rows_in_cache() / (rows.group_dwords() * 4));
  for (int64_t begin = g0, end; begin < g1; begin = end) {
    end = std::min(g1, begin + block);
    for (int64_t p = p0; p < p1; ++p) {
      const int64_t column = p * kPanel, columns = std::min(kPanel, linear.n - column);
      const bool direct = sink.in_tile() && columns == kPanel;
      const uint32_t* const panel = sparse ? nullptr : dense_panel(linear, p);
      const SparseMatrixPanel lists = sparse ? sparse_matrix_panel(kernels, linear, p) : SparseMatrixPanel{};
      // The next panel comes from memory, or the L3: each tile fetches its share.
      const Piece next = p + 1 < p1 ? panel_weights(linear, p + 1) : output.after;
      const int64_t share = next.data ? next.bytes / (end - begin) : 0;
      for (int64_t g = begin; g < end; ++g) {
        const int64_t r = rows.begin(g);
        MatrixTile& tile = unit.next();
        tile.mr = rows.begin(g + 1) - r;
        tile.rows = static_cast<char*>(sink.row(r, column)),
        tile.rows_pitch = output.out_pitch * dtype_size(output.dtype);
        TileOutput& sums = tile.output;
        sums = TileOutput{};
        sums.init = static_cast<const char*>(start) + column * 4;
        if (integer) {
          sums.weight_scale = linear.scale + column, sums.bias = linear.bias + column;
          sums.row_scale = rows.scale + r, sums.row_zero = rows.zeros ? rows.zeros + r : nullptr;
          if (grouped) sums.weight_zero = linear.zero + column, sums.row_sum = rows.sum + r;
        }
        if (direct) {
          sums.out = sink.row(r, column), sums.pitch = output.out_pitch, sums.bf16 = output.dtype == Dtype::bf16;
          sums.residual = sink.residual(r, column), sums.residual_pitch = output.residual_pitch;
          tile.rows_done = nullptr;
        } else {
          sums.out = unit.buffer(), sums.pitch = kPanel;
          written[turn] = {&sink, unit.buffer(), r, column, columns};
          tile.rows_done = &Written::rows_done, tile.context = &written[turn];
        }
        const char* const ahead = reinterpret_cast<const char*>(next.data) + (g - begin) * share;
        if (sparse)
          unit.multiply(rows.group_data(g), lists, ahead, share);
        else
          unit.multiply(rows.group_data(g), panel, linear.kd, ahead, share);
        turn ^= 1;
      }
    }
  }
  unit.finish();
}

}  // namespace bertkern::cpu
