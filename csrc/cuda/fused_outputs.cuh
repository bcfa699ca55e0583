// What becomes of the sums of the fused path's products.
//
// An output has kRowBytes of shared memory per row of a block, which prepare<Tile>(stream, first
// row, rows, that memory) fills. block(..) gives column(col, cols), what eight columns share;
// fetch(column, row), what has to be read for them; and write(column, row, their sums in shared
// memory, what was fetched), which returns the sum of squares of what it stored where kSquares.
#pragma once

#include <cmath>

#include "fused_gemm.cuh"
#include "fused_inputs.cuh"
#include "kernels.h"

namespace c2c::cuda {

template <class T>
__device__ __forceinline__ void unpack(const uint4& packed, T (&to)[kVector]) {
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    to[i].bits = static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2)));
  }
}
template <class T>
__device__ __forceinline__ uint4 pack(const T (&from)[kVector]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    words[i] = from[2 * i].bits | static_cast<uint32_t>(from[2 * i + 1].bits) << 16;
  }
  return {words[0], words[1], words[2], words[3]};
}
template <class T>
__device__ __forceinline__ void widen_eight(const uint4& packed, float (&to)[kVector]) {
  T narrow_values[kVector];
  unpack(packed, narrow_values);
#pragma unroll
  for (int i = 0; i < kVector; ++i) to[i] = widen(narrow_values[i]);
}
// Leaves the rounded values in `values`.
template <class T>
__device__ __forceinline__ uint4 round_eight(float (&values)[kVector]) {
  T rounded[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    narrow(values[i], &rounded[i]);
    values[i] = widen(rounded[i]);
  }
  return pack(rounded);
}

// Eight elements at at(0) .. at(7), of which the first `count` exist; `vector`: in one access.
template <class T, class At>
__device__ __forceinline__ uint4 read_eight(bool vector, int count, const At& at) {
  if (vector) return *reinterpret_cast<const uint4*>(at(0));
  T values[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) values[i] = i < count ? *at(i) : T{};
  return pack(values);
}
template <class T, class At>
__device__ __forceinline__ void write_eight(bool vector, int count, const uint4& packed,
                                            const At& at) {
  if (vector) {
    *reinterpret_cast<uint4*>(at(0)) = packed;
    return;
  }
  T values[kVector];
  unpack(packed, values);
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    if (i < count) *at(i) = values[i];
  }
}
// 16-byte aligned.
__device__ __forceinline__ void read_floats(const float* from, float (&to)[kVector]) {
#pragma unroll
  for (int i = 0; i < kVector; i += 4) {
    const float4 four = *reinterpret_cast<const float4*>(from + i);
    to[i] = four.x, to[i + 1] = four.y, to[i + 2] = four.z, to[i + 3] = four.w;
  }
}

struct OutputColumn {  // eight neighbouring columns
  int col, count;      // the first; how many of them there are, below 1 for none
};
__device__ __forceinline__ OutputColumn output_column(int col, int cols) {
  return {col, cols - col < kVector ? cols - col : kVector};
}
__device__ __forceinline__ void read_bias(const float* bias, OutputColumn column,
                                          float (&to)[kVector]) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) to[i] = i < column.count ? bias[column.col + i] : 0.f;
}

// An intermediate that is written.
template <class T>
struct OutputMatrix {
  Matrix<T> matrix;
  bool vector;  // any 8 columns from a multiple of 8 on are 16 aligned bytes of a row

  struct Block {
    T* data;
    int64_t row_stride;
    bool vector;

    __device__ __forceinline__ uint4 read(const OutputColumn& column, int row) const {
      const T* from = data + row * row_stride + column.col;
      return read_eight<T>(vector, column.count, [&](int i) { return from + i; });
    }
    __device__ __forceinline__ void write(const OutputColumn& column, int row,
                                          const uint4& packed) const {
      T* to = data + row * row_stride + column.col;
      write_eight<T>(vector, column.count, packed, [&](int i) { return to + i; });
    }
  };
  __device__ __forceinline__ Block block(int stream, int first_row) const {
    return {matrix.data + stream * matrix.stream_stride + first_row * matrix.row_stride,
            matrix.row_stride, vector};
  }
};

// Sums of squares of rows, in parts of kSquaresCols columns, which whoever needs them adds up in
// order. They are those of the stored, rounded values, for these the next product reads.
struct RowSquares {
  float* data;  // [streams, rows, parts]
  int rows, parts;

  __device__ __forceinline__ float* row(int stream, int r) const {
    return data + (static_cast<int64_t>(stream) * rows + r) * parts;
  }
};

