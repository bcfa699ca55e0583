// A cache tensor as kernels see it: an address and strides, no torch header.
#pragma once

#include <cstdint>

namespace c2c {

enum class CacheType { kFloat64, kFloat32, kBfloat16, kFloat16 };

struct CacheView {  // [B, H, N, D]
  void* data = nullptr;
  int64_t stride[4] = {};  // batch, head, token, channel; in elements, not bytes
};

// How many parts of at most `at_most` something of size `count` is split into, and the size of such
// parts when they are equal (the last may be smaller).
constexpr int64_t parts(int64_t count, int64_t at_most) { return (count + at_most - 1) / at_most; }
constexpr int64_t equal_part(int64_t count, int64_t at_most) {
  return parts(count, parts(count, at_most));
}

}  // namespace c2c
