// Tiles of 16 rows x 64 bytes, four sums in flight: what one of them waits for, the other three hide.
#include <stdint.h>

#include "cpu/probe/probe.h"

namespace bertkern::cpu::probe::amx {
namespace {

#define BERTKERN_RUN(name, opcode)                                                                \
  void name(std::int64_t iterations) {                                                            \
    struct alignas(64) {                                                                          \
      std::uint8_t palette = 1, start_row = 0, reserved[14] = {};                                 \
      std::uint16_t bytes[16] = {64, 64, 64, 64, 64, 64};                                         \
      std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16};                                           \
    } const config;                                                                               \
    __asm__ volatile("ldtilecfg %0" : : "m"(config));                                             \
    for (std::int64_t n = 0; n < iterations; ++n)                                                 \
      __asm__ volatile(opcode " %tmm5, %tmm4, %tmm0\n\t" opcode " %tmm5, %tmm4, %tmm1\n\t" opcode \
                              " %tmm5, %tmm4, %tmm2\n\t" opcode " %tmm5, %tmm4, %tmm3");          \
    __asm__ volatile("tilerelease");                                                              \
  }
BERTKERN_RUN(run_int8, "tdpbusd")
BERTKERN_RUN(run_bf16, "tdpbf16ps")

}  // namespace

Probes probes() { return {{run_int8, 4 * 16 * 16 * 64}, {run_bf16, 4 * 16 * 16 * 32}, {}, nullptr}; }

}  // namespace bertkern::cpu::probe::amx
