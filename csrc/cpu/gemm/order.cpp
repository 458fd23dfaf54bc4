// Which dwords of K are summed together in 16 bits, and what is taken off weights where they go beyond (gemm.h).
#include <algorithm>
#include <array>
#include <cstring>
#include <numeric>

#include "cpu/gemm/linear.h"

namespace bertkern::cpu {

namespace {

constexpr size_t kWaiting = 12;        // dwords that are tried with the next one: more find hardly better partners
constexpr int64_t kMostFeatures = 16;  // that share a list

// Sums of a dword's weights of one sign in one 16-bit lane, by feature: positive ones, then negative ones.
struct Sums {
  uint8_t of[4][kMostFeatures];
};

struct Correction {
  uint16_t dword;
  uint32_t weights;
};

int32_t weight_at(uint32_t dword, int64_t i) { return static_cast<int8_t>(dword >> (8 * i)); }

Sums sums_of(const uint32_t* weights, int64_t features) {
  Sums sums{};
  for (int64_t f = 0; f < features; ++f)
    for (int64_t lane = 0; lane < 2; ++lane) {
      const int32_t w0 = weight_at(weights[f], 2 * lane), w1 = weight_at(weights[f], 2 * lane + 1);
      const int32_t positive = std::max(w0, 0) + std::max(w1, 0);
      sums.of[lane][f] = static_cast<uint8_t>(positive);
      sums.of[2 + lane][f] = static_cast<uint8_t>(positive - w0 - w1);
    }
  return sums;
}

// Of each feature whether sums of both are out of bounds; those of b are not. (Comparisons of bytes: this is most of
// the time of packing.)
struct Over {
  uint8_t of[kMostFeatures];
  bool any() const {
    uint64_t words[kMostFeatures / 8], sum = 0;
    std::memcpy(words, of, sizeof words);
    for (const uint64_t word : words) sum |= word;
    return sum != 0;
  }
};
Over beyond(const Sums& a, const Sums& b) {
  Over over{};
  for (int64_t i = 0; i < 4; ++i)
    for (int64_t f = 0; f < kMostFeatures; ++f) {
      const uint8_t room = static_cast<uint8_t>(kOrderBound - b.of[i][f]);
      over.of[f] |= static_cast<uint8_t>(a.of[i][f] > room);
    }
  return over;
}

// One list of features.
class List {
 public:
  // weights: [kd][kPanel] dwords, of which the first `features` count.
  List(const uint32_t* weights, int64_t kd, int64_t features) : weights_(weights), kd_(kd), features_(features) {
    std::vector<uint16_t> waiting, all, pairs;
    sums_.reserve(static_cast<size_t>(kd));
    for (int64_t d = 0; d < kd; ++d) {
      sums_.push_back(sums_of(weights + d * kPanel, features));
      const Over alone = beyond(sums_.back(), Sums{});
      (alone.any() ? pairs : all).push_back(static_cast<uint16_t>(d));
      count(alone);
    }
    most_ = *std::max_element(counts_.begin(), counts_.end());
    for (const uint16_t d : all) {
      const auto partner = std::find_if(waiting.begin(), waiting.end(),
                                        [&](uint16_t other) { return !beyond(sums_[other], sums_[d]).any(); });
      if (partner != waiting.end()) {
        dwords_.insert(dwords_.end(), {*partner, d});
        waiting.erase(partner);
        continue;
      }
      if (waiting.size() == kWaiting) settle(waiting, pairs);
      waiting.push_back(d);
    }
    while (!waiting.empty()) settle(waiting, pairs);
    fours_ = dwords_.size();
    dwords_.insert(dwords_.end(), pairs.begin(), pairs.end());
  }

