// The packed form of a linear layer: its sizes, and how it is written and read.
#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "cpu/gemm/linear.h"

namespace bertkern::cpu {

namespace {

int64_t values_per_dword(WeightKind kind) { return kind == WeightKind::s8 ? 4 : kind == WeightKind::bf16 ? 2 : 1; }
int64_t value_bytes(WeightKind kind) { return 4 / values_per_dword(kind); }
int64_t padded(int64_t n) { return (n + kPanel - 1) / kPanel * kPanel; }

uint32_t check_of(const LinearHeader& header) {  // FNV-1a over words
  LinearHeader h = header;
  h.check = 0;
  uint32_t words[sizeof h / 4], sum = 2166136261u;
  std::memcpy(words, &h, sizeof h);
  for (const uint32_t word : words) sum = (sum ^ word) * 16777619u;
  return sum;
}

}  // namespace

void write_header(const LinearHeader& header, void* out) {
  LinearHeader h = header;
  h.check = check_of(header);
  std::memcpy(out, &h, sizeof h);
}

namespace {

int64_t token_blocks(int64_t kd, int64_t features) {
  const int64_t block = token_block(features);
  return std::max<int64_t>(1, (kd + block - 1) / block);
}

// Bytes of the index and of the table.
bool is_ordered(const LinearHeader& h) { return (h.layout == 0 || h.layout == 1) && h.features > 0; }
int64_t index_bytes(const LinearHeader& h) {
  return h.layout == 1 && !is_ordered(h) ? h.entries * 4 : (h.entries + 1) / 2 * 4;
}
int64_t table_bytes(const LinearHeader& h, int64_t panels) {
  if (is_ordered(h)) return (panels * (kPanel / h.features) + 1) * static_cast<int64_t>(sizeof(OrderedEntry));
  if (h.layout == 0) return 0;
  if (h.layout == 1) return panels * static_cast<int64_t>(sizeof(PanelEntry));
  const int64_t kd = dword_count(static_cast<WeightKind>(h.kind), h.k);
  return (panels * kPanel / h.features * token_blocks(kd, h.features) + 1) * 4;
}

}  // namespace

int64_t dword_count(WeightKind kind, int64_t k) {
  const int64_t values = values_per_dword(kind);
  return (k + values - 1) / values;
}

int64_t dense_dwords(WeightKind kind, int64_t n, int64_t k) { return padded(n) * dword_count(kind, k); }

int64_t packed_bytes(const LinearHeader& h) {
  if (h.layout == static_cast<int16_t>(Layout::grouped))
    return static_cast<int64_t>(sizeof h) + h.weight_dwords * 4 + groupwise_bytes(h);
  const WeightKind kind = static_cast<WeightKind>(h.kind);
  const int64_t np = padded(h.n), vectors = (kind == WeightKind::s8 ? 3 : 1) + has_init(h);
  return static_cast<int64_t>(sizeof h) + h.weight_dwords * 4 + index_bytes(h) + table_bytes(h, np / kPanel) +
         vectors * np * 4;
}

int64_t token_blocks(const Linear& linear) { return token_blocks(linear.kd, linear.features); }

namespace {

// Of Layout::tokens: lists of a panel; where parts of lists end, a 0 before.
int64_t lists_of(const Linear& linear) { return kPanel / linear.features; }
const uint32_t* token_ends(const Linear& linear) { return static_cast<const uint32_t*>(linear.table); }

// Whether the table's last numbers are the header's.
bool table_ends(const Linear& linear, int64_t entries, int64_t dwords) {
  if (linear.panels == 0) return entries == 0 && dwords == 0;
  if (linear.ordered) {
    const int64_t lists = linear.panels * (kPanel / linear.ordered);
    const OrderedList last = ordered_list(linear, lists - 1);
    return last.fours % 2 == 0 && last.fours + last.wide <= last.count &&
           last.index + last.count == static_cast<const uint16_t*>(linear.index) + entries;
  }
  if (linear.layout == Layout::dense) return true;
  if (linear.layout == Layout::panels) {
    const PanelEntry& e = static_cast<const PanelEntry*>(linear.table)[linear.panels - 1];
    const int64_t halves = int64_t{e.half[0]} + e.half[1];
    return int64_t{e.index} + e.both + halves == entries &&
           (int64_t{e.weights} + 2 * int64_t{e.both} + halves) * kHalfPanel == dwords;
  }
  return token_ends(linear)[linear.panels * lists_of(linear) * token_blocks(linear)] == entries;
}

}  // namespace

bool view_linear(const void* data, int64_t bytes, Linear& linear) {
  LinearHeader header;
  // A slice of other bytes may lie anywhere; what pack_* made is aligned to 64.
  if (bytes < static_cast<int64_t>(sizeof header) || reinterpret_cast<uintptr_t>(data) % alignof(LinearHeader))
    return false;
  std::memcpy(&header, data, sizeof header);
  if (header.magic != kLinearMagic || header.check != check_of(header) || header.kind < 0 || header.kind > 2)
    return false;
  if (header.n < 0 || header.k < 0 || header.n > (int64_t{1} << 31) || header.k > (int64_t{1} << 31)) return false;
  const int64_t entries = header.entries, dwords = header.weight_dwords, features = header.features;
  if (entries < 0 || entries > bytes || dwords < 0 || dwords > bytes) return false;  // below, nothing overflows
  if (header.layout == static_cast<int16_t>(Layout::grouped)) return view_groupwise(data, bytes, header, linear);
  const WeightKind kind = static_cast<WeightKind>(header.kind);
  const int64_t np = padded(header.n), kd = dword_count(kind, header.k);
  const bool known =
      is_ordered(header)   ? kind == WeightKind::s8 && features == kListed && kd <= kMostOrdered &&
                                 dwords == entries * features && (header.layout == 1 || dwords == np * kd)
      : header.layout == 0 ? features == 0 && dwords == np * kd && entries == 0
      : header.layout == 1
          ? features == 0 && dwords >= entries * kHalfPanel && dwords <= entries * kPanel
          : header.layout == 2 && (features == 1 || features == 2 || features == 4) && dwords == entries * features;
  if (!known || (header.layout && kd > kSparseDwords) || bytes != packed_bytes(header)) return false;
  linear.kind = kind, linear.layout = static_cast<Layout>(header.layout);
  linear.features = linear.layout == Layout::tokens ? features : 0;
  linear.ordered = is_ordered(header) ? features : 0;
  linear.n = header.n, linear.k = header.k, linear.kd = kd, linear.panels = np / kPanel;
  linear.weights = reinterpret_cast<const uint32_t*>(static_cast<const char*>(data) + sizeof header);
  linear.weight_dwords = header.weight_dwords;
  linear.index = linear.weights + header.weight_dwords;
  linear.table = static_cast<const char*>(linear.index) + index_bytes(header);
  const uint32_t* tail =
      reinterpret_cast<const uint32_t*>(static_cast<const char*>(linear.table) + table_bytes(header, np / kPanel));
  linear.init = linear.column_sum = nullptr;
  linear.scale = nullptr;
  if (has_init(header)) linear.init = reinterpret_cast<const int32_t*>(tail), tail += np;
  if (kind == WeightKind::s8) {
    linear.column_sum = reinterpret_cast<const int32_t*>(tail);
    linear.scale = reinterpret_cast<const float*>(linear.column_sum + np);
    tail += 2 * np;
  }
  linear.bias = reinterpret_cast<const float*>(tail);
  linear.input_scale = header.input_scale, linear.input_zero = header.input_zero;
  linear.output_scale = header.output_scale, linear.has_bias = header.has_bias != 0;
  return table_ends(linear, entries, dwords);
}

namespace {

// What stands after the weights: init, column sums, scales, bias. `sums`: of each row of int8 weights.
void write_vectors(const LinearHeader& header, const int32_t* sums, const float* scale, int64_t scale_count,
                   const float* bias, char* tail) {
  const int64_t n = header.n, np = padded(n);
  if (static_cast<WeightKind>(header.kind) == WeightKind::s8) {
    if (has_init(header)) {
      int32_t* init = reinterpret_cast<int32_t*>(tail);
      for (int64_t i = 0; i < n; ++i) init[i] = -header.input_zero * sums[i];
      tail += np * 4;
    }
    int32_t* column_sum = reinterpret_cast<int32_t*>(tail);
    float* scales = reinterpret_cast<float*>(column_sum + np);
    for (int64_t i = 0; i < n; ++i) {
      column_sum[i] = sums[i];
      scales[i] = scale[scale_count == 1 ? 0 : i];
    }
    tail += 2 * np * 4;
  }
  if (bias && n) std::memcpy(tail, bias, static_cast<size_t>(n) * 4);
}

}  // namespace

void fill_panel(const LinearHeader& header, const void* weight, int64_t panel, uint32_t* dwords) {
  const WeightKind kind = static_cast<WeightKind>(header.kind);
  const int64_t k = header.k, kd = dword_count(kind, k), bytes = value_bytes(kind), per_dword = values_per_dword(kind);
  std::fill_n(dwords, kd * kPanel, 0u);
  for (int64_t f = 0; f < std::min(kPanel, header.n - panel * kPanel); ++f) {
    const char* row = static_cast<const char*>(weight) + (panel * kPanel + f) * k * bytes;
    for (int64_t d = 0; d < kd; ++d)
      std::memcpy(dwords + d * kPanel + f, row + d * 4,
                  static_cast<size_t>(std::min(per_dword, k - d * per_dword) * bytes));
  }
}

void pack_linear(const LinearHeader& header, const void* weight, const OrderedWeights* ordered, const float* scale,
                 int64_t scale_count, const float* bias, void* out) {
  const WeightKind kind = static_cast<WeightKind>(header.kind);
  const int64_t n = header.n, k = header.k, kd = dword_count(kind, k), panels = padded(n) / kPanel;
  std::memset(out, 0, static_cast<size_t>(packed_bytes(header)));
  write_header(header, out);
  char* const weights = static_cast<char*>(out) + sizeof header;
  char* const index = weights + header.weight_dwords * 4;
  char* const table = index + index_bytes(header);
  if (ordered) {
    ordered->write(weights, index, table);
  } else {
    for (int64_t p = 0; p < panels; ++p)
      fill_panel(header, weight, p, reinterpret_cast<uint32_t*>(weights) + p * kd * kPanel);
  }
  std::vector<int32_t> sums;
  if (kind == WeightKind::s8)
    for (int64_t i = 0; i < n; ++i) {
      const int8_t* row = static_cast<const int8_t*>(weight) + i * k;
      sums.push_back(std::accumulate(row, row + k, int32_t{0}));
    }
  write_vectors(header, sums.data(), scale, scale_count, bias, table + table_bytes(header, panels));
}

namespace {

// One panel of sparse weights as dense dwords [KD][32], and what of it is listed.
class Panel {
 public:
  Panel(const LinearHeader& header, const Blocks& blocks)
      : header_(header),
        blocks_(blocks),
        kind_(static_cast<WeightKind>(header.kind)),
        kd_(dword_count(kind_, header.k)),
        dwords_(static_cast<size_t>(kd_ * kPanel)) {}

