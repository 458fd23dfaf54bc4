#include "cuda/emulator/emulator.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <stdarg.h>
#include <stdio.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <deque>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace bertkern::cuda::emulator {
namespace {

constexpr size_t kStack = 128 * 1024, kMostThreads = 1024, kMostShared = 227 * 1024, kMostStaticShared = 48 * 1024;
constexpr size_t kArena = kMostShared + 64 * 1024;  // with gaps between the arrays
constexpr int kPoison = 0xff;

// --- changing from one stack to another ------------------------------------------------------------------------------

#if defined(__x86_64__) && defined(__linux__)
extern "C" __attribute__((visibility("hidden"))) void bk_emulator_switch(void** save, void* load);
__asm__(R"(
.text
.hidden bk_emulator_switch
.globl bk_emulator_switch
.type bk_emulator_switch, @function
bk_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size bk_emulator_switch, .-bk_emulator_switch
)");

struct Context {
  void* stack_pointer = nullptr;
  void prepare(char* stack, size_t bytes, void (*entry)()) {
    // What a call of `entry` would leave behind, below six saved registers.
    void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t{15});
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    stack_pointer = top;
  }
  static void change(Context& from, Context& to) { bk_emulator_switch(&from.stack_pointer, to.stack_pointer); }
};
#else
struct Context {
  ucontext_t context;
  void prepare(char* stack, size_t bytes, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  static void change(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
};
#endif

// --- the state of a launch -------------------------------------------------------------------------------------------

struct Copy {
  char* smem;
  const char* gmem;
  int size, bytes;  // of the target, and of what is copied: zeros follow
};

enum class State { ready, at_warp, at_block, done };

struct Fiber {
  Context context;
  State state;
  uint3 thread;
  std::vector<Copy> open;              // copies since the last commit
  std::deque<std::vector<Copy>> sent;  // groups, oldest first
};

struct Warp {
  int arrived, line;
  uint32_t syncs;  // warp_syncs so far
  const char* what;
  const void* in[32];
  void* out[32];
};

struct Array {
  const void* key;
  char* data;
  size_t bytes;
};

// What happened last to a byte of shared memory, counted in barriers of all blocks so far.
struct Byte {
  uint32_t write_barriers, write_syncs, read_barriers, read_syncs;
  int16_t writer, reader, reader_warp;  // kMany: several
  int16_t copier;                       // of the copy in flight; -1: none
};
constexpr int16_t kMany = -2;

struct Launch {
  Place place;
  size_t threads = 0, shared_bytes = 0;
  void (*body)(void*) = nullptr;
  void* closure = nullptr;
  Context scheduler;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  size_t current = 0, at_barrier = 0, finished = 0;
  bool in_fiber = false;
  int barrier_line = 0;
  std::vector<Array> arrays;  // of the block: dynamic shared memory first
  char* arena_end = nullptr;
  std::string error;
};

struct Memory {
  std::unique_ptr<char[]> stacks{new char[kStack * kMostThreads]};
  std::unique_ptr<char[]> shared{new char[kArena + 256]};
  std::unique_ptr<Byte[]> history{new Byte[kArena]()};
  uint32_t barriers = 1;
  Memory() {
    for (size_t i = 0; i < kArena; ++i) history[i].copier = -1;
  }
  char* arena() { return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(shared.get()) + 255) & ~uintptr_t{255}); }
};
Memory& memory() {
  static Memory own;
  return own;
}

Launch* active = nullptr;
std::string last_error;

struct Tensor {
  const char *guard_begin, *begin, *end, *guard_end;
};
std::vector<Tensor> tensors;

Fiber& self() { return active->fibers[active->current]; }

void leave(State state) {
  Fiber& fiber = self();
  fiber.state = state;
  active->in_fiber = false;
  Context::change(fiber.context, active->scheduler);
  active->in_fiber = true;
}

std::string where() {
  char text[160];
  const uint3 b = active->place.block;
  snprintf(text, sizeof text, " (block %u, %u, %u, thread %zu)", b.x, b.y, b.z, active->current);
  return text;
}

struct Stop : std::runtime_error {
  using std::runtime_error::runtime_error;
};

void release_block() {
  for (Fiber& fiber : active->fibers)
    if (fiber.state == State::at_block) fiber.state = State::ready;
  active->at_barrier = 0;
  ++memory().barriers;
}

