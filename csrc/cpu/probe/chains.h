// Twelve independent accumulators, each updated once by ROUND(update): two units of latency six, or four of three, are
// kept busy, and ymm code with sixteen registers still has room for the operands. Assembly, because a compiler would
// rightly fold or merge loops whose results it can foresee (GCC 12 also copies the accumulators of vpdpbusd
// intrinsics).
#pragma once

#define BERTKERN_CHAINS(type) \
  type a0{}, a1{}, a2{}, a3{}, a4{}, a5{}, a6{}, a7{}, a8{}, a9{}, a10{}, a11 {}

#define BERTKERN_ROUND(update)                                                                                  \
  update(a0) update(a1) update(a2) update(a3) update(a4) update(a5) update(a6) update(a7) update(a8) update(a9) \
      update(a10) update(a11)

#define BERTKERN_CHAIN_COUNT 12