// out = sums + bias, or out += sums (the residual, in place), with the sums of squares.
template <class T, bool kResidual>
struct NormedOutput {
  OutputMatrix<T> out;
  const float* bias;  // [streams, cols]; not read with a residual
  RowSquares squares;
  int cols;

  static constexpr int kRowBytes = 0;
  static constexpr bool kSquares = true;

  struct Column : OutputColumn {
    float bias[kVector];
  };
  struct Fetched {
    uint4 residual;
  };
  struct Block {
    typename OutputMatrix<T>::Block out;
    const float* bias;
    float* squares;
    int parts;

    __device__ __forceinline__ Column column(int col, int cols) const {
      Column column{output_column(col, cols), {}};
      if constexpr (!kResidual) read_bias(bias, column, column.bias);
      return column;
    }
    __device__ __forceinline__ Fetched fetch(const Column& column, int row) const {
      if constexpr (kResidual) return {out.read(column, row)};
      return {};
    }
    __device__ __forceinline__ float write(const Column& column, int row, const float* sums,
                                           const Fetched& fetched) const {
      float values[kVector], residual[kVector];
      read_floats(sums, values);
      widen_eight<T>(fetched.residual, residual);
#pragma unroll
      for (int i = 0; i < kVector; ++i) values[i] += kResidual ? residual[i] : column.bias[i];
      out.write(column, row, round_eight<T>(values));
      float total = 0.f;
#pragma unroll
      for (int i = 0; i < kVector; ++i) total += i < column.count ? values[i] * values[i] : 0.f;
      return total;
    }
    __device__ __forceinline__ void write_squares(int row, int part, float total) const {
      squares[static_cast<int64_t>(row) * parts + part] = total;
    }
  };
  template <class Tile>
  __device__ __forceinline__ void prepare(int, int, int, char*) const {}
  __device__ __forceinline__ Block block(int stream, int first_row, char*) const {
    return {out.block(stream, first_row),
            kResidual ? nullptr : bias + static_cast<int64_t>(stream) * cols,
            squares.row(stream, first_row), squares.parts};
  }
};

// out = activation(rstd * sums). The norm's factor meets float32 sums, so that float16 cannot
// overflow before it.
template <class T>
struct ActivatedOutput {
  OutputMatrix<T> out;
  RowSquares squares;  // of the rows that are multiplied
  int width;           // columns of those
  Activation activation;

  static constexpr int kRowBytes = sizeof(float);
  static constexpr bool kSquares = false;

  using Column = OutputColumn;
  struct Fetched {};
  struct Block {
    typename OutputMatrix<T>::Block out;
    const float* rstd;
    Activation activation;

    __device__ __forceinline__ Column column(int col, int cols) const {
      return output_column(col, cols);
    }
    __device__ __forceinline__ Fetched fetch(const Column&, int) const { return {}; }
    __device__ __forceinline__ float write(const Column& column, int row, const float* sums,
                                           const Fetched&) const {
      float values[kVector];
      read_floats(sums, values);
      const float scale = rstd[row];
      switch (activation) {
        case Activation::kGelu:
          apply<Activation::kGelu>(scale, values);
          break;
        case Activation::kRelu:
          apply<Activation::kRelu>(scale, values);
          break;
        case Activation::kSilu:
          apply<Activation::kSilu>(scale, values);
          break;
      }
      out.write(column, row, round_eight<T>(values));
      return 0.f;
    }
    template <Activation kActivation>
    __device__ __forceinline__ static void apply(float scale, float (&values)[kVector]) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) values[i] = activate<kActivation>(scale * values[i]);
    }
  };
  template <class Tile>
  __device__ __forceinline__ void prepare(int stream, int first_row, int rows, char* shared) const {
    auto* const rstd = reinterpret_cast<float*>(shared);
    for (int r = static_cast<int>(threadIdx.x); r < rows; r += Tile::kThreads) {
      const float* from = squares.row(stream, first_row + r);
      float total = 0.f;
      for (int part = 0; part < squares.parts; ++part) total += from[part];
      rstd[r] = 1.f / std::sqrt(total / static_cast<float>(width) + static_cast<float>(kRmsEps));
    }
  }
  __device__ __forceinline__ Block block(int stream, int first_row, char* shared) const {
    return {out.block(stream, first_row), reinterpret_cast<const float*>(shared), activation};
  }
};

// The fused tokens, written into the caches: base integrated with w (sums + bias).
template <class T>
struct FusedOutput {
  Streams streams;
  Tokens tokens;
  HeadShape shape;
  int64_t first_row;     // of the chunk
  const float* bias;     // [streams, cols]
  const float* weights;  // w, [streams, rows, heads]; nullptr: 1
  int rows;              // of the chunk
  Integration integration;
  bool accumulate;