void entry() {
  active->in_fiber = true;
  active->body(active->closure);
  ++active->finished;
  // Those that have left do not hold up the others.
  if (active->at_barrier && active->at_barrier + active->finished == active->threads) release_block();
  leave(State::done);
  __builtin_unreachable();
}

char* add_array(const void* key, size_t bytes) {
  char* data = active->arena_end;
  if (data + bytes + 256 > memory().arena() + kArena) fail("shared memory: %zu bytes more do not fit", bytes);
  active->arrays.push_back({key, data, bytes});
  active->arena_end = data + (bytes + 127) / 128 * 128 + 128;
  return data;
}

// Two threads that touch one byte, one of them writing, need a barrier between them.
void check_shared(const char* p, size_t bytes, bool write) {
  const Array* array = nullptr;
  for (const Array& a : active->arrays)
    if (p >= a.data) array = &a;
  if (p + bytes > array->data + array->bytes)
    fail("%s bytes %td to %td of a shared array of %zu bytes", write ? "writes" : "reads", p - array->data,
         p - array->data + static_cast<ptrdiff_t>(bytes) - 1, array->bytes);
  const int16_t thread = static_cast<int16_t>(active->current), warp = static_cast<int16_t>(thread / 32);
  const uint32_t barriers = memory().barriers, syncs = active->warps[warp].syncs;
  Byte* history = memory().history.get() + (p - memory().arena());
  for (size_t i = 0; i < bytes; ++i) {
    Byte& b = history[i];
    const auto describe = [&](const char* what, int other) {
      const std::string who = other == kMany ? "several threads" : "thread " + std::to_string(other);
      fail("%s byte %td of a shared array of %zu bytes, which %s %s", write ? "writes" : "reads",
           p - array->data + static_cast<ptrdiff_t>(i), array->bytes, who.c_str(), what);
    };
    if (b.copier >= 0) describe("still has in flight (cp.async)", b.copier);
    if (b.write_barriers == barriers && b.writer != thread && (b.writer / 32 != warp || b.write_syncs == syncs))
      describe("wrote, without a barrier between them", b.writer);
    if (write) {
      if (b.read_barriers == barriers && b.reader != thread && (b.reader_warp != warp || b.read_syncs == syncs))
        describe("read, without a barrier between them", b.reader);
      b.write_barriers = barriers, b.write_syncs = syncs, b.writer = thread;
    } else {
      const bool first = b.read_barriers != barriers;
      b.reader = first || b.reader == thread ? thread : kMany;
      b.reader_warp = first || b.reader_warp == warp ? warp : kMany;
      b.read_barriers = barriers, b.read_syncs = syncs;
    }
  }
}

bool is_shared(const char* p) { return p >= memory().arena() && p < memory().arena() + kArena; }

void check_access(const void* pointer, size_t bytes, bool write) {
  if (!active) return;
  const char* p = static_cast<const char*>(pointer);
  if (is_shared(p)) return check_shared(p, bytes, write);
  for (const Tensor& t : tensors) {
    if (p + bytes <= t.guard_begin || p >= t.guard_end || (p >= t.begin && p + bytes <= t.end)) continue;
    fail("%s %zu bytes at byte %td of a tensor of %td", write ? "writes" : "reads", bytes, p - t.begin,
         t.end - t.begin);
  }
}

// Copies that nobody waited for end with their thread.
void forget_copies(Fiber& fiber) {
  fiber.sent.push_back(std::move(fiber.open));
  for (const std::vector<Copy>& copies : fiber.sent)
    for (const Copy& copy : copies)
      for (int i = 0; i < copy.size; ++i) memory().history[copy.smem - memory().arena() + i].copier = -1;
  fiber.open.clear();
  fiber.sent.clear();
}

