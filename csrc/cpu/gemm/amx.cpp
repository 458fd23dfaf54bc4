// Four tiles of sums, two of X and two of W: every load serves two products.
//
//   tile   0 1   sums of rows 0..15  x features 0..15, 16..31       4 5   X: rows 0..15, rows 16..31
//          2 3   sums of rows 16..31                                6 7   W: features 0..15, 16..31
//
// A product of tiles takes the unit 16 cycles in which the rest of the core is free: the rows of the tile before are
// finished meanwhile, some at each step.
//
// Lists of sparse weights swap the roles: 4 5 are W and 6 7 X, whose listed dwords of 16 rows are gathered, a vector
// each; 0 1 are the sums of features 0..15, 2 3 of features 16..31.
#include "cpu/amx.h"
#include "cpu/gemm/dot_vnni.h"
#include "cpu/gemm/tile.h"

namespace bertkern::cpu {
namespace {

struct Dense_s8 : Products_u8s8 {
  using Dot = Dot_vnni;
};
struct Dense_bf16 : Products_bf16 {
  using Dot = Dot_f32;
};
using Lists = Products_s8u8;

// 16 dwords of K.
template <class Products, bool kTwo>
BK_INLINE void step(const uint32_t* a, const uint32_t* b) {
  BK_TILE_LOAD(6, b, kPanel * 4);
  BK_TILE_LOAD(4, a, kTileBytes);
  Products::step0();
  BK_TILE_LOAD(7, b + kHalfPanel, kPanel * 4);
  Products::step1();
  if (kTwo) {
    BK_TILE_LOAD(5, a + kTileRows * kMatrixDwords, kTileBytes);
    Products::step2();
    Products::step3();
  }
}

// Rows [r, r + MR) of the sums, finished as those of any tile.
template <class Dot, int MR>
void finish_rows(const MatrixTile& tile, int64_t r) {
  TileOutput o = tile.output;
  if (o.row_zero) o.row_zero += r;
  if (o.row_sum) o.row_sum += r;
  if (o.row_scale) o.row_scale += r;
  if (o.residual) o.residual += r * o.residual_pitch;
  o.out = static_cast<char*>(o.out) + r * o.pitch * (o.bf16 ? 2 : 4);
  typename Dot::Acc acc[MR][kVectors];
  start<Dot, MR>(acc, 0, o);
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) acc[i][v] += Dot::init(tile.sums + (r + i) * kPanel + v * kWidth);
  finish<Dot, MR>(acc, 0, o);
  if (tile.rows_done) tile.rows_done(tile.context, r, MR);
}

constexpr int64_t kFinished = 8;  // rows at a time

// Features as rows, or back.
void turn(uint32_t* sums) {
  const auto at = [&](int64_t i, int64_t j) {
    return reinterpret_cast<float*>(sums + i * kHalfPanel * kPanel + j * kHalfPanel);
  };
  vf one[kWidth], other[kWidth];
  const auto load = [](const float* from, vf(&r)[kWidth]) {
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) r[i] = vload(from + i * kPanel);
    transpose_lanes(r);
  };
  const auto store = [](const vf(&r)[kWidth], float* to) {
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) vstore(to + i * kPanel, r[i]);
  };
  for (int64_t i = 0; i < 2; ++i) load(at(i, i), one), store(one, at(i, i));
  load(at(0, 1), one), load(at(1, 0), other);
  store(one, at(1, 0)), store(other, at(0, 1));
}

// What remains to be done to a tile: nothing, where there is none.
template <class Dot>
struct Remaining {
  const MatrixTile* tile;
  int64_t done = 0;

  explicit Remaining(const MatrixTile* before) : tile(before) {
    if (tile && tile->turned) turn(tile->sums);
  }
  inline void some() {
    if (tile && done + kFinished <= tile->mr) finish_rows<Dot, kFinished>(*tile, done), done += kFinished;
  }
  inline void all() {
    if (!tile) return;
    for (; done + kFinished <= tile->mr; done += kFinished) finish_rows<Dot, kFinished>(*tile, done);
    for (; done < tile->mr; ++done) finish_rows<Dot, 1>(*tile, done);
  }
};

// What memory is to bring while a tile is multiplied, a share at each of `steps` steps: weights that come next, and the
// rows of Y that this tile will be written to.
struct Ahead {
  const char* weights;
  const char* row;
  const char* const end;
  const int64_t share, pitch, steps;

