// The instructions that a warp's lanes carry out together, and atomics.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "cuda/emulator/emulator.h"

namespace bertkern::cuda::emulator {

// --- matrices --------------------------------------------------------------------------------------------------------

void ldmatrix(uint32_t* r, int matrices, bool transposed, const void* row, int line) {
  if (lane() < 8 * matrices) {
    if (reinterpret_cast<uintptr_t>(row) % 16) fail("ldmatrix of line %d: a row is not aligned to 16 bytes", line);
    if (!is_shared(row)) fail("ldmatrix of line %d: a row is not in shared memory", line);
    check(row, 16, false);
  }
  struct Load {
    const void* row;
    int matrices;
    bool transposed;
  } mine{row, matrices, transposed};
  meet(transposed ? "ldmatrix.trans" : "ldmatrix", line, &mine, r,
       [](const void* const(&in)[32], void* const(&out)[32]) {
         const Load& load = *static_cast<const Load*>(in[0]);
         for (int j = 0; j < load.matrices; ++j) {
           uint16_t matrix[8][8];
           for (int i = 0; i < 8; ++i) memcpy(matrix[i], static_cast<const Load*>(in[8 * j + i])->row, 16);
           for (int l = 0; l < 32; ++l) {
             const int g = l / 4, t = l % 4;
             const uint32_t low = load.transposed ? matrix[2 * t][g] : matrix[g][2 * t];
             const uint32_t high = load.transposed ? matrix[2 * t + 1][g] : matrix[g][2 * t + 1];
             static_cast<uint32_t*>(out[l])[j] = low | high << 16;
           }
         }
       });
}

namespace {

struct Fragments {
  const uint32_t *a, *b;
  Operand type;
};

int byte_of(uint32_t word, int i) { return static_cast<int>(word >> 8 * i & 0xff); }

float element(uint32_t word, int i, Operand type) {
  if (type == Operand::e4m3) {
    __nv_fp8_e4m3 x;
    x.__x = static_cast<__nv_fp8_storage_t>(byte_of(word, i));
    return static_cast<float>(x);
  }
  const uint16_t bits = static_cast<uint16_t>(word >> 16 * i);
  if (type == Operand::f16) return __half2float(__half(__half_raw{bits}));
  return __bfloat162float(__nv_bfloat16(__nv_bfloat16_raw{bits}));
}

}  // namespace

void mma_int(int32_t* c, const uint32_t* a, const uint32_t* b, Operand a_type, int line) {
  const Fragments mine{a, b, a_type};
  meet(a_type == Operand::u8 ? "mma.m16n8k32.u8.s8" : "mma.m16n8k32.s8.s8", line, &mine, c,
       [](const void* const(&in)[32], void* const(&out)[32]) {
         int32_t A[16][32], B[32][8];
         for (int lane = 0; lane < 32; ++lane) {
           const Fragments& f = *static_cast<const Fragments*>(in[lane]);
           const int g = lane / 4, t = lane % 4;
           for (int r = 0; r < 4; ++r)
             for (int e = 0; e < 4; ++e) {
               const int x = byte_of(f.a[r], e);
               A[g + 8 * (r % 2)][4 * t + 16 * (r / 2) + e] = f.type == Operand::u8 ? x : static_cast<int8_t>(x);
             }
           for (int r = 0; r < 2; ++r)
             for (int e = 0; e < 4; ++e) B[4 * t + 16 * r + e][g] = static_cast<int8_t>(byte_of(f.b[r], e));
         }
         for (int lane = 0; lane < 32; ++lane) {
           int32_t* const d = static_cast<int32_t*>(out[lane]);
           for (int i = 0; i < 4; ++i) {
             const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
             int32_t sum = 0;
             for (int k = 0; k < 32; ++k) sum += A[row][k] * B[k][column];
             d[i] = static_cast<int32_t>(static_cast<uint32_t>(d[i]) + static_cast<uint32_t>(sum));
           }
         }
       });
}

void mma_float(float* c, const uint32_t* a, const uint32_t* b, Operand type, int line) {
  const Fragments mine{a, b, type};
  const char* what = type == Operand::e4m3  ? "mma.m16n8k32.e4m3"
                     : type == Operand::f16 ? "mma.m16n8k16.f16"
                                            : "mma.m16n8k16.bf16";
  meet(what, line, &mine, c, [](const void* const(&in)[32], void* const(&out)[32]) {
    float A[16][32], B[32][8];
    const int each = static_cast<const Fragments*>(in[0])->type == Operand::e4m3 ? 4 : 2;  // elements of a register
    for (int lane = 0; lane < 32; ++lane) {
      const Fragments& f = *static_cast<const Fragments*>(in[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int r = 0; r < 4; ++r)
        for (int e = 0; e < each; ++e) A[g + 8 * (r % 2)][each * (t + 4 * (r / 2)) + e] = element(f.a[r], e, f.type);
      for (int r = 0; r < 2; ++r)
        for (int e = 0; e < each; ++e) B[each * (t + 4 * r) + e][g] = element(f.b[r], e, f.type);
    }
    for (int lane = 0; lane < 32; ++lane) {
      float* const d = static_cast<float*>(out[lane]);
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
        double sum = d[i];  // the card's own order and width of accumulation are not documented
        for (int k = 0; k < 8 * each; ++k) sum += static_cast<double>(A[row][k]) * B[k][column];
        d[i] = static_cast<float>(sum);
      }
    }
  });
}

// --- shuffles --------------------------------------------------------------------------------------------------------

uint64_t shuffle(const Shuffle& mine, int line) {
  uint64_t got = 0;
  meet("a shuffle", line, &mine, &got, [](const void* const(&in)[32], void* const(&out)[32]) {
    for (int lane = 0; lane < 32; ++lane) {
      const int source = static_cast<const Shuffle*>(in[lane])->source & 31;
      *static_cast<uint64_t*>(out[lane]) = static_cast<const Shuffle*>(in[source])->value;
    }
  });
  return got;
}

uint32_t ballot(bool v, int line) {
  uint32_t got = 0;
  meet("a ballot", line, &v, &got, [](const void* const(&in)[32], void* const(&out)[32]) {
    uint32_t votes = 0;
    for (int lane = 0; lane < 32; ++lane) votes |= static_cast<uint32_t>(*static_cast<const bool*>(in[lane])) << lane;
    for (int lane = 0; lane < 32; ++lane) *static_cast<uint32_t*>(out[lane]) = votes;
  });
  return got;
}

// Fibers change only at meeting points: nothing comes between. Atomics of several threads are no race.
int atomic_add(int* p, int v) {
  const int old = *p;
  *p = static_cast<int>(static_cast<uint32_t>(old) + static_cast<uint32_t>(v));
  return old;
}
float atomic_add(float* p, float v) {
  const float old = *p;
  *p = old + v;
  return old;
}

}  // namespace bertkern::cuda::emulator
