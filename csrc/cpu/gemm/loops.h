// What the loops over tiles share: a panel as tiles take it, and what is left to do to their outputs.
#pragma once

#include "cpu/gemm/linear.h"

namespace bertkern::cpu {

// Panel as the tiles of dense weights take it: as it lies, or decoded or restored into memory of the thread's.
const uint32_t* dense_panel(const Linear& linear, int64_t panel);

// As gemm() in linear.h; start: what the sums of all features begin with.
void gemm_tiles(const Linear& linear, const Rows& rows, int64_t g0, int64_t g1, int64_t p0, int64_t p1,
                const Output& output, const void* start);
void gemm_tokens(const Linear& linear, const Rows& rows, int64_t g0, int64_t g1, int64_t p0, int64_t p1,
                 const Output& output, const void* start);  // Layout::tokens
void gemm_matrix(const Linear& linear, const Rows& rows, int64_t g0, int64_t g1, int64_t p0, int64_t p1,
                 const Output& output, const void* start);  // rows that lie for a matrix unit

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

}  // namespace bertkern::cpu
