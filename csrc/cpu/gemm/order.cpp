// Which dwords of K are summed together in 16 bits, and which are widened (gemm.h).
#include <algorithm>
#include <cstring>
#include <numeric>

#include "cpu/gemm/linear.h"

namespace bertkern::cpu {

namespace {

constexpr size_t kWaiting = 32;  // dwords that are tried with the next one: more find hardly better partners

// Sums of a dword's weights of one sign in one 16-bit lane, by feature: positive ones, then negative ones.
struct Sums {
  uint8_t of[4][kListed];
};

int32_t weight_at(uint32_t dword, int64_t i) { return static_cast<int8_t>(dword >> (8 * i)); }

Sums sums_of(const uint32_t* weights) {
  Sums sums{};
  for (int64_t f = 0; f < kListed; ++f)
    for (int64_t lane = 0; lane < 2; ++lane) {
      const int32_t w0 = weight_at(weights[f], 2 * lane), w1 = weight_at(weights[f], 2 * lane + 1);
      const int32_t positive = std::max(w0, 0) + std::max(w1, 0);
      sums.of[lane][f] = static_cast<uint8_t>(positive);
      sums.of[2 + lane][f] = static_cast<uint8_t>(positive - w0 - w1);
    }
  return sums;
}

// Whether sums of both stay in bounds in every feature; those of b alone do. (Comparisons of bytes: this is most of the
// time of packing.)
bool fit(const Sums& a, const Sums& b) {
  uint8_t over[kListed] = {};
  for (int64_t i = 0; i < 4; ++i)
    for (int64_t f = 0; f < kListed; ++f)
      over[f] |= static_cast<uint8_t>(a.of[i][f] > static_cast<uint8_t>(kOrderBound - b.of[i][f]));
  return std::all_of(over, over + kListed, [](uint8_t one) { return one == 0; });
}

// The dwords of one list, in order.
struct Order {
  std::vector<uint16_t> dwords;
  size_t fours = 0, wide = 0;
};

// weights: [kd][kPanel] dwords, of which the first kListed count; `sparse`: without those that are all zero.
Order order_dwords(const uint32_t* weights, int64_t kd, bool sparse) {
  Order order;
  std::vector<Sums> sums(static_cast<size_t>(kd));
  std::vector<uint16_t> waiting, pairs, wide;
  for (int64_t d = 0; d < kd; ++d) {
    const uint32_t* const row = weights + d * kPanel;
    if (sparse && std::all_of(row, row + kListed, [](uint32_t w) { return w == 0; })) continue;
    const uint16_t dword = static_cast<uint16_t>(d);
    const Sums& own = sums[dword] = sums_of(row);
    if (!fit(own, Sums{})) {
      wide.push_back(dword);
      continue;
    }
    const auto partner =
        std::find_if(waiting.begin(), waiting.end(), [&](uint16_t other) { return fit(sums[other], own); });
    if (partner != waiting.end()) {
      order.dwords.insert(order.dwords.end(), {*partner, dword});
      waiting.erase(partner);
      continue;
    }
    if (waiting.size() == kWaiting) {
      pairs.push_back(waiting.front());
      waiting.erase(waiting.begin());
    }
    waiting.push_back(dword);
  }
  order.fours = order.dwords.size(), order.wide = wide.size();
  for (const auto& rest : {pairs, waiting, wide}) order.dwords.insert(order.dwords.end(), rest.begin(), rest.end());
  return order;
}

}  // namespace

void OrderedWeights::add(const uint32_t* panel, int64_t kd, bool sparse) {
  for (int64_t first = 0; first < kPanel; first += kListed) {
    const uint32_t* const weights = panel + first;
    const Order order = order_dwords(weights, kd, sparse);
    table_.push_back(
        {static_cast<uint32_t>(index_.size()), static_cast<uint16_t>(order.fours), static_cast<uint16_t>(order.wide)});
    index_.insert(index_.end(), order.dwords.begin(), order.dwords.end());
    for (const uint16_t d : order.dwords)
      weights_.insert(weights_.end(), weights + d * kPanel, weights + d * kPanel + kListed);
  }
}

void OrderedWeights::measure(LinearHeader& header) const {
  header.features = static_cast<int16_t>(kListed);
  header.entries = static_cast<int64_t>(index_.size());
  header.weight_dwords = static_cast<int64_t>(weights_.size());
}

void OrderedWeights::write(void* weights, void* index, void* table) const {
  const auto copy = [](const auto& from, void* to) {
    if (!from.empty()) std::memcpy(to, from.data(), from.size() * sizeof from[0]);
  };
  copy(weights_, weights), copy(index_, index), copy(table_, table);
  const OrderedEntry end{static_cast<uint32_t>(index_.size()), 0, 0};
  std::memcpy(static_cast<OrderedEntry*>(table) + table_.size(), &end, sizeof end);
}

bool takes_order(const LinearHeader& header) {
  const WeightKind kind = static_cast<WeightKind>(header.kind);
  return tile_kernels(kind).ordered > 0 && dword_count(kind, header.k) <= kMostOrdered;
}

OrderedWeights order_weights(const LinearHeader& header, const void* weight) {
  const int64_t kd = dword_count(static_cast<WeightKind>(header.kind), header.k);
  OrderedWeights ordered;
  std::vector<uint32_t> panel(static_cast<size_t>((kd + 1) * kPanel));  // K may be 0
  for (int64_t p = 0; p < (header.n + kPanel - 1) / kPanel; ++p) {
    fill_panel(header, weight, p, panel.data());
    ordered.add(panel.data(), kd, false);
  }
  return ordered;
}

OrderedList ordered_list(const Linear& linear, int64_t list) {
  const OrderedEntry &e = static_cast<const OrderedEntry*>(linear.table)[list], &next = (&e)[1];
  return {static_cast<const uint16_t*>(linear.index) + e.before,
          linear.weights + e.before * linear.ordered,
          linear.ordered,
          int64_t{next.before} - e.before,
          e.fours,
          e.wide};
}

PanelOrder panel_order(const Linear& linear, int64_t panel) {
  const int64_t lists = kPanel / linear.ordered;
  PanelOrder order{};
  order.features = linear.ordered;
  for (int64_t i = 0; i < lists; ++i) order.list[i] = ordered_list(linear, panel * lists + i);
  return order;
}

void restore_panel(const Linear& linear, int64_t panel, uint32_t* dwords) {
  const PanelOrder order = panel_order(linear, panel);
  if (linear.layout == Layout::panels) std::fill_n(dwords, linear.kd * kPanel, 0u);
  for (int64_t first = 0; first < kPanel; first += linear.ordered) {
    const OrderedList& list = order.list[first / linear.ordered];
    for (int64_t i = 0; i < list.count; ++i)
      std::copy_n(list.weights + i * linear.ordered, linear.ordered, dwords + list.index[i] * kPanel + first);
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
  order.features = ordered;
  for (int64_t i = 0; i < kPanel / ordered; ++i)
    order.list[i] = {straight.data(), panel + i * ordered, kPanel, kd, fours, 0};
  return order;
}

}  // namespace bertkern::cpu
