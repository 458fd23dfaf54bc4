// A packed linear layer (the uint8 tensor that the operators call `packed`) and the loops over its tiles.
//
//   bytes 0..63   LinearHeader
//   weights       weight_dwords dwords; dense: panels x KD x 32 (gemm.h); ordered: lists [panels x 32 / kListed]
//   index         `entries` dwords of K, padded to 4 bytes: uint32 (panels), uint16 (tokens, ordered)
//   table         PanelEntry [panels], OrderedEntry [panels x 32 / kListed + 1] (ordered, dense and panels),
//                 uint32 [1 + panels * blocks * 32 / R] (tokens): 0, then where the parts of lists end; for every
//                 kTokenPanels panels [blocks of K][panels][32 / R], as weights and index lie, too
//   init          int32 [Np]   s8 with one zero point for all rows only: -input_zero * sum_k W[n, k],
//                              Np = N rounded up to 32
//   column_sum    int32 [Np]   s8 only: sum_k W[n, k]
//   scale         fp32  [Np]   s8 only: the weight's scale
//   bias          fp32  [Np]
//
// Group-wise weights (Layout::grouped), whose kind is that of the activations:
//
//   bytes 0..63   LinearHeader; entries = G, the groups along K (1: groups along N)
//   weights       planes of every panel (gemm.h), one after the other: runs of groups with equal bits, in whole blocks
//   table         GroupHeader, Group [G], GroupedPanel [panels + 1]
//   init          as above, of centred codes; groups along K: fp32 [Np], -input_zero * sum_g scale S
//   column_sum    s8: int32 [Np]; groups along K: fp32 [Np], sum_g scale[g, n] * (sum of the group's codes)
//   bias          fp32 [Np]
//   scale         fp32 [panels][G][32]
//   zero          fp32 [panels][G][32]: zero point - 2^(bits - 1); s8 with groups along K: -scale times that
//   column        uint32 [Np], permuted only: which column of Y an output is; features of equal bits stand together
//
// The s8 operand of groups along K has every group begin with a dword of its own, and every run of groups with equal
// bits with a block of its own; elsewhere K is as in the dense layout.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/gemm/gemm.h"
#include "cpu/rowwise/rowwise.h"

namespace bertkern::cpu {

constexpr uint32_t kLinearMagic = 0x314b4c42;  // "BLK1"
constexpr int32_t kSignedZero = 128;           // zero point of signed codes stored as u8
constexpr int32_t kOwnZero = 0;                // beside an input_scale of 0: a zero point per row
constexpr int64_t kSparseDwords = 65536;       // of K that sparse weights can list: uint16 tells them apart

enum class Layout : int32_t { dense = 0, panels = 1, tokens = 2, grouped = 3 };

struct PanelEntry {
  uint32_t index, weights;  // where the panel's begin; weights in half panels
  uint32_t both, half[2];
};

struct OrderedEntry {
  uint32_t before;  // dwords in the lists before this one
  uint16_t fours, wide;
};

struct GroupHeader {
  int64_t group_size;
  int64_t code_dwords;  // of K in a decoded panel: whole blocks
};

struct GroupedPanel {
  uint32_t begin, bits;  // where the panel's planes begin, in 64 bytes; bits of groups along N
};

struct LinearHeader {
  uint32_t magic;
  int32_t kind;
  int64_t n, k;
  float input_scale;   // 0: a scale per row
  int32_t input_zero;  // of the codes as u8; kOwnZero: per row
  float output_scale;  // 0: the output is not fake-quantized
  int32_t has_bias;
  int16_t layout;
  int16_t features;  // R of tokens; ordered lists: kListed; grouped: 1 for groups along K, plus 2 where outputs
                     // are permuted
  uint32_t check;    // of the other fields: sparse tables are read by them, and no size would tell a wrong K
  int64_t entries;   // of the index
  int64_t weight_dwords;
};
static_assert(sizeof(LinearHeader) == 64, "the packed weights start at a cache line");

struct Linear {
  WeightKind kind;
  Layout layout;
  int64_t n, k, kd, panels;
  int64_t features;  // R of tokens
  int64_t ordered;   // kListed, where dense weights or panels lie in ordered lists; else 0
  const uint32_t* weights;
  int64_t weight_dwords;
  const void* index;
  const void* table;
  const int32_t* init;  // null: rows have zero points of their own
  const int32_t* column_sum;
  const float* scale;
  const float* bias;
  float input_scale;
  int32_t input_zero;
  float output_scale;
  bool has_bias;
  // Layout::grouped
  int64_t groups = 0;  // along K; 1: along N
  bool along_k = false;
  int64_t group_size = 0, code_dwords = 0;
  const Group* group = nullptr;
  const GroupedPanel* grouped_panel = nullptr;
  const float* zero = nullptr;
  const uint32_t* column = nullptr;  // null: outputs stand in order
};

// Whether rows bring the sums of their codes, and whether sums of products change scale along K.
inline bool sums_of_rows(const Linear& linear) {
  return linear.layout == Layout::grouped && linear.kind == WeightKind::s8;
}
inline bool scaled_along_k(const Linear& linear) { return sums_of_rows(linear) && linear.along_k; }
// Whether all tiles take lists that the weights were packed with.
inline bool in_lists(const Linear& linear) { return linear.ordered > 0 && tile_kernels(linear.kind).ordered > 0; }

int64_t dword_count(WeightKind kind, int64_t k);
int64_t dense_dwords(WeightKind kind, int64_t n, int64_t k);  // weight_dwords of Layout::dense
int64_t packed_bytes(const LinearHeader& header);
// Whether the packed form holds `init`.
inline bool has_init(const LinearHeader& header) {
  return static_cast<WeightKind>(header.kind) == WeightKind::s8 && header.input_zero != kOwnZero;
}
void write_header(const LinearHeader& header, void* out);

// Reads the header; `bytes` is checked against it. Returns false where this is no packed linear.
bool view_linear(const void* data, int64_t bytes, Linear& linear);

// Panel `panel` of a dense weight [n, k], fp32 or bf16 as `kind` says or int8 codes: dwords [kd][32].
void fill_panel(const LinearHeader& header, const void* weight, int64_t panel, uint32_t* dwords);

// Lists of all panels, as the packed form has them.
class OrderedWeights {
 public:
  // panel: [kd][32], in order of N. `sparse`: what is zero in all features of a list is not listed.
  void add(const uint32_t* panel, int64_t kd, bool sparse);
  // Fills in features, entries and weight_dwords.
  void measure(LinearHeader& header) const;
  void write(void* weights, void* index, void* table) const;