  // Appends the list to what is there.
  void write(OrderedWeights& out) {
    OrderedEntry entry{out.steps, static_cast<uint16_t>(fours_), 0};
    const size_t first = out.weights.size(), features = static_cast<size_t>(features_);
    for (const uint16_t d : dwords_) out.weights.insert(out.weights.end(), row(d), row(d) + features_);
    uint32_t* const at = out.weights.data() + first;
    for (size_t i = 0; i < dwords_.size(); i += i < fours_ ? 2 : 1) {
      const bool four = i < fours_;
      const Over over = beyond(sums_[dwords_[i]], four ? sums_[dwords_[i + 1]] : Sums{});
      for (size_t f = 0; f < features && over.any(); ++f) {
        if (!over.of[f]) continue;
        uint32_t* const weights = at + i * features + f;
        bound(f, dwords_[i], weights, four ? dwords_[i + 1] : 0, four ? weights + features : nullptr);
      }
    }
    size_t steps = 0;
    for (const auto& corrections : corrections_) steps = std::max(steps, corrections.size());
    out.index.insert(out.index.end(), dwords_.begin(), dwords_.end());
    for (size_t step = 0; step < steps; ++step)
      for (size_t f = 0; f < features; ++f) {
        const Correction c = step < corrections_[f].size() ? corrections_[f][step] : Correction{};
        out.index.push_back(c.dword), out.weights.push_back(c.weights);
      }
    entry.steps = static_cast<uint16_t>(steps);
    out.steps += static_cast<uint32_t>(steps);
    out.table.push_back(entry);
  }

 private:
  void count(const Over& over) {
    for (size_t f = 0; f < kMostFeatures; ++f) counts_[f] += over.of[f];
  }
  // Whether more of these features' weights can be corrected without another step.
  bool idle(const Over& over) const {
    for (size_t f = 0; f < kMostFeatures; ++f)
      if (over.of[f] && counts_[f] >= most_) return false;
    return true;
  }

  // The one that waits longest goes with the best of the others, or alone.
  void settle(std::vector<uint16_t>& waiting, std::vector<uint16_t>& pairs) {
    const uint16_t oldest = waiting.front();
    waiting.erase(waiting.begin());
    int least = kMostFeatures + 1;
    auto best = waiting.end();
    for (auto other = waiting.begin(); other != waiting.end(); ++other) {
      const Over over = beyond(sums_[oldest], sums_[*other]);
      const int features = std::accumulate(over.of, over.of + kMostFeatures, 0);
      if (features < least && idle(over)) least = features, best = other;
    }
    if (best == waiting.end()) return pairs.push_back(oldest);
    count(beyond(sums_[oldest], sums_[*best]));
    dwords_.insert(dwords_.end(), {oldest, *best});
    waiting.erase(best);
  }

  const uint32_t* row(uint16_t d) const { return weights_ + d * kPanel; }

  // Takes up to `excess` off the weights of a sign in a lane of *dword, adds it to *taken; returns what is left of it.
  static int32_t take(uint32_t* dword, uint32_t* taken, int64_t lane, int32_t sign, int32_t excess) {
    for (int64_t i = 2 * lane; i < 2 * lane + 2; ++i) {
      const int32_t part = std::clamp(sign * weight_at(*dword, i), 0, excess), old = weight_at(*dword, i);
      const uint32_t mask = 0xffu << (8 * i);
      *dword = (*dword & ~mask) | (static_cast<uint32_t>(old - sign * part) << (8 * i) & mask);
      *taken = (*taken & ~mask) | (static_cast<uint32_t>(weight_at(*taken, i) + sign * part) << (8 * i) & mask);
      excess -= part;
    }
    return excess;
  }

  static int32_t sum(const uint32_t* dword, int64_t lane, int32_t sign) {
    if (!dword) return 0;
    return std::max(sign * weight_at(*dword, 2 * lane), 0) + std::max(sign * weight_at(*dword, 2 * lane + 1), 0);
  }

  // Brings a feature's sums into bounds; b is null where a dword stands alone. One of two is corrected where that will
  // do.
  void bound(size_t feature, uint16_t da, uint32_t* a, uint16_t db, uint32_t* b) {
    bool a_will_do = true, b_will_do = b != nullptr;
    for (int64_t lane = 0; lane < 2; ++lane)
      for (const int32_t sign : {1, -1}) {
        const int32_t excess = sum(a, lane, sign) + sum(b, lane, sign) - kOrderBound;
        a_will_do &= sum(a, lane, sign) >= excess, b_will_do &= sum(b, lane, sign) >= excess;
      }
    uint32_t taken_a = 0, taken_b = 0;
    for (int64_t lane = 0; lane < 2; ++lane)
      for (const int32_t sign : {1, -1}) {
        int32_t excess = sum(a, lane, sign) + sum(b, lane, sign) - kOrderBound;
        if (excess <= 0) continue;
        if (a_will_do || !b_will_do) excess = take(a, &taken_a, lane, sign, excess);
        if (excess > 0) take(b, &taken_b, lane, sign, excess);
      }
    if (taken_a) corrections_[feature].push_back({da, taken_a});
    if (taken_b) corrections_[feature].push_back({db, taken_b});
  }

