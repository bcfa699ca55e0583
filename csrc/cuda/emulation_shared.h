// The shared memory of emulated blocks: what overruns it, or is read before it was written, shows.
#pragma once

#include <link.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

#include "emulation_fiber.h"  // C2C_ADDRESS_SANITIZER

// Static arrays become thread-local ones: those of a library lie side by side and can be found,
// which a section of their own does not achieve in templates (GCC 12). A library of kernels must
// therefore have no other thread-local variable.
#define __shared__ static thread_local

namespace c2c {
namespace emulation {

constexpr unsigned char kPoison = 0xff;  // NaN in every floating-point type

inline bool within(const void* p, std::size_t bytes, const void* begin, std::size_t size) {
  const auto at = reinterpret_cast<std::uintptr_t>(p);
  const auto first = reinterpret_cast<std::uintptr_t>(begin);
  return at >= first && bytes <= size && at - first <= size - bytes;
}

// The static arrays of all kernels, of this thread of the host.
class StaticShared {
 public:
  StaticShared() {
    static thread_local unsigned char one_of_them;
    one_of_them_ = &one_of_them;
    dl_iterate_phdr(&StaticShared::look_at_library, this);
    if (!begin_) throw std::runtime_error("c2c_ext emulation: found no thread-local variables");
  }
  bool holds(const void* p, std::size_t bytes) const { return within(p, bytes, begin_, bytes_); }
  void poison() { std::memset(begin_, kPoison, bytes_); }

 private:
  static int look_at_library(dl_phdr_info* info, std::size_t, void* self) {
    auto& found = *static_cast<StaticShared*>(self);
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      const auto& part = info->dlpi_phdr[i];
      if (part.p_type == PT_TLS && info->dlpi_tls_data &&
          within(found.one_of_them_, 1, info->dlpi_tls_data, part.p_memsz)) {
        found.begin_ = info->dlpi_tls_data;
        found.bytes_ = part.p_memsz;
        return 1;
      }
    }
    return 0;
  }
  const void* one_of_them_;
  void* begin_ = nullptr;
  std::size_t bytes_ = 0;
};

// The block's dynamic shared memory, with a margin on both sides that nobody may touch.
class SharedMemory {
 public:
  explicit SharedMemory(std::size_t bytes) : bytes_(bytes) {
    void* memory = nullptr;
    if (posix_memalign(&memory, kMargin, bytes + 2 * kMargin) != 0) throw std::bad_alloc();
    memory_ = static_cast<unsigned char*>(memory);
    std::memset(memory_, kUntouched, kMargin);
    std::memset(memory_ + kMargin + bytes, kUntouched, kMargin);
#if defined(C2C_ADDRESS_SANITIZER)
    ASAN_POISON_MEMORY_REGION(memory_, kMargin);
    ASAN_POISON_MEMORY_REGION(memory_ + kMargin + bytes, kMargin);
#endif
  }
  ~SharedMemory() {
#if defined(C2C_ADDRESS_SANITIZER)
    ASAN_UNPOISON_MEMORY_REGION(memory_, bytes_ + 2 * kMargin);
#endif
    std::free(memory_);
  }
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  unsigned char* data() const { return memory_ + kMargin; }
  bool holds(const void* p, std::size_t bytes) const { return within(p, bytes, data(), bytes_); }
  bool margins_intact() const {
#if !defined(C2C_ADDRESS_SANITIZER)  // which has stopped the program at the write
    for (std::size_t i = 0; i < kMargin; ++i) {
      if (memory_[i] != kUntouched || memory_[kMargin + bytes_ + i] != kUntouched) return false;
    }
#endif
    return true;
  }
  void poison() { std::memset(data(), kPoison, bytes_); }

 private:
  static constexpr std::size_t kMargin = 128;
  static constexpr unsigned char kUntouched = 0xa5;
  unsigned char* memory_;
  std::size_t bytes_;
};

}  // namespace emulation
}  // namespace c2c
