#include "cpu/gemm/weights.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>

#include "cpu/pages.h"

// A tensor over memory that someone else frees. torch 2.11 brought it, after the version that is compiled against: a
// weak symbol is null where torch lacks it. (dlsym among the global symbols does not find it: Python loads torch's
// libraries as local ones.)
#if defined(__linux__)
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(void*, int64_t, const int64_t*, const int64_t*, int64_t,
                                                                int32_t, int32_t, int32_t, AtenTensorHandle*, int32_t,
                                                                const uint8_t*, int64_t, void (*)(void*, void*), void*);
#endif

namespace bertkern::ops {

namespace {

constexpr size_t kChunk = size_t{16} << 20;

struct Chunk {
  explicit Chunk(size_t bytes) : size((bytes + cpu::kHugePage - 1) / cpu::kHugePage * cpu::kHugePage) {
    data = static_cast<char*>(std::aligned_alloc(cpu::kHugePage, size));
    if (!data) throw std::bad_alloc();
    cpu::advise_huge(data, size);
  }
  ~Chunk() { std::free(data); }
  size_t size, used = 0;
  char* data;
};

using Hold = std::shared_ptr<Chunk>;

// Of the chunk that is being filled, or of one of its own where the bytes fill that.
char* take(size_t bytes, Hold& hold) {
  static std::mutex mutex;
  static Hold& open = *new Hold;  // never destroyed: tensors may outlive this library's statics
  const std::lock_guard<std::mutex> lock(mutex);
  bytes = (bytes + 63) / 64 * 64;
  if (bytes >= kChunk) {
    hold = std::make_shared<Chunk>(bytes);
    return hold->data;
  }
  if (!open || open->used + bytes > open->size) open = std::make_shared<Chunk>(kChunk);
  hold = open;
  open->used += bytes;
  return open->data + open->used - bytes;
}

}  // namespace

Tensor empty_weights(int64_t bytes) {
#if defined(__linux__)
  if (!torch_from_blob || bytes <= 0) return empty({bytes}, ScalarType::Byte);
  Hold hold;
  char* data = take(static_cast<size_t>(bytes), hold);
  Hold* context = new Hold(std::move(hold));
  const int64_t stride = 1;
  AtenTensorHandle handle = nullptr;
  const AOTITorchError error = torch_from_blob(
      data, 1, &bytes, &stride, 0, aoti_torch_dtype_uint8(), aoti_torch_device_type_cpu(), -1, &handle,
      aoti_torch_layout_strided(), nullptr, 0, [](void*, void* held) { delete static_cast<Hold*>(held); }, context);
  if (error) {
    delete context;
    return empty({bytes}, ScalarType::Byte);
  }
  return Tensor(handle);
#else
  return empty({bytes}, ScalarType::Byte);
#endif
}

}  // namespace bertkern::ops
