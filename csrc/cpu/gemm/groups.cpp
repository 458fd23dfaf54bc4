// The packed form of group-wise weights: how it is written, read, and decoded a panel at a time.
#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/gemm/linear.h"
#include "cpu/scratch.h"

namespace bertkern::cpu {

namespace {

constexpr int16_t kAlongK = 1, kPermuted = 2;

int64_t padded(int64_t n) { return (n + kPanel - 1) / kPanel * kPanel; }
int64_t whole_blocks(int64_t dwords) { return (dwords + kBlockDwords - 1) / kBlockDwords; }
int64_t plane_dwords(int64_t blocks, int bits) { return blocks * bits * kPanel; }

// Calls see(first dword, blocks, bits) for every run of groups along K that are stored alike.
template <class See>
void each_run(const Group* groups, int64_t count, See&& see) {
  for (int64_t g = 0; g < count;) {
    int64_t end = g + 1;
    while (end < count && groups[end].bits == groups[g].bits) ++end;
    const int64_t dwords = groups[end - 1].first + groups[end - 1].count - groups[g].first;
    see(int64_t{groups[g].first}, whole_blocks(dwords), static_cast<int>(groups[g].bits));
    g = end;
  }
}

// Where everything goes.
struct Plan {
  std::vector<Group> groups;
  std::vector<GroupedPanel> panels;
  std::vector<uint32_t> column;  // empty: in order
  int64_t code_dwords = 0, weight_dwords = 0;
};

Plan plan_of(const LinearHeader& header, const GroupwiseWeight& weight) {
  const int64_t n = header.n, k = header.k, panels = padded(n) / kPanel;
  Plan plan;
  if (weight.along_k) {
    int64_t first = 0;
    for (int64_t g = 0, at = 0; at < k; ++g, at += weight.group_size) {
      const int64_t length = std::min(weight.group_size, k - at), count = (length + 3) / 4;
      if (g && weight.bits[g] != weight.bits[g - 1]) first = whole_blocks(first) * kBlockDwords;
      plan.groups.push_back({static_cast<uint32_t>(first), static_cast<uint32_t>(count), static_cast<uint32_t>(at),
                             static_cast<uint32_t>(length), weight.bits[g]});
      first += count;
    }
    plan.code_dwords = whole_blocks(first) * kBlockDwords;
  } else {
    const int64_t count = (k + 3) / 4;
    plan.groups.push_back({0, static_cast<uint32_t>(count), 0, static_cast<uint32_t>(k), 0});
    plan.code_dwords = whole_blocks(count) * kBlockDwords;
  }
  std::vector<int> bits(static_cast<size_t>(panels), 0);
  if (!weight.along_k) {
    bool even = true;
    for (int64_t i = 0; i < n; ++i) even = even && weight.bits_at(i, 0) == weight.bits_at(i / kPanel * kPanel, 0);
    if (!even) {
      for (int64_t i = 0; i < n; ++i) plan.column.push_back(static_cast<uint32_t>(i));
      std::stable_sort(plan.column.begin(), plan.column.end(),
                       [&](uint32_t a, uint32_t b) { return weight.bits_at(a, 0) < weight.bits_at(b, 0); });
    }
    for (int64_t i = 0; i < n; ++i) {
      int& most = bits[static_cast<size_t>(i / kPanel)];
      most = std::max(most, weight.bits_at(even ? i : plan.column[static_cast<size_t>(i)], 0));
    }
  }
  for (int64_t p = 0; p < panels; ++p) {
    plan.panels.push_back({static_cast<uint32_t>(plan.weight_dwords / 16), static_cast<uint32_t>(bits[p])});
    if (weight.along_k)
      each_run(plan.groups.data(), static_cast<int64_t>(plan.groups.size()),
               [&](int64_t, int64_t blocks, int run_bits) { plan.weight_dwords += plane_dwords(blocks, run_bits); });
    else
      plan.weight_dwords += plane_dwords(plan.code_dwords / kBlockDwords, bits[p]);
  }
  plan.panels.push_back({static_cast<uint32_t>(plan.weight_dwords / 16), 0});
  return plan;
}

// Codes of one row after the other, of a little-endian bit stream.
class Stream {
 public:
  Stream(const uint8_t* data) : data_(data) {}
  int read(int bits) {
    const int64_t byte = at_ / 8;
    const int shift = static_cast<int>(at_ % 8);
    int word = data_[byte];
    if (shift + bits > 8) word |= data_[byte + 1] << 8;
    at_ += bits;
    return word >> shift & ((1 << bits) - 1);
  }