  Ahead(const char* ahead, int64_t bytes, const MatrixTile& tile, int64_t step_count)
      : weights(ahead),
        row(tile.rows),
        end(row + tile.mr * tile.rows_pitch),
        share(step_count ? (bytes + step_count - 1) / step_count : 0),
        pitch(tile.rows_pitch),
        steps(step_count) {}
  inline void some() {
    for (const char* const next = weights + share; weights < next; weights += 64) __builtin_prefetch(weights, 0, 2);
    for (int64_t i = 0; i < kMatrixRows && row < end; i += steps, row += pitch)
      asm volatile("prefetchw (%0)\n\tprefetchw 64(%0)" : : "r"(row));
  }
};

template <class Products, bool kTwo>
BK_INLINE void products(const uint32_t* a, const uint32_t* b, int64_t kd, const char* ahead, int64_t ahead_bytes,
                        const MatrixTile& tile, const MatrixTile* before) {
  Remaining<typename Products::Dot> remaining(before);
  const int64_t steps = (kd + kMatrixDwords - 1) / kMatrixDwords;
  Ahead meanwhile(ahead, ahead_bytes, tile, steps);
  // Rows of the tile before, evenly over the steps.
  const int64_t every = steps * kFinished < kMatrixRows ? 1 : steps * kFinished / kMatrixRows;
  BK_TILE_ZERO(0);
  BK_TILE_ZERO(1);
  if (kTwo) {
    BK_TILE_ZERO(2);
    BK_TILE_ZERO(3);
  }
  int64_t k = 0, turn = every;
  for (; k + kMatrixDwords <= kd; k += kMatrixDwords) {
    meanwhile.some();
    step<Products, kTwo>(a, b);
    a += kMatrixRows * kMatrixDwords, b += kMatrixDwords * kPanel;
    if (--turn == 0) remaining.some(), turn = every;
  }
  if (k < kd) {  // the rest of the panel, and zeros
    alignas(64) uint32_t rest[kMatrixDwords * kPanel];
    for (int64_t i = 0; i < kMatrixDwords * kPanel; i += kWidth)
      vstorei(reinterpret_cast<int32_t*>(rest + i),
              i < (kd - k) * kPanel ? vloadi(reinterpret_cast<const int32_t*>(b + i)) : vseti(0));
    step<Products, kTwo>(a, rest);
  }
  remaining.all();
  uint32_t* const sums = tile.sums;
  BK_TILE_STORE(0, sums, kPanel * 4);
  BK_TILE_STORE(1, sums + kHalfPanel, kPanel * 4);
  if (kTwo) {
    BK_TILE_STORE(2, sums + kHalfPanel * kPanel, kPanel * 4);
    BK_TILE_STORE(3, sums + kHalfPanel * kPanel + kHalfPanel, kPanel * 4);
  }
}

template <class Products>
void matrix_tile(const uint32_t* a, const uint32_t* b, int64_t kd, const char* ahead, int64_t ahead_bytes,
                 const MatrixTile& tile, const MatrixTile* before) {
  if (tile.mr > kTileRows)
    products<Products, true>(a, b, kd, ahead, ahead_bytes, tile, before);
  else
    products<Products, false>(a, b, kd, ahead, ahead_bytes, tile, before);
}

void turn_lists(const SparsePanel& lists, uint32_t* tiles) {
  const uint32_t* from = lists.weights;
  const auto list = [&](int64_t count, int64_t width) {
    for (int64_t e = 0; e < count; e += kMatrixDwords, from += kMatrixDwords * width)
      for (int64_t half = 0; half < width; half += kHalfPanel, tiles += kHalfPanel * kMatrixDwords) {
        vf r[kWidth];
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i)
          r[i] = e + i < count ? vload(reinterpret_cast<const float*>(from + i * width + half)) : vset(0.0f);
        transpose_lanes(r);
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) vstore(reinterpret_cast<float*>(tiles + i * kMatrixDwords), r[i]);
      }
    from += (count - (count + kMatrixDwords - 1) / kMatrixDwords * kMatrixDwords) * width;
  };
  list(lists.both, kPanel), list(lists.half[0], kHalfPanel), list(lists.half[1], kHalfPanel);
}

// The listed dwords of up to 16 entries, for kTwo x 16 rows of X: [16][kMatrixRows].
template <bool kTwo>
BK_INLINE void gather(const uint32_t* a, const uint32_t* index, int64_t count, uint32_t* out) {
  const auto take = [&](int64_t i, uint32_t dword) {
    const int32_t* const from = reinterpret_cast<const int32_t*>(a + int64_t{dword} * kMatrixRows);
    int32_t* const to = reinterpret_cast<int32_t*>(out + i * kMatrixRows);
    vstorei(to, vloadi(from));
    if (kTwo) vstorei(to + kWidth, vloadi(from + kWidth));
  };
  if (count >= kMatrixDwords) {
#pragma GCC unroll 16
    for (int64_t i = 0; i < kMatrixDwords; ++i) take(i, index[i]);
    return;
  }
  for (int64_t i = 0; i < count; ++i) take(i, index[i]);
  for (int64_t i = count; i < kMatrixDwords; ++i) take(i, index[0]);  // times zero
}

