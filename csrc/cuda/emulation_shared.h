// The shared memory of emulated blocks: what overruns it, or is read before it was written, shows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "emulation_fiber.h"  // C2C_ADDRESS_SANITIZER

// Static __shared__ arrays lie in one section, so that they can be filled before a block. GCC refuses
// to put those of external templates beside others: kernels belong into an unnamed namespace.
#define __shared__ static __attribute__((section("c2c_shared")))
extern "C" {
extern unsigned char __start_c2c_shared[] __attribute__((visibility("hidden")));
extern unsigned char __stop_c2c_shared[] __attribute__((visibility("hidden")));
}

namespace c2c {
namespace emulation {

constexpr unsigned char kPoison = 0xff;  // NaN in every floating-point type

namespace {
// So that there is such a section, with or without an array.
__attribute__((section("c2c_shared"), used)) unsigned char section_holder;
}  // namespace

inline bool within(const void* p, std::size_t bytes, const void* begin, std::size_t size) {
  const auto at = reinterpret_cast<std::uintptr_t>(p);
  const auto first = reinterpret_cast<std::uintptr_t>(begin);
  return at >= first && bytes <= size && at - first <= size - bytes;
}

// ---- static arrays, those of all kernels -------------------------------------------------------
inline std::size_t static_shared_bytes() {
  return static_cast<std::size_t>(__stop_c2c_shared - __start_c2c_shared);
}
inline bool in_static_shared(const void* p, std::size_t bytes) {
  return within(p, bytes, __start_c2c_shared, static_shared_bytes());
}
#if defined(C2C_ADDRESS_SANITIZER)
// Between the arrays may lie margins that memset must not touch (-fsanitize-sections=c2c_shared).
__attribute__((no_sanitize("address"))) inline void poison_static_shared() {
  volatile unsigned char* bytes = __start_c2c_shared;
  for (std::size_t i = 0, n = static_shared_bytes(); i < n; ++i) bytes[i] = kPoison;
}
#else
inline void poison_static_shared() {
  std::memset(__start_c2c_shared, kPoison, static_shared_bytes());
}
#endif

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