 private:
  const uint8_t* data_;
  int64_t at_ = 0;
};

// The planes of one panel, bytes of which hold parts of codes.
class Planes {
 public:
  // `planes` of `blocks` blocks; dword `first` is the first of them.
  Planes(uint8_t* planes, int bits, int64_t first) : planes_(planes), bits_(bits), first_(first) {}

  // Calls see(byte, shift, from, width): bits [from, from + width) of the code stand in the byte from `shift` on.
  template <class See>
  void each_part(int64_t dword, int64_t feature, int64_t byte, See&& see) const {
    const int64_t d = dword - first_, block = d / kBlockDwords, lane = feature % 16;
    const int v = static_cast<int>(d % kBlockDwords * 2 + feature / 16);
    uint8_t* const base = planes_ + plane_dwords(block, bits_) * 4;
    const auto at = [&](int vector) { return base + (vector * 16 + lane) * 4 + byte; };
    if (bits_ == 8) return see(at(v), 0, 0, 8);
    int vector = 0, low = 0;
    if (bits_ >= 4) see(at(v % 8), 4 * (v / 8), 0, 4), vector = 8, low = 4;
    if (bits_ == 2 || bits_ == 3 || bits_ >= 6) {
      see(at(vector + v % 4), 2 * (v / 4), low, 2);
      vector += 4, low += 2;
    }
    if (bits_ % 2) see(at(vector + v % 2), v / 2, low, 1);
  }
  void write(int64_t dword, int64_t feature, int64_t byte, int code) const {
    each_part(dword, feature, byte, [&](uint8_t* to, int shift, int from, int width) {
      *to = static_cast<uint8_t>(*to | (code >> from & ((1 << width) - 1)) << shift);
    });
  }

