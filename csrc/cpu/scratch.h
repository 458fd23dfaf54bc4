// Memory that a thread keeps between calls: fresh pages cost more than a small layer takes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace bertkern::cpu {

class Scratch {
 public:
  // `bytes` aligned to 64; the content of an earlier get() is gone.
  template <class T>
  T* get(int64_t count) {
#ifdef __SANITIZE_ADDRESS__
    // No more than was asked for and always anew, so that the sanitizer sees a step beyond it.
    std::free(data_);
    data_ = nullptr;
    if (posix_memalign(&data_, 64, static_cast<size_t>(count) * sizeof(T))) throw std::bad_alloc();
    return static_cast<T*>(data_);
#endif
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 4095) / 4096 * 4096 + 4096;
    if (bytes > size_) {
      std::free(data_);
      data_ = std::aligned_alloc(4096, bytes);
      size_ = data_ ? bytes : 0;
      if (!data_) throw std::bad_alloc();
    }
    return static_cast<T*>(data_);
  }
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace bertkern::cpu
