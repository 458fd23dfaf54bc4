#include "cpu/isa.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__x86_64__) || defined(_M_X64)
#define BERTKERN_HAVE_CPUID 1
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace bertkern::cpu {
namespace {

constexpr const char* kNames[kIsaCount] = {"portable", "avx2", "avx512", "avx512vnni", "avx512bf16", "amx"};

#if BERTKERN_HAVE_CPUID

struct Registers {
  std::uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

// All zeros where the processor does not know the leaf: no feature bit is set there.
Registers cpuid(std::uint32_t leaf, std::uint32_t subleaf = 0) {
  Registers r;
#if defined(_MSC_VER)
  int top[4], out[4];
  __cpuid(top, static_cast<int>(leaf & 0x80000000u));
  if (static_cast<std::uint32_t>(top[0]) < leaf) return r;
  __cpuidex(out, static_cast<int>(leaf), static_cast<int>(subleaf));
  r.eax = out[0], r.ebx = out[1], r.ecx = out[2], r.edx = out[3];
#else
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
#endif
  return r;
}

// Extended control register 0: which register files the operating system saves when it switches threads.
std::uint64_t xcr0() {
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  std::uint32_t low, high;  // spelled in assembly because the intrinsic needs -mxsave
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<std::uint64_t>(high) << 32) | low;
#endif
}

// Linux saves tiles only for a process that has asked for them (also for the threads that it starts afterwards).
bool may_use_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

constexpr bool bit(std::uint64_t word, int index) { return (word >> index) & 1; }

Isa detect() {
  const Registers basic = cpuid(1);
  if (!bit(basic.ecx, 27)) return Isa::portable;  // OSXSAVE: without it xgetbv is an illegal instruction

  const std::uint64_t saved = xcr0();
  const bool saves_ymm = (saved & 0x06) == 0x06;  // xmm, upper halves of ymm
  const bool saves_zmm = (saved & 0xe6) == 0xe6;  // + mask registers, upper halves of zmm0-15, zmm16-31

  const Registers wide = cpuid(7);
  const bool avx2 = bit(basic.ecx, 28) && bit(wide.ebx, 5) && bit(basic.ecx, 12) && bit(basic.ecx, 29);  // + FMA, F16C
  if (!(saves_ymm && avx2)) return Isa::portable;

  const bool avx512 = bit(wide.ebx, 16) && bit(wide.ebx, 17) && bit(wide.ebx, 30) && bit(wide.ebx, 31);  // F DQ BW VL
  if (!(saves_zmm && avx512)) return Isa::avx2;
  if (!bit(wide.ecx, 11)) return Isa::avx512;
  if (!bit(cpuid(7, 1).eax, 5)) return Isa::avx512vnni;

  const bool amx = bit(wide.edx, 22) && bit(wide.edx, 24) && bit(wide.edx, 25);  // BF16, TILE, INT8
  const bool saves_tiles = (saved & 0x60000) == 0x60000;                         // their configuration and data
  return amx && saves_tiles && may_use_tiles() ? Isa::amx : Isa::avx512bf16;
}

// Deterministic cache parameters: leaf 4 on Intel, 0x8000001D in the same layout on AMD, where leaf 4 is empty.
void read_caches_from_cpuid(CacheSizes& sizes) {
  for (const std::uint32_t leaf : {4u, 0x8000001Du}) {
    for (std::uint32_t index = 0; index < 16; ++index) {
      const Registers r = cpuid(leaf, index);
      const std::uint32_t type = r.eax & 0x1f;  // 0 no more, 1 data, 2 instructions, 3 unified
      if (type == 0) break;
      if (type == 2) continue;
      const std::size_t bytes = (std::size_t(r.ebx >> 22) + 1) * (((r.ebx >> 12) & 0x3ff) + 1) * ((r.ebx & 0xfff) + 1) *
                                (std::size_t(r.ecx) + 1);  // ways x partitions x line bytes x sets
      switch ((r.eax >> 5) & 0x7) {
        case 1:
          sizes.l1d = bytes;
          break;
        case 2:
          sizes.l2 = bytes;
          break;
        case 3:
          sizes.l3 = bytes;
          break;
        default:
          break;
      }
    }
    if (sizes.l1d) return;
  }
}

#else

Isa detect() { return Isa::portable; }

#endif  // BERTKERN_HAVE_CPUID

#if defined(__linux__)
void read_caches_from_sysfs(CacheSizes& sizes) {
  for (int index = 0; index < 8; ++index) {
    const auto read = [index](const char* name, const char* format, auto* value) {
      const std::string path =
          "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/" + std::string(name);
      std::FILE* file = std::fopen(path.c_str(), "r");
      if (!file) return false;
      const bool found = std::fscanf(file, format, value) == 1;
      std::fclose(file);
      return found;
    };
    int level = 0;
    unsigned long kibibytes = 0;
    char type[16] = "";
    if (!read("level", "%d", &level) || !read("type", "%15s", type) || !read("size", "%luK", &kibibytes)) continue;
    if (std::strcmp(type, "Instruction") == 0) continue;
    if (level == 1) sizes.l1d = kibibytes << 10;
    if (level == 2) sizes.l2 = kibibytes << 10;
    if (level == 3) sizes.l3 = kibibytes << 10;
  }
}
#endif

#if defined(__APPLE__)
std::size_t sysctl_size(const char* name) {
  std::uint64_t value = 0;
  std::size_t size = sizeof(value);
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 ? static_cast<std::size_t>(value) : 0;
}
#endif

CacheSizes read_caches() {
  CacheSizes sizes{};
#if BERTKERN_HAVE_CPUID
  read_caches_from_cpuid(sizes);
#endif
#if defined(__linux__)
  if (!sizes.l1d) read_caches_from_sysfs(sizes);
#endif
#if defined(__APPLE__)
  if (!sizes.l1d)
    sizes = {sysctl_size("hw.l1dcachesize"), sysctl_size("hw.l2cachesize"), sysctl_size("hw.l3cachesize")};
#endif
  if (!sizes.l1d) sizes.l1d = std::size_t(32) << 10;
  if (!sizes.l2) sizes.l2 = std::size_t(256) << 10;
  return sizes;
}

std::string read_brand() {
#if BERTKERN_HAVE_CPUID
  char text[49] = "";
  for (std::uint32_t part = 0; part < 3; ++part) {
    const Registers r = cpuid(0x80000002u + part);
    std::memcpy(text + 16 * part, &r, 16);
  }
  std::string brand(text);
  brand.erase(0, brand.find_first_not_of(' '));
  brand.erase(brand.find_last_not_of(' ') + 1);
  return brand;
#else
  return "";
#endif
}

Isa resolve(bool warn) {
  const Isa detected = detected_isa();
  const char* cap = std::getenv("BERTKERN_CPU_ISA");
  if (!cap || !*cap) return detected;

  for (int level = 0; level < kIsaCount; ++level) {
    if (std::strcmp(cap, kNames[level]) != 0) continue;
    if (level <= static_cast<int>(detected)) return static_cast<Isa>(level);
    if (warn) {
      std::fprintf(stderr, "bertkern: BERTKERN_CPU_ISA=%s is more than this processor has; using %s.\n", cap,
                   isa_name(detected));
    }
    return detected;
  }
  std::string message = "BERTKERN_CPU_ISA: expected one of ";
  for (int level = 0; level < kIsaCount; ++level) message += std::string(level ? ", " : "") + kNames[level];
  throw std::runtime_error(message + ". Got '" + cap + "'.");
}

}  // namespace

Isa detected_isa() {
  static const Isa isa = detect();
  return isa;
}

Isa active_isa(bool warn) {
  static const Isa isa = resolve(warn);  // a throw leaves it unset: the next call reads, and throws, again
  return isa;
}

const char* isa_name(Isa isa) {
  const int level = static_cast<int>(isa);
  return level >= 0 && level < kIsaCount ? kNames[level] : "unknown";
}

const CacheSizes& cache_sizes() {
  static const CacheSizes sizes = read_caches();
  return sizes;
}

const char* cpu_brand() {
  static const std::string brand = read_brand();
  return brand.c_str();
}

}  // namespace bertkern::cpu
