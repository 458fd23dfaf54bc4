// AVX-512 VNNI: scores of codes by vpdpbusd, four products a lane and step; values in fp32.
#include "cpu/attention/body.h"
#include "cpu/attention/score_s8.h"

namespace bertkern::cpu {
namespace {

struct Operand_s8_f32 {
  using Score = Score_s8;
  using Value = Value_f32;
};

}  // namespace
}  // namespace bertkern::cpu

BERTKERN_DEFINE_ATTENTION(s8_f32, avx512vnni, 14)
