// What the products of the fused path read: matrices, and caches where they lie.
//
// An input has kRowBytes of shared memory per row of a block, which prepare<Tile>(stream, first
// row, rows, that memory) fills; block(..) gives column(k) and address(column, row), nullptr where
// the input is zero. The column of 8 aligned bytes knows whether it may be read in one access.
#pragma once

#include "fused_gemm.cuh"
#include "kernels.h"

namespace c2c::cuda {

// [streams, rows, cols]; strides in elements.
template <class T>
struct Matrix {
  T* data;
  int64_t stream_stride, row_stride;
};

// The rows of one matrix, or of two side by side.
template <class T, int kParts>
struct MatrixInput {
  static_assert(kParts == 1 || kParts == 2, "one matrix or two");
  Matrix<const T> first, second;  // second: not read where there is one
  int split, depth;               // columns of the first and of both
  bool vector;  // any 8 columns from a multiple of 8 on are 16 aligned bytes of one part, or none

  static constexpr int kRowBytes = 0;

  struct Column {
    const T* data;  // in the block's first row; an address inside where there is no such column
    int64_t row_stride;
    bool exists, vector;
  };
  struct Block {
    const T *first, *second;
    int64_t first_stride, second_stride;
    int rows, split, depth;
    bool vector;

    __device__ __forceinline__ Column column(int k) const {
      if (k >= depth) return {first, 0, false, vector};
      if (kParts == 1 || k < split) return {first + k, first_stride, true, vector};
      return {second + (k - split), second_stride, true, vector};
    }
    __device__ __forceinline__ const T* address(const Column& column, int row) const {
      return column.exists && row < rows ? column.data + row * column.row_stride : nullptr;
    }
  };
  template <class Tile>
  __device__ __forceinline__ void prepare(int, int, int, char*) const {}
  __device__ __forceinline__ Block block(int stream, int first_row, int rows, char*) const {
    const auto at = [&](const Matrix<const T>& m) {
      return m.data + stream * m.stream_stride + first_row * m.row_stride;
    };
    return {at(first),
            kParts == 1 ? nullptr : at(second),
            first.row_stride,
            second.row_stride,
            rows,
            split,
            depth,
            vector};
  }
};

// Where the tokens of one row lie in the three views, in elements.
struct RowPlace {
  int64_t sharer;  // -1: no token of the sharer's goes with it, or no such row
  int64_t base, out;
};

__device__ __forceinline__ RowPlace row_place(const StreamViews& views, const Tokens& tokens,
                                              int64_t row) {
  const int64_t batch = row / tokens.tokens, token = row % tokens.tokens;
  int64_t source = token;
  if (tokens.map != nullptr) {
    source = tokens.map[batch * tokens.batch_stride + token * tokens.token_stride];
  }
  const auto at = [&](const CacheView& view, int64_t n) {
    return batch * view.stride[0] + n * view.stride[2];
  };
  const bool mapped = source >= 0 && source < tokens.sharer_tokens;
  return {mapped ? at(views.sharer, source) : -1, at(views.base, token), at(views.out, token)};
}

// The heads of a cache flattened: column c is channel c % dim of head c / dim.
template <class T>
struct FlatHeads {
  T* data;
  int64_t head_stride, channel_stride;
  int dim;
  bool vector;  // any 8 columns from a multiple of 8 on are 16 aligned bytes of a token

  __device__ __forceinline__ FlatHeads(const CacheView& view, int head_dim)
      : data(static_cast<T*>(const_cast<void*>(view.data))),
        head_stride(view.stride[1]),
        channel_stride(view.stride[3]),
        dim(head_dim) {
    const int64_t strides = view.stride[0] | view.stride[1] | view.stride[2] | head_dim;
    vector = channel_stride == 1 && strides % kVector == 0 &&
             reinterpret_cast<uintptr_t>(view.data) % sizeof(uint4) == 0;
  }
  // In token 0 of batch row 0.
  __device__ __forceinline__ T* column(int c) const {
    const int head = c / dim;
    return data + head * head_stride + (c - head * dim) * channel_stride;
  }
};

// [s ; t] read where it lies; a row that no token of the sharer's goes with is zero.
template <class T>
struct CacheInput {
  Streams streams;
  Tokens tokens;
  HeadShape sharer, base;
  int64_t first_row;  // of the chunk
  int depth;          // columns of both, or of the sharer alone

  static constexpr int kRowBytes = sizeof(RowPlace);

  struct Column {
    const T* data;  // in token 0 of batch row 0; an address inside where there is no such column
    bool of_base, exists, vector;
  };
  struct Block {
    FlatHeads<const T> sharer, base;
    int split, depth;
    bool base_vector;  // behind the sharer's columns
    const RowPlace* places;

    __device__ __forceinline__ Column column(int k) const {
      if (k >= depth) return {sharer.data, false, false, sharer.vector};
      if (k < split) return {sharer.column(k), false, true, sharer.vector};
      return {base.column(k - split), true, true, base_vector};
    }
    __device__ __forceinline__ const T* address(const Column& column, int row) const {
      const RowPlace& place = places[row];
      if (!column.exists || place.sharer < 0) return nullptr;
      return column.data + (column.of_base ? place.base : place.sharer);
    }
  };
  template <class Tile>
  __device__ __forceinline__ void prepare(int stream, int row, int rows, char* shared) const {
    auto* const places = reinterpret_cast<RowPlace*>(shared);
    for (int r = static_cast<int>(threadIdx.x); r < Tile::kRows; r += Tile::kThreads) {
      places[r] = r < rows ? row_place(streams.view[stream], tokens, first_row + row + r)
                           : RowPlace{-1, -1, -1};
    }
  }
  __device__ __forceinline__ Block block(int stream, int, int, char* shared) const {
    const StreamViews& views = streams.view[stream];
    const FlatHeads<const T> from(views.sharer, sharer.dim), to(views.base, base.dim);
    const int split = sharer.heads * sharer.dim;
    return {from,
            to,
            split,
            depth,
            to.vector && split % kVector == 0,
            reinterpret_cast<const RowPlace*>(shared)};
  }
};

}  // namespace c2c::cuda