void run_block() {
  Launch& launch = *active;
  if (launch.arena_end) memset(memory().arena(), kPoison, launch.arena_end - memory().arena());
  ++memory().barriers;
  launch.arrays.clear();
  launch.arena_end = memory().arena();
  add_array(nullptr, launch.shared_bytes);
  for (Warp& warp : launch.warps) warp.arrived = 0;
  launch.at_barrier = launch.finished = 0;
  for (size_t t = 0; t < launch.threads; ++t) {
    Fiber& fiber = launch.fibers[t];
    fiber.state = State::ready;
    fiber.context.prepare(memory().stacks.get() + t * kStack, kStack, entry);
  }
  const uint3 b = launch.place.block;
  const bool descending = (b.x + b.y + b.z) % 2;
  while (launch.finished < launch.threads) {
    bool moved = false;
    for (size_t i = 0; i < launch.threads; ++i) {
      const size_t t = descending ? launch.threads - 1 - i : i;
      if (launch.fibers[t].state != State::ready) continue;
      launch.current = t;
      launch.place.thread = launch.fibers[t].thread;
      Context::change(launch.scheduler, launch.fibers[t].context);
      if (!launch.error.empty()) return;
      moved = true;
    }
    if (moved) continue;
    for (size_t t = 0; t < launch.threads; ++t) {
      if (launch.fibers[t].state != State::at_warp) continue;
      launch.current = t;
      const Warp& warp = launch.warps[t / 32];
      fail("%s of line %d: only %d of 32 lanes came", warp.what, warp.line, warp.arrived);
    }
    fail("the threads wait for each other");
  }
}

}  // namespace

void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  if (!active->in_fiber) throw Stop(text + where());
  // A fiber is left as it stands: its frames, compiled with calls that "cannot throw", need not be unwound.
  active->error = text + where();
  leave(State::done);
  __builtin_unreachable();
}

const Place& place() { return active->place; }

cudaError_t run(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* closure) {
  last_error.clear();
  Launch launch;
  launch.threads = static_cast<size_t>(block.x) * block.y * block.z;
  if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535 || !launch.threads ||
      launch.threads > kMostThreads || block.z > 64 || shared_bytes > kMostShared) {
    last_error = "a grid, a block or shared memory that no card allows";
    return cudaErrorInvalidConfiguration;
  }
  launch.place = {grid, block, {}, {}};
  launch.arena_end = memory().arena() + kArena;
  launch.shared_bytes = shared_bytes;
  launch.body = body;
  launch.closure = closure;
  launch.fibers.resize(launch.threads);
  launch.warps.resize((launch.threads + 31) / 32);
  for (size_t t = 0; t < launch.threads; ++t)
    launch.fibers[t].thread = {static_cast<unsigned>(t % block.x), static_cast<unsigned>(t / block.x % block.y),
                               static_cast<unsigned>(t / block.x / block.y)};
  active = &launch;
  try {
    for (unsigned z = 0; z < grid.z && launch.error.empty(); ++z)
      for (unsigned y = 0; y < grid.y && launch.error.empty(); ++y)
        for (unsigned x = 0; x < grid.x && launch.error.empty(); ++x) {
          launch.place.block = {x, y, z};
          run_block();
          for (Fiber& fiber : launch.fibers) forget_copies(fiber);
        }
  } catch (const Stop& error) {
    launch.error = error.what();
  }
  for (Fiber& fiber : launch.fibers) forget_copies(fiber);
  active = nullptr;
  last_error = launch.error;
  return launch.error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

char* dynamic_shared() { return active->arrays[0].data; }

void* static_shared(const void* key, size_t bytes) {
  size_t all = 0;
  for (const Array& a : active->arrays) {
    if (a.key == key) return a.data;
    if (a.key) all += a.bytes;
  }
  if (all + bytes > kMostStaticShared) fail("static shared memory of %zu bytes: 48 KB is the limit", all + bytes);
  return add_array(key, bytes);
}

void meet(const char* what, int line, const void* in, void* out,
          void (*combine)(const void* const (&in)[32], void* const (&out)[32])) {
  Warp& warp = active->warps[active->current / 32];
  const size_t first = active->current / 32 * 32;
  if (first + 32 > active->threads) fail("%s of line %d: the block's last warp is not complete", what, line);
  if (!warp.arrived) {
    warp.what = what, warp.line = line;
  } else if (warp.line != line || strcmp(warp.what, what)) {
    fail("lanes part: some are at %s of line %d, this one at %s of line %d", warp.what, warp.line, what, line);
  }
  warp.in[active->current % 32] = in;
  warp.out[active->current % 32] = out;
  if (++warp.arrived < 32) {
    leave(State::at_warp);
    return;
  }
  combine(warp.in, warp.out);
  warp.arrived = 0;
  for (size_t t = first; t < first + 32; ++t)
    if (t != active->current) active->fibers[t].state = State::ready;
}

void block_sync(int line) {
  if (active->at_barrier && active->barrier_line != line)
    fail("block_sync of line %d meets the one of line %d", line, active->barrier_line);
  active->barrier_line = line;
  if (++active->at_barrier + active->finished < active->threads) {
    leave(State::at_block);
    return;
  }
  release_block();
}