 private:
  uint8_t* planes_;
  int bits_;
  int64_t first_;
};

int64_t vectors_bytes(const LinearHeader& h) {
  const int64_t np = padded(h.n), integer = static_cast<WeightKind>(h.kind) == WeightKind::s8;
  return np * 4 * (has_init(h) + (integer ? 1 : 0) + 1 + 2 * h.entries + (h.features & kPermuted ? 1 : 0));
}

}  // namespace

int64_t groupwise_code_bytes(const GroupwiseWeight& weight, int64_t n, int64_t k) {
  int64_t row = 0, bytes = 0;
  if (weight.along_k) {
    for (int64_t g = 0, at = 0; at < k; ++g, at += weight.group_size)
      row += std::min(weight.group_size, k - at) * weight.bits[g];
    return (row + 7) / 8 * n;
  }
  for (int64_t i = 0; i < n; ++i) bytes += (k * weight.bits_at(i, 0) + 7) / 8;
  return bytes;
}

int64_t groupwise_bytes(const LinearHeader& h) {
  return static_cast<int64_t>(sizeof(GroupHeader)) + h.entries * static_cast<int64_t>(sizeof(Group)) +
         (padded(h.n) / kPanel + 1) * static_cast<int64_t>(sizeof(GroupedPanel)) + vectors_bytes(h);
}

void measure_groupwise(LinearHeader& header, const GroupwiseWeight& weight) {
  const Plan plan = plan_of(header, weight);
  header.layout = static_cast<int16_t>(Layout::grouped);
  header.features = static_cast<int16_t>((weight.along_k ? kAlongK : 0) | (plan.column.empty() ? 0 : kPermuted));
  header.entries = static_cast<int64_t>(plan.groups.size());
  header.weight_dwords = plan.weight_dwords;
}

bool view_groupwise(const void* data, int64_t bytes, const LinearHeader& h, Linear& linear) {
  const int64_t np = padded(h.n), panels = np / kPanel, groups = h.entries;
  const bool along_k = h.features & kAlongK;
  if (h.features < 0 || h.features > 3 || (!along_k && groups != 1) || groups > h.k + 1 || bytes != packed_bytes(h))
    return false;
  const char* at = static_cast<const char*>(data) + sizeof h;
  linear.kind = static_cast<WeightKind>(h.kind), linear.layout = Layout::grouped, linear.features = linear.ordered = 0;
  linear.n = h.n, linear.k = h.k, linear.panels = panels;
  linear.weights = reinterpret_cast<const uint32_t*>(at);
  linear.weight_dwords = h.weight_dwords;
  at += h.weight_dwords * 4;
  GroupHeader header;
  std::memcpy(&header, at, sizeof header);
  at += sizeof header;
  linear.index = linear.table = nullptr;
  linear.groups = groups, linear.along_k = along_k;
  linear.group_size = header.group_size, linear.code_dwords = header.code_dwords;
  linear.group = reinterpret_cast<const Group*>(at);
  at += groups * static_cast<int64_t>(sizeof(Group));
  linear.grouped_panel = reinterpret_cast<const GroupedPanel*>(at);
  at += (panels + 1) * static_cast<int64_t>(sizeof(GroupedPanel));
  const float* vectors = reinterpret_cast<const float*>(at);
  linear.init = linear.column_sum = nullptr;
  const bool integer = linear.kind == WeightKind::s8;
  if (has_init(h)) linear.init = reinterpret_cast<const int32_t*>(vectors), vectors += np;
  if (integer) linear.column_sum = reinterpret_cast<const int32_t*>(vectors), vectors += np;
  linear.bias = vectors, linear.scale = linear.bias + np, linear.zero = linear.scale + np * groups;
  linear.column = h.features & kPermuted ? reinterpret_cast<const uint32_t*>(linear.zero + np * groups) : nullptr;
  linear.input_scale = h.input_scale, linear.input_zero = h.input_zero;
  linear.output_scale = h.output_scale, linear.has_bias = h.has_bias != 0;
  const Group last = groups ? linear.group[groups - 1] : Group{};
  const int64_t dwords = int64_t{last.first} + last.count;
  linear.kd = integer ? dwords : dword_count(linear.kind, h.k);
  return int64_t{linear.grouped_panel[panels].begin} * 16 == h.weight_dwords && int64_t{last.k} + last.length == h.k &&
         linear.code_dwords == whole_blocks(dwords) * kBlockDwords && linear.group_size > 0;
}

namespace {

// Calls see(place, feature, j, dword, byte, bits): every code of the panel, where it stands.
template <class See>
void each_code(const Group* groups, int64_t count, int64_t n, const uint32_t* column, int64_t panel, See&& see) {
  for (int64_t f = 0; f < std::min(kPanel, n - panel * kPanel); ++f) {
    const int64_t place = panel * kPanel + f, feature = column ? column[place] : place;
    for (int64_t g = 0; g < count; ++g)
      for (int64_t i = 0; i < groups[g].length; ++i)
        see(f, feature, g, groups[g].k + i, groups[g].first + i / 4, i % 4);
  }
}

}  // namespace

void pack_groupwise(const LinearHeader& header, const GroupwiseWeight& weight, const float* bias, void* out) {
  std::memset(out, 0, static_cast<size_t>(packed_bytes(header)));
  write_header(header, out);
  const Plan plan = plan_of(header, weight);
  const int64_t n = header.n, k = header.k, np = padded(n), groups = header.entries;
  uint8_t* const weights = static_cast<uint8_t*>(out) + sizeof header;
  char* at = reinterpret_cast<char*>(weights) + plan.weight_dwords * 4;
  const GroupHeader group_header{weight.group_size, plan.code_dwords};
  std::memcpy(at, &group_header, sizeof group_header);
  at += sizeof group_header;
  std::memcpy(at, plan.groups.data(), plan.groups.size() * sizeof(Group));
  at += plan.groups.size() * sizeof(Group);
  std::memcpy(at, plan.panels.data(), plan.panels.size() * sizeof(GroupedPanel));
  at += plan.panels.size() * sizeof(GroupedPanel);
  const bool integer = static_cast<WeightKind>(header.kind) == WeightKind::s8;
  int32_t* const init = reinterpret_cast<int32_t*>(at);
  int32_t* const column_sum = init + (has_init(header) ? np : 0);
  float* const biases = reinterpret_cast<float*>(column_sum) + (integer ? np : 0);
  float *const scales = biases + np, *const zeros = scales + np * groups;
  const uint32_t* column = nullptr;
  if (!plan.column.empty()) {
    uint32_t* const columns = reinterpret_cast<uint32_t*>(zeros + np * groups);
    std::memcpy(columns, plan.column.data(), plan.column.size() * 4);
    column = columns;
  }

  std::vector<int64_t> row_begin{0};  // bytes of the stream
  for (int64_t i = 0; i < n; ++i) {
    int64_t bits = 0;
    if (weight.along_k)
      for (const Group& g : plan.groups) bits += int64_t{g.length} * g.bits;
    else
      bits = k * weight.bits_at(i, 0);
    row_begin.push_back(row_begin.back() + (bits + 7) / 8);
  }
  // A panel's unused codes, those of no K or of no feature, are the middle of its codes: zeros once they are centred.
  for (int64_t p = 0; p < np / kPanel; ++p) {
    uint8_t* planes = weights + int64_t{plan.panels[static_cast<size_t>(p)].begin} * 64;
    const auto clear = [&](int64_t, int64_t blocks, int bits) {
      const Planes to(planes, bits, 0);
      for (int64_t d = 0; d < blocks * kBlockDwords; ++d)
        for (int64_t f = 0; f < kPanel; ++f)
          for (int64_t b = 0; b < 4; ++b) to.write(d, f, b, 1 << (bits - 1));
      planes += plane_dwords(blocks, bits) * 4;
    };
    if (weight.along_k)
      each_run(plan.groups.data(), groups, clear);
    else
      clear(0, plan.code_dwords / kBlockDwords, static_cast<int>(plan.panels[static_cast<size_t>(p)].bits));
  }
  const auto scale_at = [&](int64_t feature, int64_t g) {
    return !weight.along_k ? feature / weight.group_size : weight.shared ? g : feature * groups + g;
  };
  for (int64_t place = 0; place < n; ++place) {
    const int64_t feature = column ? column[place] : place, p = place / kPanel, f = place % kPanel;
    const GroupedPanel& panel = plan.panels[static_cast<size_t>(p)];
    uint8_t* planes = weights + int64_t{panel.begin} * 64;
    Stream stream(weight.codes + row_begin[static_cast<size_t>(feature)]);
    int64_t total = 0, run_end = -1, run_planes = 0;
    double scaled = 0;
    Planes to(planes, static_cast<int>(panel.bits), 0);
    for (int64_t g = 0; g < groups; ++g) {
      const Group& group = plan.groups[static_cast<size_t>(g)];
      const int own = weight.along_k ? static_cast<int>(group.bits) : weight.bits_at(feature, 0);
      const int stored = weight.along_k ? own : static_cast<int>(panel.bits);
      if (weight.along_k && g >= run_end) {  // the next run begins
        planes += run_planes;
        int64_t end = g + 1;
        while (end < groups && plan.groups[static_cast<size_t>(end)].bits == group.bits) ++end;
        const Group& last = plan.groups[static_cast<size_t>(end - 1)];
        run_end = end, run_planes = plane_dwords(whole_blocks(last.first + last.count - group.first), own) * 4;
        to = Planes(planes, own, group.first);
      }
      int64_t sum = 0;
      for (int64_t i = 0; i < group.length; ++i) {
        const int centred = stream.read(own) - (1 << (own - 1)), middle = 1 << (stored - 1);
        // The middle stands there already: its bits are taken back first.
        to.each_part(group.first + i / 4, f, i % 4, [&](uint8_t* byte, int shift, int from, int width) {
          const int mask = (1 << width) - 1;
          *byte = static_cast<uint8_t>((*byte & ~(mask << shift)) | ((centred + middle) >> from & mask) << shift);
        });
        sum += centred;
      }
      const float scale = weight.scale[scale_at(feature, g)];
      const float middle = static_cast<float>(1 << (own - 1));
      const float zero = weight.zero ? weight.zero[scale_at(feature, g)] - middle : 0.0f;
      const int64_t at_group = (p * groups + g) * kPanel + f;
      scales[at_group] = scale;
      zeros[at_group] = integer && weight.along_k ? -scale * zero : zero;
      total += sum, scaled += static_cast<double>(scale) * static_cast<double>(sum);
    }
    if (bias) biases[place] = bias[feature];
    if (!integer) continue;
    if (weight.along_k) {
      const float made = static_cast<float>(scaled);
      std::memcpy(column_sum + place, &made, 4);
    } else {
      column_sum[place] = static_cast<int32_t>(total);
    }
  }
  if (!has_init(header)) return;
  Linear linear;
  view_groupwise(out, packed_bytes(header), header, linear);
  init_of(linear, header.input_zero, init);
}

void init_of(const Linear& linear, int64_t zero_point, void* out) {
  const int64_t count = linear.panels * kPanel;
  int32_t* const init = static_cast<int32_t*>(out);
  for (int64_t i = 0; i < count; ++i) {
    if (linear.layout == Layout::grouped && linear.along_k) {
      float sum;
      std::memcpy(&sum, linear.column_sum + i, 4);
      sum *= -static_cast<float>(zero_point);
      std::memcpy(init + i, &sum, 4);
    } else {
      init[i] = static_cast<int32_t>(-zero_point) * linear.column_sum[i];
    }
  }
}

namespace {

thread_local Scratch decoded, dequantized, rounded;

const uint32_t* panel_codes(const Linear& linear, int64_t panel) {
  const DecodeFn decode = tile_kernels(WeightKind::s8).decode;
  uint32_t* codes = decoded.get<uint32_t>(linear.code_dwords * kPanel + 16);
  const uint32_t* planes = panel_weights(linear, panel).data;
  if (!linear.along_k) {
    decode(static_cast<int>(linear.grouped_panel[panel].bits), planes, linear.code_dwords / kBlockDwords, codes);
  } else {
    each_run(linear.group, linear.groups, [&](int64_t first, int64_t blocks, int bits) {
      decode(bits, planes, blocks, codes + first * kPanel);
      planes += plane_dwords(blocks, bits);
    });
  }
  return codes;
}

// Values [K][32], fp32.
const float* panel_values(const Linear& linear, int64_t panel) {
  const DequantizeFn dequantize = tile_kernels(WeightKind::s8).dequantize;
  const uint32_t* codes = panel_codes(linear, panel);
  float* values = dequantized.get<float>((linear.k + 1) * kPanel);
  for (int64_t g = 0; g < linear.groups; ++g) {
    const Group& group = linear.group[g];
    const int64_t at = (panel * linear.groups + g) * kPanel;
    // Along K the zero point of s8 layers is held times the scale.
    float zero[kPanel];
    for (int64_t f = 0; f < kPanel; ++f)
      zero[f] = linear.kind == WeightKind::s8 && linear.along_k
                    ? (linear.scale[at + f] != 0.0f ? -linear.zero[at + f] / linear.scale[at + f] : 0.0f)
                    : linear.zero[at + f];
    dequantize(codes + int64_t{group.first} * kPanel, group.length, linear.scale + at, zero,
               values + int64_t{group.k} * kPanel);
  }
  if (linear.k % 2) std::memset(values + linear.k * kPanel, 0, kPanel * 4);
  return values;
}

}  // namespace

int narrow_bits(const Linear& linear, int64_t panel) {
  if (linear.layout != Layout::grouped || linear.kind != WeightKind::s8 || linear.groups == 0) return 0;
  if (!linear.along_k) {
    const uint32_t bits = linear.grouped_panel[panel].bits;
    return bits <= kNarrowBits ? static_cast<int>(bits) : 0;
  }
  const uint32_t bits = linear.group[0].bits;
  for (int64_t g = 0; g < linear.groups; ++g)
    if (linear.group[g].bits != bits || linear.group[g].first % kBlockDwords) return 0;
  return bits <= kNarrowBits ? static_cast<int>(bits) : 0;
}

const uint32_t* decoded_panel(const Linear& linear, int64_t panel) {
  if (linear.kind == WeightKind::s8) return panel_codes(linear, panel);
  const float* values = panel_values(linear, panel);
  if (linear.kind == WeightKind::f32) return reinterpret_cast<const uint32_t*>(values);
  uint32_t* pairs = rounded.get<uint32_t>(linear.kd * kPanel + 16);
  uint16_t halves[2 * kPanel];
  for (int64_t d = 0; d < linear.kd; ++d) {
    row_kernels().store_row(values + 2 * d * kPanel, 2 * kPanel, Dtype::bf16, halves);
    for (int64_t f = 0; f < kPanel; ++f)
      pairs[d * kPanel + f] = halves[f] | static_cast<uint32_t>(halves[kPanel + f]) << 16;
  }
  return pairs;
}

void unpack_groupwise(const Linear& linear, const GroupwiseWeight& weight, uint8_t* codes) {
  std::memset(codes, 0, static_cast<size_t>(groupwise_code_bytes(weight, linear.n, linear.k)));
  std::vector<int64_t> row_begin{0}, group_begin{0};  // bytes; bits within a row of groups along K
  for (int64_t g = 0; g < linear.groups && linear.along_k; ++g)
    group_begin.push_back(group_begin.back() + int64_t{linear.group[g].length} * linear.group[g].bits);
  for (int64_t i = 0; i < linear.n; ++i)
    row_begin.push_back(row_begin.back() +
                        ((linear.along_k ? group_begin.back() : linear.k * weight.bits_at(i, 0)) + 7) / 8);
  for (int64_t p = 0; p < linear.panels; ++p) {
    const int8_t* from = reinterpret_cast<const int8_t*>(panel_codes(linear, p));
    each_code(linear.group, linear.groups, linear.n, linear.column, p,
              [&](int64_t f, int64_t feature, int64_t g, int64_t j, int64_t dword, int64_t byte) {
                const int bits = weight.bits_at(feature, j);
                const int code = from[(dword * kPanel + f) * 4 + byte] + (1 << (bits - 1));
                const int64_t bit =
                    linear.along_k ? group_begin[static_cast<size_t>(g)] + (j - linear.group[g].k) * bits : j * bits;
                uint8_t* to = codes + row_begin[static_cast<size_t>(feature)] + bit / 8;
                const int word = code << (bit % 8);
                to[0] = static_cast<uint8_t>(to[0] | word);
                if (bit % 8 + bits > 8) to[1] = static_cast<uint8_t>(to[1] | word >> 8);
              });
  }
}

void dequantize_groupwise(const Linear& linear, float* weight) {
  for (int64_t p = 0; p < linear.panels; ++p) {
    const float* values = panel_values(linear, p);
    for (int64_t f = 0; f < std::min(kPanel, linear.n - p * kPanel); ++f) {
      const int64_t place = p * kPanel + f, feature = linear.column ? linear.column[place] : place;
      for (int64_t j = 0; j < linear.k; ++j) weight[feature * linear.k + j] = values[j * kPanel + f];
    }
  }
}

}  // namespace bertkern::cpu
