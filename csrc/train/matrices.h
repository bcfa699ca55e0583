// Batches of matrices in memory that someone else owns, and the elementwise torch ops on them that
// casting and folding weights needs.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>

namespace c2c::train {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline int64_t element_size(ScalarType type) {
  return type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
}

// `streams` matrices of a chunk; element (g, r, i) is at
// data + g * stream_stride + r * row_stride + i * column_stride, in elements of `type`.
struct Matrices {
  void* data = nullptr;  // null: there is none
  int64_t stream_stride = 0, row_stride = 0, column_stride = 1;
  ScalarType type = ScalarType::Float;

  Matrices transposed() const { return {data, stream_stride, column_stride, row_stride, type}; }
  Matrices columns_from(int64_t first) const {
    return {static_cast<char*>(data) + first * column_stride * element_size(type), stream_stride,
            row_stride, column_stride, type};
  }
};

// Which streams of a call something works on: [first, first + streams).
struct Chunk {
  int64_t first, streams;
};

// The matrices as a tensor of the given sizes, without autograd.
Tensor view_of(const Matrices& m, std::array<int64_t, 3> sizes, torch::stable::Device device);

// to = from, cast.
void copy(const Tensor& to, const Tensor& from);

// to = a * b, b broadcast, computed in the widest of the three dtypes. `to` may be a.
void multiply_elements(const Tensor& to, const Tensor& a, const Tensor& b);

}  // namespace c2c::train