  void fill(int64_t panel) {
    std::fill(dwords_.begin(), dwords_.end(), 0u);
    const int64_t bytes = value_bytes(kind_), first = panel * kPanel, last = std::min(header_.n, first + kPanel);
    const int64_t rows = blocks_.rows, columns = blocks_.columns;
    char* const to = reinterpret_cast<char*>(dwords_.data());
    for (int64_t n = first; n < last; ++n) {
      const int64_t i = n / rows;
      for (int64_t b = blocks_.crow[i]; b < blocks_.crow[i + 1]; ++b) {
        const char* values = static_cast<const char*>(blocks_.values) + (b * rows + n % rows) * columns * bytes;
        const int64_t k0 = blocks_.col[b] * columns, count = std::min(columns, header_.k - k0);
        for (int64_t c = 0; c < count; ++c) {
          const int64_t at = (k0 + c) * bytes;
          std::memcpy(to + (at / 4 * kPanel + n - first) * 4 + at % 4, values + c * bytes, static_cast<size_t>(bytes));
        }
      }
    }
  }

  // Whether any of `count` features from `feature` on has a nonzero in dword `d`. A stored negative zero counts, so its
  // sign stays.
  bool any(int64_t d, int64_t feature, int64_t count) const {
    const uint32_t* row = dwords_.data() + d * kPanel + feature;
    for (int64_t f = 0; f < count; ++f)
      if (row[f]) return true;
    return false;
  }

