#include "cpu/gemm/weights.h"

#include <algorithm>
#include <mutex>

#include "cpu/pages.h"

namespace bertkern::ops {

namespace {

constexpr int64_t kChunk = 16 << 20;

struct Chunk {
  Tensor memory;
  int64_t used = 0, size = 0;
};

Chunk make_chunk(int64_t bytes) {
  constexpr int64_t page = static_cast<int64_t>(cpu::kHugePage);
  Chunk chunk;
  chunk.size = (bytes + page - 1) / page * page + page;
  chunk.memory = empty({chunk.size}, ScalarType::Byte);
  char* data = static_cast<char*>(chunk.memory.mutable_data_ptr());
  chunk.used = (page - static_cast<int64_t>(reinterpret_cast<uintptr_t>(data) % page)) % page;
  cpu::advise_huge(data + chunk.used, static_cast<size_t>((chunk.size - chunk.used) / page * page));
  return chunk;
}

}  // namespace

Tensor empty_weights(int64_t bytes) {
  static std::mutex mutex;
  // Never destroyed: at exit torch may be gone already.
  static Chunk& open = *new Chunk;
  const std::lock_guard<std::mutex> lock(mutex);
  int64_t at = (open.used + 63) / 64 * 64;
  if (at + bytes > open.size) {
    Chunk fresh = make_chunk(std::max(bytes, kChunk));
    if (bytes >= kChunk) return torch::stable::narrow(fresh.memory, 0, fresh.used, bytes);
    open = fresh;
    at = open.used;
  }
  open.used = at + bytes;
  return torch::stable::narrow(open.memory, 0, at, bytes);
}

}  // namespace bertkern::ops