 private:
  std::vector<uint32_t> weights_;
  std::vector<uint16_t> index_;
  std::vector<OrderedEntry> table_;
};
bool takes_order(const LinearHeader& header);                                  // whether the tiles of the active ISA do
OrderedWeights order_weights(const LinearHeader& header, const void* weight);  // a dense one

// weight as in `fill_panel`, codes with `scale` [n] ([1] where scale_count == 1); ordered: null, or of order_weights.
void pack_linear(const LinearHeader& header, const void* weight, const OrderedWeights* ordered, const float* scale,
                 int64_t scale_count, const float* bias, void* out);

OrderedList ordered_list(const Linear& linear, int64_t list);  // of all lists of all panels
PanelOrder panel_order(const Linear& linear, int64_t panel);
void restore_panel(const Linear& linear, int64_t panel, uint32_t* dwords);  // as it was, [kd][32]
// Of a decoded panel [kd][32], whose centred codes are below 2^(bits - 1), up to kOrderedBits: all dwords in one part.
constexpr int kOrderedBits = 7;
PanelOrder order_of_bits(int bits, const uint32_t* panel, int64_t kd, int64_t ordered);

// At once over the weights of Layout::tokens; measured: groups of rows, and so many panels that the way of a block's
// rows into the L1 is worth it.
constexpr int64_t kTokenGroups = 4, kTokenPanels = 8;

// Sparse weights, from stored blocks of `rows` x `columns` values (or codes): block row i of W holds the blocks
// [crow[i], crow[i + 1]), at block columns col[...]. What lies outside [n, k] is left out.
struct Blocks {
  const int32_t* crow;
  const int32_t* col;
  const void* values;
  int64_t rows, columns;
};
OrderedWeights order_blocks(const LinearHeader& header, const Blocks& blocks);
// Fills in entries and weight_dwords, and chooses nothing: layout and features are the caller's.
void measure_sparse(LinearHeader& header, const Blocks& blocks);
// ordered: null, or of order_blocks.
void pack_sparse(const LinearHeader& header, const Blocks& blocks, const OrderedWeights* ordered, const float* scale,
                 int64_t scale_count, const float* bias, void* out);

// Group-wise weights in their canonical form (bertkern/formats/groupwise.py), checked by the caller.
struct GroupwiseWeight {
  const uint8_t* codes;  // bit streams of the rows
  const float* scale;
  const float* zero;  // null: 2^(bits - 1)
  const uint8_t* bits;
  int64_t group_size;
  bool along_k, shared;  // shared: one row of scales for all features
  int64_t groups(int64_t n, int64_t k) const { return ((along_k ? k : n) + group_size - 1) / group_size; }
  int bits_at(int64_t feature, int64_t j) const { return bits[(along_k ? j : feature) / group_size]; }
};
int64_t groupwise_code_bytes(const GroupwiseWeight& weight, int64_t n, int64_t k);
// Fills in layout, entries and weight_dwords.
void measure_groupwise(LinearHeader& header, const GroupwiseWeight& weight);
void pack_groupwise(const LinearHeader& header, const GroupwiseWeight& weight, const float* bias, void* out);
// The bit streams again; `weight` has what else belongs to them.
void unpack_groupwise(const Linear& linear, const GroupwiseWeight& weight, uint8_t* codes);
void dequantize_groupwise(const Linear& linear, float* weight);  // [n, k]
bool view_groupwise(const void* data, int64_t bytes, const LinearHeader& header, Linear& linear);
int64_t groupwise_bytes(const LinearHeader& header);  // all but the header and the weights
// Bits of the panel's planes where tiles read them straight, else 0.
int narrow_bits(const Linear& linear, int64_t panel);
// The codes of a panel, [code_dwords][32], or its weights as the dense panel of the kind.
const uint32_t* decoded_panel(const Linear& linear, int64_t panel);
// `init` for activations of another zero point than the packed one: 4 bytes an output.
void init_of(const Linear& linear, int64_t zero_point, void* out);

// The canonical tensors again: weight [n, k] of the kind's dtype, scale [n] (s8), bias [n].
void unpack_linear(const Linear& linear, void* weight, float* scale, float* bias);

// The left operand: rows in groups of at most `group_rows` rows; a group lies as [KD][planes][pitch] dwords (gemm.h; 8
// where that is all that a tile takes, so that its lines stay in the L1) and is cut into tiles. Groups of one row lie
// as [KD][planes], unless lanes are rows.
//
// For a matrix unit a group of up to kMatrixRows rows lies as gemm.h says and is one tile.
constexpr int64_t kGroupPitch = 16, kNarrowPitch = 8;
static_assert(kGroupPitch == kTokens, "one packed form for both");
constexpr int64_t kGroupPad = 16;  // dwords after a group: groups that are read together lie in different cache sets

struct Rows {
  int64_t rows, groups, kd, planes, pitch;
  bool matrix;  // for a matrix unit; `pitch` is kMatrixRows
  bool lists;   // whose operand is gathered by lists of dwords
  uint32_t* data;
  float* scale;    // per row (s8)
  float* sum;      // [groups along K][rows]: of codes less their zero point (s8, Layout::grouped)
  int32_t zero;    // of the codes
  int32_t* zeros;  // of each row's codes, where rows have ranges of their own; else null
  int32_t zero_of(int64_t row) const { return zeros ? zeros[row] : zero; }
  // Ready codes have one zero point.
  int64_t begin(int64_t group) const {
    const auto even = [&](int64_t count) {
      return group * (count / groups) + (group < count % groups ? group : count % groups);
    };
    if (!matrix) return even(rows);
    const int64_t whole = even((rows + 15) / 16) * 16;  // the unit takes 16 rows at a time
    return whole < rows ? whole : rows;
  }
  int64_t group_dwords() const { return (matrix && !lists ? (kd + 15) / 16 * 16 : kd * planes) * pitch + kGroupPad; }
  uint32_t* group_data(int64_t group) const { return data + group * group_dwords(); }
};

// Same operand for two layers?
bool same_operand(const Linear& a, const Linear& b);
// `multiple`: of it is the number of groups, where there are enough rows; so many threads pack and norm groups.
int64_t rows_dwords(const Linear& linear, int64_t rows, int64_t multiple = 1);  // scratch of `data`
Rows make_rows(const Linear& linear, int64_t rows, uint32_t* data, float* scale, int64_t multiple = 1);

// Converts (fp32 -> the kind's operand) and packs one group. x: fp32 rows, `pitch` floats apart.
void pack_group(const Linear& linear, const Rows& rows, int64_t group, const float* x, int64_t pitch);
// pack_group for ready codes: u8 with xor_mask 0, s8 with 0x80.
void pack_code_group(const Linear& linear, const Rows& rows, int64_t group, const uint8_t* codes, uint8_t xor_mask);

// Weights that lie in one piece, to be fetched ahead, and for Layout::panels their index.
struct Piece {
  const uint32_t* data = nullptr;
  int64_t bytes = 0;
  const void* index = nullptr;
  int64_t index_bytes = 0;
};
Piece panel_weights(const Linear& linear, int64_t panel);
SparsePanel sparse_panel(const Linear& linear, int64_t panel);  // of Layout::panels that are not ordered
// Of Layout::tokens: blocks of K; the parts of a panel's lists that lie in one of them.
int64_t token_blocks(const Linear& linear);
TokenPanel token_panel(const Linear& linear, int64_t panel, int64_t block);

struct Output {
  Activation activation = Activation::none;
  const float* residual = nullptr;  // row 0
  int64_t residual_pitch = 0;
  void* out = nullptr;  // row 0
  int64_t out_pitch = 0;
  Dtype dtype = Dtype::f32;
  float code_step = 0;  // of s8 and u8
  int32_t code_zero = 0;
  Piece after;  // the panel that this thread will need next, if known
};

// Groups [g0, g1) x panels [p0, p1). init: null for the layer's own.
void gemm(const Linear& linear, const Rows& rows, int64_t g0, int64_t g1, int64_t p0, int64_t p1, const Output& output,
          const int32_t* init = nullptr);

}  // namespace bertkern::cpu