  const uint32_t* row(int64_t d) const { return dwords_.data() + d * kPanel; }
  int64_t kd() const { return kd_; }

  int32_t sum(int64_t feature) const {  // of int8 codes
    int32_t sum = 0;
    for (int64_t d = 0; d < kd_; ++d)
      for (int64_t i = 0; i < 4; ++i) sum += static_cast<int8_t>(row(d)[feature] >> (8 * i) & 255u);
    return sum;
  }

 private:
  const LinearHeader& header_;
  const Blocks& blocks_;
  const WeightKind kind_;
  const int64_t kd_;
  std::vector<uint32_t> dwords_;
};

}  // namespace

OrderedWeights order_blocks(const LinearHeader& header, const Blocks& blocks) {
  OrderedWeights ordered;
  Panel panel(header, blocks);
  for (int64_t p = 0; p < padded(header.n) / kPanel; ++p) {
    panel.fill(p);
    ordered.add(panel.row(0), panel.kd(), true);
  }
  return ordered;
}

void measure_sparse(LinearHeader& header, const Blocks& blocks) {
  header.entries = header.weight_dwords = 0;
  Panel panel(header, blocks);
  for (int64_t p = 0; p < padded(header.n) / kPanel; ++p) {
    panel.fill(p);
    for (int64_t d = 0; d < panel.kd(); ++d) {
      if (static_cast<Layout>(header.layout) == Layout::panels) {
        const int halves = panel.any(d, 0, kHalfPanel) + panel.any(d, kHalfPanel, kHalfPanel);
        header.entries += halves > 0;
        header.weight_dwords += halves * kHalfPanel;
      } else {
        for (int64_t f = 0; f < kPanel; f += header.features) header.entries += panel.any(d, f, header.features);
      }
    }
  }
  if (static_cast<Layout>(header.layout) == Layout::tokens) header.weight_dwords = header.entries * header.features;
}

namespace {

// Listed dwords, one after the other.
template <class Index>
class Entries {
 public:
  Entries(uint32_t* weights, void* index) : weights_(weights), index_(static_cast<Index*>(index)) {}
  void add(const Panel& panel, int64_t d, int64_t feature, int64_t features) {
    std::memcpy(weights_ + dwords_, panel.row(d) + feature, static_cast<size_t>(features) * 4);
    dwords_ += features;
    index_[count_++] = static_cast<Index>(d);
  }
  uint32_t count() const { return static_cast<uint32_t>(count_); }
  int64_t dwords() const { return dwords_; }

