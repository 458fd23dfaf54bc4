// Baseline processor, any architecture: the compiler chooses the instructions, so these are rates that plain C++
// reaches rather than the limits of the hardware.
#include "cpu/probe/probe.h"

namespace bertkern::cpu::probe::portable {
namespace {

constexpr int kLength = 2048;  // both operands of the int8 loop stay in the first-level cache

void run_int8(std::int64_t iterations) {
  alignas(64) std::int8_t a[kLength], b[kLength];
  for (int i = 0; i < kLength; ++i) a[i] = std::int8_t(i % 251 - 125), b[i] = std::int8_t(i % 241 - 120);
  volatile std::int32_t sink = 0;
  for (std::int64_t n = 0; n < iterations; ++n) {
    a[n % kLength] = std::int8_t(n);  // so that no sum can be taken over from the last round
    std::int32_t sum = 0;
    for (int i = 0; i < kLength; ++i) sum += std::int32_t(a[i]) * std::int32_t(b[i]);
    sink = sum;
  }
  (void)sink;
}

constexpr int kLanes = 64;  // 16 registers of four: as many as baseline x86-64 has

void run_fp32(std::int64_t iterations) {
  float sums[kLanes];
  volatile float factor = 0.999f, term = 0.001f;
  const float f = factor, t = term;
  for (int i = 0; i < kLanes; ++i) sums[i] = float(i);
  for (std::int64_t n = 0; n < iterations; ++n) {
    for (int i = 0; i < kLanes; ++i) sums[i] = sums[i] * f + t;
  }
  volatile float sink = 0;
  for (int i = 0; i < kLanes; ++i) sink = sums[i];
  (void)sink;
}

std::uint64_t read(const void* data, std::size_t bytes) {
  const std::uint64_t* words = static_cast<const std::uint64_t*>(data);
  std::uint64_t sums[8] = {};
  for (std::size_t i = 0; i < bytes / 8; i += 8) {
    for (int lane = 0; lane < 8; ++lane) sums[lane] += words[i + lane];
  }
  std::uint64_t sum = 0;
  for (const std::uint64_t part : sums) sum += part;
  return sum;
}

}  // namespace

Probes probes() { return {{run_int8, kLength}, {}, {run_fp32, kLanes}, read}; }

}  // namespace bertkern::cpu::probe::portable
