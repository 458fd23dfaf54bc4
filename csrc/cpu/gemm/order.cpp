// Which dwords of K can be summed in 16 bits (gemm.h).
#include <algorithm>
#include <array>
#include <numeric>
#include <vector>

#include "cpu/gemm/linear.h"

namespace bertkern::cpu {

namespace {

constexpr int kWaiting = 8;  // dwords that are tried with the next one: more find hardly more fours

// Of the two 16-bit lanes of every feature: the sums of positive weights, then those of negative ones.
using Sums = std::array<uint8_t, 4 * kPanel>;

// Sums of one dword. Returns false where they are out of bounds.
bool sums_of(const uint32_t* weights, int64_t features, Sums& sums) {
  int32_t most = 0;
  for (int64_t f = 0; f < features; ++f)
    for (int64_t lane = 0; lane < 2; ++lane) {
      const int32_t w0 = static_cast<int8_t>(weights[f] >> (16 * lane)),
                    w1 = static_cast<int8_t>(weights[f] >> (16 * lane + 8));
      const int32_t positive = std::max(w0, 0) + std::max(w1, 0), negative = positive - w0 - w1;
      most = std::max({most, positive, negative});
      sums[(4 * f + 2 * lane)] = static_cast<uint8_t>(positive);
      sums[(4 * f + 2 * lane + 1)] = static_cast<uint8_t>(negative);
    }
  return most <= kOrderBound;
}

bool fit(const Sums& a, const Sums& b, int64_t features) {
  for (int64_t i = 0; i < 4 * features; ++i)
    if (a[i] + b[i] > kOrderBound) return false;
  return true;
}

}  // namespace

void order_panel(uint32_t* panel, int64_t kd, int64_t features, uint16_t* index, OrderCounts* counts) {
  const std::vector<uint32_t> natural(panel, panel + kd * kPanel);
  struct Waiting {
    uint16_t dword;
    Sums sums;
  };
  std::vector<uint16_t> fours, pairs, rest;
  for (int64_t first = 0; first < kPanel; first += features, index += kd, ++counts) {
    std::vector<Waiting> waiting;
    fours.clear(), pairs.clear(), rest.clear();
    for (int64_t d = 0; d < kd; ++d) {
      Waiting now{static_cast<uint16_t>(d), {}};
      if (!sums_of(natural.data() + d * kPanel + first, features, now.sums)) {
        rest.push_back(now.dword);
        continue;
      }
      const auto partner = std::find_if(waiting.begin(), waiting.end(),
                                        [&](const Waiting& other) { return fit(other.sums, now.sums, features); });
      if (partner != waiting.end()) {
        fours.push_back(partner->dword), fours.push_back(now.dword);
        waiting.erase(partner);
      } else {
        if (waiting.size() == kWaiting) pairs.push_back(waiting[0].dword), waiting.erase(waiting.begin());
        waiting.push_back(now);
      }
    }
    for (const Waiting& left : waiting) pairs.push_back(left.dword);
    counts->fours = static_cast<uint16_t>(fours.size()), counts->pairs = static_cast<uint16_t>(pairs.size());
    uint16_t* const after = std::copy(pairs.begin(), pairs.end(), std::copy(fours.begin(), fours.end(), index));
    std::copy(rest.begin(), rest.end(), after);
    for (int64_t i = 0; i < kd; ++i, panel += features)
      std::copy_n(natural.data() + index[i] * kPanel + first, features, panel);
  }
}

PanelOrder panel_order(const Linear& linear, int64_t panel) {
  const int64_t lists = kPanel / linear.ordered;
  PanelOrder order{static_cast<const uint16_t*>(linear.index) + panel * lists * linear.kd,
                   linear.kd,
                   linear.kd * linear.ordered,
                   linear.ordered,
                   {}};
  std::copy_n(static_cast<const OrderCounts*>(linear.table) + panel * lists, lists, order.counts);
  return order;
}

void restore_panel(const Linear& linear, int64_t panel, uint32_t* dwords) {
  const uint32_t* from = panel_weights(linear, panel).data;
  const uint16_t* index = panel_order(linear, panel).index;
  for (int64_t first = 0; first < kPanel; first += linear.ordered)
    for (int64_t i = 0; i < linear.kd; ++i, ++index, from += linear.ordered)
      std::copy_n(from, linear.ordered, dwords + *index * kPanel + first);
}

PanelOrder order_of_bits(int bits, int64_t kd, int64_t ordered) {
  static const std::vector<uint16_t> straight = [] {
    std::vector<uint16_t> index(kMostOrdered);
    std::iota(index.begin(), index.end(), uint16_t{0});
    return index;
  }();
  const int32_t largest = 1 << (bits - 1);
  OrderCounts counts{};
  if (4 * largest <= kOrderBound)
    counts = {static_cast<uint16_t>(kd & ~1), static_cast<uint16_t>(kd & 1)};
  else if (2 * largest <= kOrderBound)
    counts = {0, static_cast<uint16_t>(kd)};
  return {straight.data(), 0, ordered, kPanel, {counts, counts, counts, counts}};
}

}  // namespace bertkern::cpu
