// What the files of train_kernels.cpp share: rows, widening, dot products. Internal linkage, since
// it is compiled once per instruction set.
#pragma once

#include <cmath>
#include <cstring>

#include "../train/train_math.h"
#include "train_kernels.h"

namespace c2c::cpu {
namespace {

constexpr int kLanes = 16;  // partial sums, so that a reduction vectorises in a fixed order

template <class C>
C* row(const Rows& rows, int64_t r) {
  return static_cast<C*>(rows.data) + r * rows.stride;
}

template <class C>
C* token(const CacheView& view, int64_t batch, int64_t head, int64_t n) {
  return static_cast<C*>(view.data) + batch * view.stride[0] + head * view.stride[1] +
         n * view.stride[2];
}

template <class C, class S>
void load(const C* from, int64_t stride, int64_t count, S* to) {
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) to[i] = widen(from[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = widen(from[i * stride]);
  }
}

template <class T>
T dot(const T* x, const T* y, int64_t count) {
  typedef T Vector __attribute__((vector_size(kLanes * sizeof(T))));
  Vector partial = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    Vector a, b;
    std::memcpy(&a, x + i, sizeof(Vector));
    std::memcpy(&b, y + i, sizeof(Vector));
    partial += a * b;
  }
  for (; i < count; ++i) partial[i % kLanes] += x[i] * y[i];
  T sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += partial[lane];
  return sum;
}

template <class T>
T reciprocal_rms(const T* z, int64_t cols) {
  return T(1) / std::sqrt(dot(z, z, cols) / static_cast<T>(cols) + static_cast<T>(kRmsEps));
}

}  // namespace
}  // namespace c2c::cpu
