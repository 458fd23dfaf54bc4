// What this processor's arithmetic units and memory can do at most, so that a kernel's speed can be given as a share.
//
// Arithmetic: chains of multiply-accumulate instructions on registers alone, enough of them in flight to hide their
// latency. Memory: the plainest reading loop over a buffer that no cache holds.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/isa.h"

namespace bertkern::cpu::probe {

enum class Type { int8, bf16, fp32 };

struct Loop {
  void (*run)(std::int64_t iterations);
  int macs;  // multiply-accumulates in one iteration
};

// A null entry means that this level has nothing better than the one below it.
struct Probes {
  Loop int8, bf16, fp32;
  std::uint64_t (*read)(const void* data, std::size_t bytes);  // bytes % 1024 == 0, data aligned to 64 bytes
};

namespace portable {
Probes probes();
}
#if defined(__x86_64__)
namespace avx2 {
Probes probes();
}
namespace avx512 {
Probes probes();
}
namespace avx512vnni {
Probes probes();
}
namespace avx512bf16 {
Probes probes();
}
namespace amx {
Probes probes();
}
#endif

// 10^9 multiply-accumulates a second of `threads` threads together, each in its own registers, with the best
// instructions up to this level; measured for about `seconds`.
double peak(Type type, Isa isa, int threads = 1, double seconds = 0.005);

// 10^9 bytes a second read from memory by `threads` threads together, each over its own part of a buffer of `bytes`
// (0: four times the last-level cache, at least 64 MiB, at most 1 GiB). The best of five passes.
double read_bandwidth(Isa isa, int threads = 1, std::size_t bytes = 0);

}  // namespace bertkern::cpu::probe
