// AVX-512 BF16: vdpbf16ps, two products a lane and step; scores of codes by vpdpbusd, four.
#include "cpu/attention/body.h"
#include "cpu/attention/operand_bf16.h"
#include "cpu/attention/score_s8.h"

namespace bertkern::cpu {
namespace {

struct Operand_bf16 {
  using Score = Score_bf16;
  using Value = Value_bf16;
};
struct Operand_s8_bf16 {
  using Score = Score_s8;
  using Value = Value_bf16;
};

}  // namespace
}  // namespace bertkern::cpu

BERTKERN_DEFINE_ATTENTION(bf16, avx512bf16, 14)
BERTKERN_DEFINE_ATTENTION(s8_bf16, avx512bf16, 14)