 private:
  uint32_t* const weights_;
  Index* const index_;
  int64_t count_ = 0, dwords_ = 0;
};

void list_panel(const Panel& panel, Entries<uint32_t>& entries, PanelEntry& e) {
  e.index = entries.count(), e.weights = static_cast<uint32_t>(entries.dwords() / kHalfPanel);
  uint32_t* const counts[] = {&e.both, &e.half[0], &e.half[1]};
  for (int which = 0; which < 3; ++which)
    for (int64_t d = 0; d < panel.kd(); ++d) {
      const bool left = panel.any(d, 0, kHalfPanel), right = panel.any(d, kHalfPanel, kHalfPanel);
      if (!(which == 0 ? left && right : which == 1 ? left && !right : right && !left)) continue;
      entries.add(panel, d, which == 2 ? kHalfPanel : 0, which == 0 ? kPanel : kHalfPanel);
      ++*counts[which];
    }
}

// In the order in which a product reads them; returns where the next panels' ends go.
uint32_t* list_tokens(const Panel* first, const Panel* last, int64_t features, Entries<uint16_t>& entries,
                      uint32_t* end) {
  const int64_t kd = first->kd(), block = token_block(features);
  for (int64_t i = 0; i < token_blocks(kd, features); ++i)
    for (const Panel* panel = first; panel < last; ++panel)
      for (int64_t f = 0; f < kPanel; f += features) {
        for (int64_t d = i * block; d < std::min(kd, (i + 1) * block); ++d)
          if (panel->any(d, f, features)) entries.add(*panel, d, f, features);
        *++end = entries.count();
      }
  return end;
}

}  // namespace

void pack_sparse(const LinearHeader& header, const Blocks& blocks, const OrderedWeights* ordered, const float* scale,
                 int64_t scale_count, const float* bias, void* out) {
  std::memset(out, 0, static_cast<size_t>(packed_bytes(header)));
  write_header(header, out);
  uint32_t* const weights = reinterpret_cast<uint32_t*>(static_cast<char*>(out) + sizeof header);
  char* const index = reinterpret_cast<char*>(weights + header.weight_dwords);
  char* const table = index + index_bytes(header);
  const int64_t panels = padded(header.n) / kPanel;
  const bool tokens = static_cast<Layout>(header.layout) == Layout::tokens;
  std::vector<Panel> filled(static_cast<size_t>(tokens ? std::min(panels, kTokenPanels) : 1), Panel(header, blocks));
  std::vector<int32_t> sums;
  Entries<uint32_t> by_panels(weights, index);
  Entries<uint16_t> by_tokens(weights, index);
  uint32_t* end = reinterpret_cast<uint32_t*>(table);
  const int64_t step = static_cast<int64_t>(filled.size());
  for (int64_t first = 0; first < panels; first += step) {
    const int64_t last = std::min(panels, first + step);
    for (int64_t p = first; p < last; ++p) {
      Panel& panel = filled[static_cast<size_t>(p - first)];
      panel.fill(p);
      if (static_cast<WeightKind>(header.kind) == WeightKind::s8)
        for (int64_t f = 0; f < std::min(kPanel, header.n - p * kPanel); ++f) sums.push_back(panel.sum(f));
    }
    if (ordered) continue;
    if (tokens)
      end = list_tokens(filled.data(), filled.data() + (last - first), header.features, by_tokens, end);
    else
      list_panel(filled[0], by_panels, reinterpret_cast<PanelEntry*>(table)[first]);
  }
  if (ordered) ordered->write(weights, index, table);
  write_vectors(header, sums.data(), scale, scale_count, bias, table + table_bytes(header, panels));
}

SparsePanel sparse_panel(const Linear& linear, int64_t panel) {
  const PanelEntry& e = static_cast<const PanelEntry*>(linear.table)[panel];
  return {static_cast<const uint32_t*>(linear.index) + e.index,
          linear.weights + e.weights * kHalfPanel,
          e.both,
          {e.half[0], e.half[1]}};
}

TokenPanel token_panel(const Linear& linear, int64_t panel, int64_t block) {
  const int64_t first = panel / kTokenPanels * kTokenPanels, together = std::min(kTokenPanels, linear.panels - first);
  const int64_t at = first * token_blocks(linear) + block * together + panel - first;
  return {token_ends(linear) + at * lists_of(linear), static_cast<const uint16_t*>(linear.index), linear.weights};
}

namespace {

Piece ordered_panel(const Linear& linear, int64_t panel) {
  const int64_t lists = kPanel / linear.ordered;
  const OrderedList first = ordered_list(linear, panel * lists), last = ordered_list(linear, (panel + 1) * lists - 1);
  const int64_t entries = last.index - first.index + last.count;
  return {first.weights, entries * linear.ordered * 4, first.index, entries * 2};
}

}  // namespace

Piece panel_weights(const Linear& linear, int64_t panel) {
  switch (linear.layout) {
    case Layout::grouped: {
      const int64_t begin = linear.grouped_panel[panel].begin, end = linear.grouped_panel[panel + 1].begin;
      return {linear.weights + begin * 16, (end - begin) * 64};
    }
    case Layout::panels: {
      if (linear.ordered) return ordered_panel(linear, panel);
      const SparsePanel b = sparse_panel(linear, panel);
      const int64_t halves = b.half[0] + b.half[1];
      return {b.weights, (b.both * kPanel + halves * kHalfPanel) * 4, b.index, (b.both + halves) * 4};
    }
    case Layout::tokens: {
      const TokenPanel b = token_panel(linear, panel, 0);
      const int64_t first = b.begin[0], last = b.begin[lists_of(linear)];
      return {b.weights + first * linear.features, (last - first) * linear.features * 4};
    }
    default:
      if (linear.ordered) return ordered_panel(linear, panel);
      return {linear.weights + panel * linear.kd * kPanel, linear.kd * kPanel * 4};
  }
}

namespace {

// Calls see(feature, dword of K, weight) for every dword that is stored.
template <class See>
void each_dword(const Linear& linear, See&& see) {
  std::vector<uint32_t> restored(linear.ordered ? static_cast<size_t>(linear.kd * kPanel) : 0);
  for (int64_t p = 0; p < linear.panels; ++p) {
    if (linear.layout == Layout::dense || linear.ordered) {
      const uint32_t* weights = panel_weights(linear, p).data;
      if (linear.ordered) restore_panel(linear, p, restored.data()), weights = restored.data();
      for (int64_t d = 0; d < linear.kd; ++d)
        for (int64_t f = 0; f < kPanel; ++f) see(p * kPanel + f, d, *weights++);
    } else if (linear.layout == Layout::panels) {
      const SparsePanel b = sparse_panel(linear, p);
      const uint32_t *index = b.index, *weights = b.weights;
      const int64_t counts[] = {b.both, b.half[0], b.half[1]};
      for (int which = 0; which < 3; ++which)
        for (int64_t i = 0; i < counts[which]; ++i, ++index)
          for (int64_t f = 0; f < (which ? kHalfPanel : kPanel); ++f)
            see(p * kPanel + (which == 2 ? kHalfPanel : 0) + f, *index, *weights++);
    } else {
      for (int64_t block = 0; block < token_blocks(linear); ++block) {
        const TokenPanel b = token_panel(linear, p, block);
        for (int64_t list = 0; list < lists_of(linear); ++list)
          for (int64_t e = b.begin[list]; e < b.begin[list + 1]; ++e)
            for (int64_t r = 0; r < linear.features; ++r)
              see(p * kPanel + list * linear.features + r, b.index[e], b.weights[e * linear.features + r]);
      }
    }
  }
}

}  // namespace

void unpack_linear(const Linear& linear, void* weight, float* scale, float* bias) {
  if (linear.n == 0) return;
  const int64_t bytes = value_bytes(linear.kind), per_dword = values_per_dword(linear.kind);
  if (linear.k > 0) std::memset(weight, 0, static_cast<size_t>(linear.n * linear.k * bytes));
  each_dword(linear, [&](int64_t n, int64_t d, uint32_t dword) {
    if (n < linear.n)
      std::memcpy(static_cast<char*>(weight) + n * linear.k * bytes + d * 4, &dword,
                  static_cast<size_t>(std::min(per_dword, linear.k - d * per_dword) * bytes));
  });
  if (linear.kind == WeightKind::s8) std::memcpy(scale, linear.scale, static_cast<size_t>(linear.n) * 4);
  std::memcpy(bias, linear.bias, static_cast<size_t>(linear.n) * 4);
}

}  // namespace bertkern::cpu
