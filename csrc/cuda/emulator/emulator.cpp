// Threads as fibers, their meeting points, memory and its checks; instructions.cpp has what warps compute together.
#include "cuda/emulator/emulator.h"

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
int lane() { return static_cast<int>(active->current % 32); }

bool is_shared(const void* pointer) {
  const char* p = static_cast<const char*>(pointer);
  return p >= memory().arena() && p < memory().arena() + kArena;
}

void check(const void* pointer, size_t bytes, bool write) {
  if (!active) return;
  const char* p = static_cast<const char*>(pointer);
  if (is_shared(p)) return check_shared(p, bytes, write);
  for (const Tensor& t : tensors) {
    if (p + bytes <= t.guard_begin || p >= t.guard_end || (p >= t.begin && p + bytes <= t.end)) continue;
    fail("%s %zu bytes at byte %td of a tensor of %td", write ? "writes" : "reads", bytes, p - t.begin,
         t.end - t.begin);
  }
}

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

void warp_sync(int line) {
  meet("warp_sync", line, nullptr, active->warps.data() + active->current / 32,
       [](const void* const(&)[32], void* const(&out)[32]) { ++static_cast<Warp*>(out[0])->syncs; });
}

// --- asynchronous copies ---------------------------------------------------------------------------------------------

void cp_async(void* smem, const void* gmem, int size, int bytes) {
  if (bytes < 0 || bytes > size) fail("cp_async: %d bytes of %d", bytes, size);
  if (reinterpret_cast<uintptr_t>(smem) % size || (bytes && reinterpret_cast<uintptr_t>(gmem) % size))
    fail("cp_async%d: expected addresses that are multiples of %d", size, size);
  char* to = static_cast<char*>(smem);
  if (!is_shared(to)) fail("cp_async%d: the target is not shared memory", size);
  check(to, size, true);
  if (bytes) check(gmem, bytes, false);
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
      check(copy.smem, copy.size, true);
    }
}

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