  const uint32_t* weights_;
  const int64_t kd_, features_;
  std::vector<Sums> sums_;  // of each dword
  std::vector<uint16_t> dwords_;
  size_t fours_ = 0;
  std::array<int, kMostFeatures> counts_{};  // of the features' corrections, as foreseen
  int most_ = 0;                             // steps that dwords which stand alone ask for
  std::array<std::vector<Correction>, kMostFeatures> corrections_;
};

uint32_t add_bytes(uint32_t a, uint32_t b) {
  uint32_t sum = 0;
  for (int64_t i = 0; i < 4; ++i) sum |= static_cast<uint32_t>((weight_at(a, i) + weight_at(b, i)) & 255) << (8 * i);
  return sum;
}

}  // namespace

bool order_weights(LinearHeader& header, const void* weight, OrderedWeights& out) {
  const WeightKind kind = static_cast<WeightKind>(header.kind);
  const int64_t kd = dword_count(kind, header.k), ordered = tile_kernels(kind).ordered;
  if (ordered == 0 || kd > kMostOrdered) return false;
  std::vector<uint32_t> panel(static_cast<size_t>((kd + 1) * kPanel));  // K may be 0
  const int64_t panels = (header.n + kPanel - 1) / kPanel;
  out.weights.reserve(static_cast<size_t>(panels * kd * kPanel * 5 / 4));
  out.index.reserve(static_cast<size_t>(panels * kd * kPanel / ordered * 5 / 4));
  for (int64_t p = 0; p < panels; ++p) {
    fill_panel(header, weight, p, panel.data());
    for (int64_t f = 0; f < kPanel; f += ordered) List(panel.data() + f, kd, ordered).write(out);
  }
  header.features = static_cast<int16_t>(ordered);
  header.entries = static_cast<int64_t>(out.index.size());
  header.weight_dwords = static_cast<int64_t>(out.weights.size());
  return true;
}

OrderedList ordered_list(const Linear& linear, int64_t list) {
  const OrderedEntry& e = static_cast<const OrderedEntry*>(linear.table)[list];
  const int64_t corrections = int64_t{e.before} * linear.ordered;
  return {static_cast<const uint16_t*>(linear.index) + list * linear.kd + corrections,
          linear.weights + list * linear.kd * linear.ordered + corrections, linear.ordered, e.fours, e.steps};
}

PanelOrder panel_order(const Linear& linear, int64_t panel) {
  const int64_t lists = kPanel / linear.ordered;
  PanelOrder order{};
  for (int64_t i = 0; i < lists; ++i) order.list[i] = ordered_list(linear, panel * lists + i);
  return order;
}

void restore_panel(const Linear& linear, int64_t panel, uint32_t* dwords) {
  const PanelOrder order = panel_order(linear, panel);
  for (int64_t first = 0; first < kPanel; first += linear.ordered) {
    const OrderedList& list = order.list[first / linear.ordered];
    const uint32_t* from = list.weights;
    const uint16_t* index = list.index;
    for (int64_t i = 0; i < linear.kd; ++i, ++index, from += linear.ordered)
      std::copy_n(from, linear.ordered, dwords + *index * kPanel + first);
    for (int64_t i = 0; i < list.steps * linear.ordered; ++i, ++index, ++from) {
      uint32_t& dword = dwords[*index * kPanel + first + i % linear.ordered];
      dword = add_bytes(dword, *from);
    }
  }
}

PanelOrder order_of_bits(int bits, const uint32_t* panel, int64_t kd, int64_t ordered) {
  static const std::vector<uint16_t> straight = [] {
    std::vector<uint16_t> index(kMostOrdered);
    std::iota(index.begin(), index.end(), uint16_t{0});
    return index;
  }();
  const int64_t fours = (4 << (bits - 1)) <= kOrderBound ? kd & ~1 : 0;
  PanelOrder order{};
  for (int64_t i = 0; i < kPanel / ordered; ++i)
    order.list[i] = {straight.data(), panel + i * ordered, kPanel, fours, 0};
  return order;
}

}  // namespace bertkern::cpu
