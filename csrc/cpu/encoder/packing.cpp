#include "cpu/encoder/packing.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace bertkern::ops {

namespace {

template <class T>
bool nonzero(const void* data, int64_t i) {
  return static_cast<const T*>(data)[i] != T(0);
}

bool is_token(const Tensor& mask, const void* data, int64_t i) {
  switch (mask.scalar_type()) {
    case ScalarType::Float:
      return nonzero<float>(data, i);
    case ScalarType::Double:
      return nonzero<double>(data, i);
    case ScalarType::BFloat16:
    case ScalarType::Half:
      return (static_cast<const uint16_t*>(data)[i] & 0x7fff) != 0;
    case ScalarType::Int:
      return nonzero<int32_t>(data, i);
    case ScalarType::Long:
      return nonzero<int64_t>(data, i);
    case ScalarType::Short:
      return nonzero<int16_t>(data, i);
    default:
      return nonzero<uint8_t>(data, i);  // bool, uint8, int8
  }
}

bool is_mask_dtype(ScalarType t) {
  switch (t) {
    case ScalarType::Bool:
    case ScalarType::Byte:
    case ScalarType::Char:
    case ScalarType::Short:
    case ScalarType::Int:
    case ScalarType::Long:
    case ScalarType::Double:
      return true;
    default:
      return is_activation_dtype(t);
  }
}

}  // namespace

Packing pack_tokens(const char* op, const std::optional<Tensor>& mask, int64_t batch, int64_t length, Masked masked,
                    bool empty_attends) {
  Tensor m;
  if (mask) {
    m = dense(*mask);
    require(m.is_cpu() && m.dim() == 2 && m.size(0) == batch && m.size(1) == length, op,
            ": expected mask of shape [B, L] = [", batch, ", ", length, "] on the CPU. Got ", shape_of(m), ".");
    require(is_mask_dtype(m.scalar_type()), op, ": expected mask of dtype bool, an integer or a float. Got ",
            dtype_name(m.scalar_type()), ".");
  }
  Packing p;
  p.source.reserve(static_cast<size_t>(batch * length));
  p.positions.reserve(static_cast<size_t>(batch * length));
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t begin = p.tokens();
    const auto add = [&](int64_t i) {
      if (i != p.tokens() - begin) p.consecutive = false;
      p.source.push_back(b * length + i), p.positions.push_back(static_cast<int32_t>(i));
    };
    if (!mask) {
      for (int64_t i = 0; i < length; ++i) add(i);
      p.sequences.push_back({begin, length, length, nullptr, nullptr});
      continue;
    }
    const void* data = m.const_data_ptr();
    int64_t end = 0;
    for (int64_t i = 0; i < length; ++i)
      if (is_token(m, data, b * length + i)) add(i), end = i + 1;
    int64_t keys = p.tokens() - begin;
    if (masked == Masked::none)
      end = keys;
    else if (masked == Masked::all || keys == 0)
      end = length;
    if (keys < end)
      for (int64_t i = 0; i < end; ++i)
        if (!is_token(m, data, b * length + i)) add(i);
    if (end > 0 && keys == 0 && empty_attends) keys = length, p.even.push_back(b);
    p.sequences.push_back({begin, end, keys, nullptr, nullptr});
  }
  return p;
}

void attend_evenly(Packing& packing, int64_t heads, int64_t length) {
  if (packing.even.empty()) return;
  // A bias beside which every score vanishes, as beside the lowest float that masks are made of; this one stays finite
  // where a kernel scales it.
  packing.even_bias.assign(static_cast<size_t>(heads * length * length), -1e30f);
  for (const int64_t b : packing.even) packing.sequences[static_cast<size_t>(b)].bias = packing.even_bias.data();
}

Tensor mask_heads(const char* op, Packing& packing, const Tensor& head_mask, const std::vector<int64_t>& heads) {
  const int64_t batch = static_cast<int64_t>(packing.sequences.size());
  int64_t columns = 0;
  for (const int64_t count : heads) columns += count;
  const Tensor factors = expect(op, "head_mask", head_mask, ScalarType::Float);
  require(factors.dim() == 2 && (factors.size(0) == 1 || factors.size(0) == batch) && factors.size(1) == columns, op,
          ": expected head_mask of shape [1 or B, heads of all layers] = [", batch, ", ", columns, "]. Got ",
          shape_of(factors), ".");
  const float* data = static_cast<const float*>(factors.const_data_ptr());
  require(std::all_of(data, data + factors.numel(), [](float factor) { return std::isfinite(factor); }), op,
          ": expected head_mask to be finite. Got NaN or Inf.");
  std::vector<cpu::Sequence> by_layer;
  by_layer.reserve(heads.size() * packing.sequences.size());
  for (const int64_t count : heads) {
    for (int64_t b = 0; b < batch; ++b) {
      by_layer.push_back(packing.sequences[static_cast<size_t>(b)]);
      by_layer.back().factor = data + (factors.size(0) == 1 ? 0 : b * columns);
    }
    data += count;
  }
  packing.sequences = std::move(by_layer);
  return factors;
}

void load_tokens(const Packing& packing, const Tensor& x, float* rows) {
  const int64_t h = x.size(2), bytes = dtype_bytes(x.scalar_type());
  const cpu::Dtype dtype = kernel_dtype(x.scalar_type());
  const cpu::RowKernels& kernels = cpu::row_kernels();
  const char* source = static_cast<const char*>(x.const_data_ptr());
  for (const int64_t row : packing.source) {
    kernels.load_row(source + row * h * bytes, dtype, h, rows);
    rows += h;
  }
}

States::States(const Packing& packing, const Tensor& x, int64_t layers, bool all, bool packed)
    : packing_(packing),
      hidden_(x.size(2)),
      layers_(layers),
      dtype_(kernel_dtype(x.scalar_type())),
      all_(all),
      packed_(packed) {
  std::vector<int64_t> shape = {x.size(0), x.size(1), hidden_};
  if (packed) shape = {packing.tokens(), hidden_};
  int64_t values = 1;
  for (const int64_t size : shape) values *= size;
  layer_bytes_ = values * cpu::dtype_size(dtype_);
  if (all) shape.insert(shape.begin(), layers);
  out_ = empty(shape, x.scalar_type());
  if (!packed && packing.tokens() != x.size(0) * x.size(1))
    std::memset(out_.mutable_data_ptr(), 0, static_cast<size_t>((all ? layers : 1) * layer_bytes_));
}

void States::store(void* context, int64_t layer, const float* rows) {
  States& s = *static_cast<States*>(context);
  if (!s.all_ && layer + 1 != s.layers_) return;
  char* out = static_cast<char*>(s.out_.mutable_data_ptr()) + (s.all_ ? layer * s.layer_bytes_ : 0);
  const cpu::RowKernels& kernels = cpu::row_kernels();
  if (s.packed_) return kernels.store_row(rows, s.packing_.tokens() * s.hidden_, s.dtype_, out);
  const int64_t row_bytes = s.hidden_ * cpu::dtype_size(s.dtype_);
  for (const int64_t row : s.packing_.source) {
    kernels.store_row(rows, s.hidden_, s.dtype_, out + row * row_bytes);
    rows += s.hidden_;
  }
}

}  // namespace bertkern::ops