// --- asynchronous copies ---------------------------------------------------------------------------------------------

void cp_async(void* smem, const void* gmem, int size, int bytes) {
  if (bytes < 0 || bytes > size) fail("cp_async: %d bytes of %d", bytes, size);
  if (reinterpret_cast<uintptr_t>(smem) % size || (bytes && reinterpret_cast<uintptr_t>(gmem) % size))
    fail("cp_async%d: expected addresses that are multiples of %d", size, size);
  char* to = static_cast<char*>(smem);
  if (!is_shared(to)) fail("cp_async%d: the target is not shared memory", size);
  check_access(to, size, true);
  if (bytes) check_access(gmem, bytes, false);
  memset(smem, kPoison, size);
  for (int i = 0; i < size; ++i)
    memory().history[to - memory().arena() + i].copier = static_cast<int16_t>(active->current);
  self().open.push_back({to, static_cast<const char*>(gmem), size, bytes});
}

void cp_async_commit() {
  self().sent.push_back(std::move(self().open));
  self().open.clear();
}

void cp_async_wait(int groups) {
  std::deque<std::vector<Copy>>& sent = self().sent;
  for (; sent.size() > static_cast<size_t>(groups); sent.pop_front())
    for (const Copy& copy : sent.front()) {
      memcpy(copy.smem, copy.gmem, copy.bytes);  // what others see is as new as the wait
      memset(copy.smem + copy.bytes, 0, copy.size - copy.bytes);
      for (int i = 0; i < copy.size; ++i) memory().history[copy.smem - memory().arena() + i].copier = -1;
      check_access(copy.smem, copy.size, true);
    }
}

// --- matrices --------------------------------------------------------------------------------------------------------

void ldmatrix(uint32_t* r, int matrices, bool transposed, const void* row, int line) {
  const int lane = static_cast<int>(active->current % 32);
  if (lane < 8 * matrices) {
    const char* from = static_cast<const char*>(row);
    if (reinterpret_cast<uintptr_t>(row) % 16) fail("ldmatrix of line %d: a row is not aligned to 16 bytes", line);
    if (!is_shared(from)) fail("ldmatrix of line %d: a row is not in shared memory", line);
    check_access(row, 16, false);
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

void warp_sync(int line) {
  meet("warp_sync", line, nullptr, active->warps.data() + active->current / 32,
       [](const void* const(&)[32], void* const(&out)[32]) { ++static_cast<Warp*>(out[0])->syncs; });
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

void check(const void* p, size_t bytes, bool write) { check_access(p, bytes, write); }

}  // namespace bertkern::cuda::emulator

using bertkern::cuda::emulator::check;
using bertkern::cuda::emulator::tensors;

#define BK_EXPORT extern "C" __attribute__((visibility("default")))
BK_EXPORT const char* bk_emulator_error() { return bertkern::cuda::emulator::last_error.c_str(); }
BK_EXPORT void bk_emulator_tensor(const char* guard_begin, const char* begin, const char* end, const char* guard_end) {
  tensors.push_back({guard_begin, begin, end, guard_end});
}
BK_EXPORT void bk_emulator_forget_tensors() { tensors.clear(); }

// What `-fsanitize=thread` calls before each access of the kernels' own code to memory. Its runtime is not linked:
// these take its place.
#define BK_ACCESS(bytes)                                                            \
  extern "C" void __tsan_read##bytes(void* p) { check(p, bytes, false); }           \
  extern "C" void __tsan_write##bytes(void* p) { check(p, bytes, true); }           \
  extern "C" void __tsan_unaligned_read##bytes(void* p) { check(p, bytes, false); } \
  extern "C" void __tsan_unaligned_write##bytes(void* p) { check(p, bytes, true); } \
  extern "C" void __tsan_volatile_read##bytes(void* p) { check(p, bytes, false); }  \
  extern "C" void __tsan_volatile_write##bytes(void* p) { check(p, bytes, true); }
BK_ACCESS(1)
BK_ACCESS(2)
BK_ACCESS(4)
BK_ACCESS(8)
BK_ACCESS(16)
extern "C" void __tsan_read_range(void* p, size_t bytes) { check(p, bytes, false); }
extern "C" void __tsan_write_range(void* p, size_t bytes) { check(p, bytes, true); }
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_init() {}
extern "C" void __tsan_vptr_read(void*) {}
extern "C" void __tsan_vptr_update(void**, void*) {}
