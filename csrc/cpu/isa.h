// What the processor and the operating system allow, read once.
//
// Kernels come in one file per instruction set (csrc/cpu/<op>/{portable,avx2,avx512,avx512vnni,avx512bf16,amx}.cpp),
// each compiled with its own flags. Dispatch code picks the best one not above active_isa(). This file and everything
// that is not such a kernel is compiled for the baseline processor, so that the library loads anywhere.
#pragma once

#include <cstddef>

namespace bertkern::cpu {

// Each level includes all those before it.
enum class Isa : int {
  portable = 0,    // baseline C++: x86-64 as the ABI defines it, or any other architecture
  avx2 = 1,        // AVX2, FMA, F16C
  avx512 = 2,      // + AVX-512 F, BW, VL, DQ (Skylake-X)
  avx512vnni = 3,  // + AVX-512 VNNI (Cascade Lake, Ice Lake)
  avx512bf16 = 4,  // + AVX-512 BF16 (Cooper Lake, Zen 4)
  amx = 5,         // + AMX TILE, INT8, BF16 (Sapphire Rapids)
};

inline constexpr int kIsaCount = 6;

// The best level that this processor has and whose registers the operating system saves. Asks Linux for those of AMX,
// which it gives a process on request alone.
Isa detected_isa();

// detected_isa() capped by the environment variable BERTKERN_CPU_ISA (the name of a level), which is read at the first
// call. A cap above the detected level changes nothing and prints one warning (unless `warn` is false).
// Throws std::runtime_error, at every call, where the variable holds no level's name.
Isa active_isa(bool warn = true);

// "portable", "avx2", ...: the names that BERTKERN_CPU_ISA takes.
const char* isa_name(Isa isa);

// Bytes of one instance of each data cache, as seen from one core; L3 is shared between cores. 0 where there is no such
// cache, a cautious guess for L1 and L2 where neither the processor nor the system tells.
struct CacheSizes {
  std::size_t l1d;
  std::size_t l2;
  std::size_t l3;
};

const CacheSizes& cache_sizes();

// Marketing name of the processor, "" where unknown.
const char* cpu_brand();

}  // namespace bertkern::cpu