// Goes through the entries of a panel's lists, 16 at a time.
struct ListCursor {
  const uint32_t* index;
  const int64_t counts[3];
  int which = -1;  // of the lists: both, half[0], half[1]; 3 at the end
  int64_t left = 0;

  explicit ListCursor(const SparsePanel& lists) : index(lists.index), counts{lists.both, lists.half[0], lists.half[1]} {
    next();
  }
  inline void next() {
    index += left < kMatrixDwords ? left : kMatrixDwords, left -= kMatrixDwords;
    while (left <= 0 && ++which < 3) left = counts[which];
  }
};

// A tile cannot be loaded from lines that are still on their way to the cache: they are gathered so many steps before.
constexpr int64_t kGatheredAhead = 3, kGathered = 4;

template <bool kTwo>
BK_INLINE void sparse_products(const uint32_t* a, const SparseMatrixPanel& b, const char* ahead, int64_t ahead_bytes,
                               const MatrixTile& tile, const MatrixTile* before) {
  constexpr int64_t kTile = kHalfPanel * kMatrixDwords;
  alignas(64) uint32_t gathered[kGathered][kMatrixDwords * kMatrixRows];
  Ahead meanwhile(ahead, ahead_bytes, tile, list_tile_dwords(b.lists) / kTile);
  BK_TILE_ZERO(0);
  BK_TILE_ZERO(1);
  BK_TILE_ZERO(2);
  BK_TILE_ZERO(3);
  ListCursor coming(b.lists), now(b.lists);
  int64_t taken = 0;
  const auto gather_next = [&] {
    if (coming.which > 2) return;
    gather<kTwo>(a, coming.index, coming.left, gathered[taken++ % kGathered]);
    coming.next();
  };
  for (int64_t i = 0; i < kGatheredAhead; ++i) gather_next();
  Remaining<Dot_vnni> remaining(before);
  const uint32_t* w = b.tiles;
  for (int64_t i = 0; now.which < 3; ++i, now.next()) {
    meanwhile.some();
    gather_next();
    const uint32_t* const x = gathered[i % kGathered];
    BK_TILE_LOAD(6, x, kMatrixRows * 4);
    if (kTwo) BK_TILE_LOAD(7, x + kTileRows, kMatrixRows * 4);
    if (now.which < 2) {
      BK_TILE_LOAD(4, w, kTileBytes);
      Lists::step0();
      if (kTwo) Lists::step1();
      w += kTile;
    }
    if (now.which != 1) {
      BK_TILE_LOAD(5, w, kTileBytes);
      Lists::step2();
      if (kTwo) Lists::step3();
      w += kTile;
    }
    remaining.some();
  }
  remaining.all();
  uint32_t* const sums = tile.sums;
  BK_TILE_STORE(0, sums, kPanel * 4);
  BK_TILE_STORE(2, sums + kHalfPanel * kPanel, kPanel * 4);
  if (kTwo) {
    BK_TILE_STORE(1, sums + kHalfPanel, kPanel * 4);
    BK_TILE_STORE(3, sums + kHalfPanel * kPanel + kHalfPanel, kPanel * 4);
  }
}

void sparse_matrix_tile(const uint32_t* a, const SparseMatrixPanel& b, const char* ahead, int64_t ahead_bytes,
                        const MatrixTile& tile, const MatrixTile* before) {
  if (tile.mr > kTileRows)
    sparse_products<true>(a, b, ahead, ahead_bytes, tile, before);
  else
    sparse_products<false>(a, b, ahead, ahead_bytes, tile, before);
}

template <class Products>
void finish_tile(const MatrixTile& tile) {
  Remaining<typename Products::Dot>(&tile).all();
}

}  // namespace

extern const MatrixKernels matrix_s8_amx, matrix_bf16_amx;
const MatrixKernels matrix_s8_amx = {&begin_tiles, &end_tiles,          &matrix_tile<Dense_s8>,
                                     &turn_lists,  &sparse_matrix_tile, &finish_tile<Dense_s8>};
const MatrixKernels matrix_bf16_amx = {&begin_tiles, &end_tiles, &matrix_tile<Dense_bf16>,
                                       nullptr,      nullptr,    &finish_tile<Dense_bf16>};

}  // namespace bertkern::cpu
