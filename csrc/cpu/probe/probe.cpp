#include "cpu/probe/probe.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>
#include <thread>
#include <vector>

namespace bertkern::cpu::probe {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Calls visit(probes) for every level up to `isa`, the lowest first.
template <typename Visit>
void for_each_level([[maybe_unused]] Isa isa, const Visit& visit) {
  visit(portable::probes());
#if defined(__x86_64__)
  if (isa >= Isa::avx2) visit(avx2::probes());
  if (isa >= Isa::avx512) visit(avx512::probes());
  if (isa >= Isa::avx512vnni) visit(avx512vnni::probes());
  if (isa >= Isa::avx512bf16) visit(avx512bf16::probes());
  if (isa >= Isa::amx) visit(amx::probes());
#endif
}

// Runs work(0) ... work(threads - 1) at the same time, the first on the calling thread.
template <typename Work>
void run_together(int threads, const Work& work) {
  std::vector<std::thread> team;
  for (int index = 1; index < threads; ++index) team.emplace_back(work, index);
  work(0);
  for (std::thread& member : team) member.join();
}

// Multiply-accumulates a second: the best of runs long enough for the clock and short enough to fit between
// interruptions.
double rate(const Loop& loop, double seconds) {
  std::int64_t iterations = 256;
  double best = 0;
  for (const Clock::time_point start = Clock::now(); seconds_since(start) < seconds;) {
    const Clock::time_point begin = Clock::now();
    loop.run(iterations);
    const double elapsed = seconds_since(begin);
    best = std::max(best, double(loop.macs) * double(iterations) / elapsed);
    if (elapsed < 2e-4) iterations *= 2;
  }
  return best;
}

}  // namespace

double peak(Type type, Isa isa, int threads, double seconds) {
  std::vector<Loop> loops;
  for_each_level(isa, [&](const Probes& probes) {
    const Loop& loop = type == Type::int8 ? probes.int8 : type == Type::bf16 ? probes.bf16 : probes.fp32;
    if (loop.run) loops.push_back(loop);
  });
  if (loops.empty()) return peak(Type::fp32, isa, threads, seconds);  // without bf16 kernels widen to fp32

  // Wider registers are not always faster (Zen 4's 512-bit vpmaddwd is not), so every level has its turn.
  double best = 0;
  for (const Loop& loop : loops) {
    std::vector<double> rates(std::size_t(threads), 0.0);
    run_together(threads, [&](int index) { rates[std::size_t(index)] = rate(loop, seconds / double(loops.size())); });
    best = std::max(best, std::accumulate(rates.begin(), rates.end(), 0.0));
  }
  return best / 1e9;
}

double read_bandwidth(Isa isa, int threads, std::size_t bytes) {
  std::uint64_t (*read)(const void*, std::size_t) = nullptr;
  for_each_level(isa, [&](const Probes& probes) { read = probes.read ? probes.read : read; });

  constexpr std::size_t kMiB = std::size_t(1) << 20;
  if (bytes == 0) bytes = std::clamp(4 * cache_sizes().l3, 64 * kMiB, 1024 * kMiB);
  const std::size_t part = (bytes / std::size_t(threads) + kMiB - 1) / kMiB * kMiB;
  bytes = part * std::size_t(threads);

  const auto release = [](void* data) { ::operator delete(data, std::align_val_t(4096)); };
  std::unique_ptr<void, decltype(release)> buffer(::operator new(bytes, std::align_val_t(4096)), release);
  std::memset(buffer.get(), 1, bytes);  // untouched pages would all be the same zero page

  double best = 0;
  for (int pass = 0; pass < 5; ++pass) {
    std::vector<double> times(std::size_t(threads), 0.0);
    run_together(threads, [&](int index) {
      const Clock::time_point begin = Clock::now();
      volatile std::uint64_t sink = read(static_cast<const char*>(buffer.get()) + part * std::size_t(index), part);
      (void)sink;
      times[std::size_t(index)] = seconds_since(begin);
    });
    best = std::max(best, double(bytes) / *std::max_element(times.begin(), times.end()));
  }
  return best / 1e9;
}

}  // namespace bertkern::cpu::probe
