// Memory that a thread keeps between calls: fresh pages cost more than a small layer takes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "cpu/pages.h"

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
    const size_t bytes = static_cast<size_t>(count) * sizeof(T) + 4096;
    if (bytes > size_) {
      const size_t page = bytes >= kHugePage ? kHugePage : 4096;
      const size_t rounded = (bytes + page - 1) / page * page;
      std::free(data_);
      data_ = std::aligned_alloc(page, rounded);
      size_ = data_ ? rounded : 0;
      if (!data_) throw std::bad_alloc();
      advise_huge(data_, rounded);
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
