// The tokens of a padded batch: found once, packed without the padding, and padded once at the end.
#pragma once

#include <optional>
#include <vector>

#include "cpu/attention/attention.h"
#include "cpu/check.h"

namespace bertkern::ops {

struct Packing {
  std::vector<cpu::Sequence> sequences;
  std::vector<int64_t> source;     // row of x of each packed token
  std::vector<int32_t> positions;  // in its sequence
  bool consecutive = true;
  std::vector<int64_t> even;     // the sequences without a token that attend evenly
  std::vector<float> even_bias;  // of those
  int64_t tokens() const { return static_cast<int64_t>(source.size()); }
};

// Which masked positions are computed beside the tokens.
enum class Masked { none, up_to_last, all };

// Keys first. The masked positions before a sequence's last token follow as queries only, because poolers read the
// first position of a left-padded sequence; those after it only where all are computed. A sequence without a token
// keeps all its positions, but where none are: they attend to nothing, or evenly to all of them where empty_attends.
// mask: [B, L] of bool, an integer or a float, nonzero = token; checked here.
Packing pack_tokens(const char* op, const std::optional<Tensor>& mask, int64_t batch, int64_t length, Masked masked,
                    bool empty_attends);
// Gives the sequences of `even` their bias, of so many heads.
void attend_evenly(Packing& packing, int64_t heads, int64_t length);
// Makes one list of sequences for each layer, with the factors of its heads from head_mask [1 or B, heads of all
// layers], the first layer's first. The result owns them.
Tensor mask_heads(const char* op, Packing& packing, const Tensor& head_mask, const std::vector<int64_t>& heads);

// Packed rows in fp32 from x [B, L, H].
void load_tokens(const Packing& packing, const Tensor& x, float* rows);

// What an encoder gives back, of x's dtype: [B, L, H] with zeros where nothing was computed, or the packed rows
// [tokens, H], of the last layer or [layers, ...] of all.
class States {
 public:
  States(const Packing& packing, const Tensor& x, int64_t layers, bool all, bool packed);
  const Tensor& tensor() const { return out_; }
  // An encoder's layer_done, whose context is a States.
  static void store(void* context, int64_t layer, const float* rows);

 private:
  const Packing& packing_;
  Tensor out_;
  int64_t hidden_, layers_, layer_bytes_;
  cpu::Dtype dtype_;
  bool all_, packed_;
};

}  // namespace bertkern::ops
