// Any processor: GNU vectors of four lanes.
#include "cpu/gemm/tile.h"

namespace bertkern::cpu {
namespace {

struct Dot_f32 {
  using Acc = vf;
  using Vec = vf;
  using Act = vf;
  static constexpr int kLanes = 4, kVectors = 2;
  static Acc init(const void* p, int64_t j) { return p ? vload(static_cast<const float*>(p) + j) : vset(0.0f); }
  static Vec load(const uint32_t* b) { return vload(reinterpret_cast<const float*>(b)); }
  static Act broadcast(const uint32_t* a) { return vset(bits_to_float(*a)); }
  static void step(Acc& acc, Act x, Vec w) { acc = vfma(x, w, acc); }
  static void store(void* c, Acc acc) { vstore(static_cast<float*>(c), acc); }
};

struct Dot_bf16 : Dot_f32 {
  struct Vec {
    vf low, high;
  };
  using Act = Vec;
  static Vec split(vi x) { return {as_float(x << 16), as_float(x & static_cast<int32_t>(0xffff0000u))}; }
  static Vec load(const uint32_t* b) { return split(vloadi(reinterpret_cast<const int32_t*>(b))); }
  static Act broadcast(const uint32_t* a) { return split(vseti(static_cast<int32_t>(*a))); }
  static void step(Acc& acc, Act x, Vec w) { acc = vfma(x.high, w.high, vfma(x.low, w.low, acc)); }
};

struct Dot_s8 {
  using Acc = vi;
  struct Vec {
    vi byte[4];
  };
  using Act = Vec;
  static constexpr int kLanes = 4, kVectors = 2;
  static Acc init(const void* p, int64_t j) { return p ? vloadi(static_cast<const int32_t*>(p) + j) : vseti(0); }
  static Vec load(const uint32_t* b) {
    const vi w = vloadi(reinterpret_cast<const int32_t*>(b));
    return {{(w << 24) >> 24, (w << 16) >> 24, (w << 8) >> 24, w >> 24}};
  }
  static Act broadcast(const uint32_t* a) {
    const uint32_t x = *a;
    return {{vseti(x & 255u), vseti((x >> 8) & 255u), vseti((x >> 16) & 255u), vseti(x >> 24)}};
  }
  static void step(Acc& acc, const Act& x, const Vec& w) {
    for (int i = 0; i < 4; ++i) acc += x.byte[i] * w.byte[i];
  }
  static void store(void* c, Acc acc) { vstore(static_cast<float*>(c), as_float(acc)); }
};

}  // namespace
}  // namespace bertkern::cpu

BERTKERN_DEFINE_TILES(f32, portable, 4)
BERTKERN_DEFINE_TILES(bf16, portable, 4)
BERTKERN_DEFINE_TILES(s8, portable, 4)