  static constexpr int kRowBytes = sizeof(RowPlace);
  static constexpr bool kSquares = false;

  struct Column : OutputColumn {
    float bias[kVector];
    const T* base;  // in token 0 of batch row 0
    T* out;
    int head, channel;
  };
  struct Fetched {
    uint4 base, from;  // from: what is added to
  };
  struct Block {
    FlatHeads<const T> base;
    FlatHeads<T> out;
    const float* bias;
    const float* weights;  // from the block's first row on, or nullptr
    int heads;
    const RowPlace* places;
    Integration integration;
    bool accumulate, in_place;

    __device__ __forceinline__ Column column(int col, int cols) const {
      const int head = col / base.dim;
      Column column{output_column(col, cols), {}, nullptr, nullptr, head, col - head * base.dim};
      read_bias(bias, column, column.bias);
      if (column.count > 0) column.base = base.column(col), column.out = out.column(col);
      return column;
    }
    __device__ __forceinline__ uint4 read_base(const Column& column, int row) const {
      const int64_t place = places[row].base;
      return read_eight<T>(base.vector, column.count, [&](int i) {
        return (i == 0 ? column.base : base.column(column.col + i)) + place;
      });
    }
    // Of element i of eight.
    __device__ __forceinline__ T* out_address(const Column& column, int row, int i) const {
      return (i == 0 ? column.out : out.column(column.col + i)) + places[row].out;
    }
    __device__ __forceinline__ Fetched fetch(const Column& column, int row) const {
      const uint4 t = read_base(column, row);
      if (!accumulate) return {t, t};
      return {t, read_eight<T>(out.vector, column.count,
                               [&](int i) { return out_address(column, row, i); })};
    }
    __device__ __forceinline__ void write_out(const Column& column, int row,
                                              const uint4& packed) const {
      write_eight<T>(out.vector, column.count, packed,
                     [&](int i) { return out_address(column, row, i); });
    }
    __device__ __forceinline__ float write(const Column& column, int row, const float* sums,
                                           const Fetched& fetched) const {
      if (places[row].sharer < 0) {  // the token stays as it is
        if (!accumulate && !in_place) write_out(column, row, fetched.base);
        return 0.f;
      }
      float values[kVector], t[kVector], from[kVector], w[kVector];
      read_floats(sums, values);
      widen_eight<T>(fetched.base, t);
      widen_eight<T>(fetched.from, from);
      int head = column.head, channel = column.channel;
      float weight = weight_of(row, head);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        values[i] += column.bias[i];
        w[i] = weight;
        if (i + 1 < column.count && ++channel == base.dim) {
          channel = 0;
          weight = weight_of(row, ++head);
        }
      }
      switch (integration) {
        case Integration::kResidual:
          apply<Integration::kResidual>(from, t, w, values);
          break;
        case Integration::kInterpolation:
          apply<Integration::kInterpolation>(from, t, w, values);
          break;
        case Integration::kReplacement:
          apply<Integration::kReplacement>(from, t, w, values);
          break;
      }
      write_out(column, row, round_eight<T>(values));
      return 0.f;
    }
    __device__ __forceinline__ float weight_of(int row, int head) const {
      return weights == nullptr ? 1.f : weights[static_cast<int64_t>(row) * heads + head];
    }
    template <Integration kIntegration>
    __device__ __forceinline__ void apply(const float (&from)[kVector], const float (&t)[kVector],
                                          const float (&w)[kVector],
                                          float (&values)[kVector]) const {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        values[i] = integrate<kIntegration, float>(from[i], t[i], w[i], values[i], accumulate);
      }
    }
  };
  template <class Tile>
  __device__ __forceinline__ void prepare(int stream, int row, int block_rows, char* shared) const {
    auto* const places = reinterpret_cast<RowPlace*>(shared);
    for (int r = static_cast<int>(threadIdx.x); r < block_rows; r += Tile::kThreads) {
      places[r] = row_place(streams.view[stream], tokens, first_row + row + r);
    }
  }
  __device__ __forceinline__ Block block(int stream, int row, char* shared) const {
    const StreamViews& views = streams.view[stream];
    const int64_t at = static_cast<int64_t>(stream) * rows + row;
    return {FlatHeads<const T>(views.base, shape.dim),
            FlatHeads<T>(views.out, shape.dim),
            bias + static_cast<int64_t>(stream) * shape.heads * shape.dim,
            weights == nullptr ? nullptr : weights + at * shape.heads,
            shape.heads,
            reinterpret_cast<const RowPlace*>(shared),
            integration,
            accumulate,
            views.out.data == views.base.data};
  }
};

}  // namespace c2c::cuda
