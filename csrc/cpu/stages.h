// What the stages of a fusion on the CPU share: rows of matrices, split into tasks for the threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "../scalar_math.h"
#include "panel_gemm.h"
#include "row_kernels.h"

namespace c2c::cpu {

constexpr int64_t kElementsPerTask = 16384;  // below this a second thread does not pay
constexpr int64_t kInputBytesPerTask = int64_t{256} << 10;  // rows that a product reads stay in L2

template <class T>
struct Matrices {  // `streams` matrices [rows, cols] at a row stride, one after another
  T* data;
  int64_t stream_stride, row_stride;

  T* row(int64_t g, int64_t r) const { return data + g * stream_stride + r * row_stride; }
};

// Calls f(stream, first row, row count) for all streams x rows, in parallel.
template <class F>
void for_rows(int64_t streams, int64_t rows, int64_t elements_per_row, const F& f) {
  const int64_t block =
      std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, elements_per_row));
  const int64_t blocks = parts(rows, block);
  torch::stable::parallel_for(0, streams * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = (i % blocks) * block;
      f(i / blocks, first, std::min(block, rows - first));
    }
  });
}

// Rounds x to bfloat16 for `multiply`, where it reads that.
template <class T>
void round_inputs(const PanelGemm<T>& gemm, int64_t streams, int64_t rows, const Matrices<T>& x,
                  int64_t depth, const Matrices<uint16_t>& rounded) {
  if (gemm.round_rows == nullptr) return;
  for_rows(streams, rows, depth, [&](int64_t g, int64_t r, int64_t n) {
    gemm.round_rows(x.row(g, r), x.row_stride, n, depth, rounded.row(g, r), rounded.row_stride);
  });
}

// Inputs of a product rounded to bfloat16: the row stride. An odd number of cache lines, so that a
// tile's rows do not all compete for the same few places in the processor's cache.
inline int64_t rounded_stride(int64_t depth) { return ((depth + 31) / 32 | 1) * 32; }

// Elements of scratch per row of rounded inputs, or 0 where a product needs none.
template <class T>
int64_t rounded_elements(const PanelGemm<T>& gemm, int64_t depth) {
  return gemm.round_rows == nullptr ? 0 : rounded_stride(depth) / 2;
}

// out[g] = x[g] @ weight[g]^T for `streams` x `rows`. The weights stand for [streams, cols, depth].
// With multiply_native it reads `rounded`, which holds x rounded to bfloat16, and not x.
template <class T>
void multiply(const PanelGemm<T>& gemm, CacheType type, int64_t streams, int64_t rows,
              const Matrices<T>& out, int64_t cols, const Matrices<T>& x, int64_t depth,
              const void* weights, const Matrices<uint16_t>& rounded) {
  const bool native = gemm.multiply_native != nullptr;
  const int64_t even = (depth + 1) / 2 * 2;
  const int64_t stream_bytes =
      parts(cols, kPanel) * panel_elements(depth, type) * weight_size(type);
  // A task has as many rows as stay in a core's cache while it goes through its columns.
  const int64_t input_bytes =
      std::max<int64_t>(1, depth * (native ? 2 : static_cast<int64_t>(sizeof(T))));
  const int64_t block = std::max<int64_t>(8, kInputBytesPerTask / input_bytes / 8 * 8);
  const int64_t row_blocks = parts(rows, block);
  const int64_t step = 4 * gemm.column_step;
  const int64_t column_blocks = parts(cols, step);
  const int64_t per_stream = row_blocks * column_blocks;
  torch::stable::parallel_for(0, streams * per_stream, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t g = i / per_stream;
      const int64_t c = i % per_stream / row_blocks * step, r = i % row_blocks * block;
      const int64_t n = std::min(block, rows - r), wide = std::min(step, cols - c);
      const char* w = static_cast<const char*>(weights) + g * stream_bytes;
      T* to = out.row(g, r) + c;
      if constexpr (sizeof(T) == 4) {
        if (native) {
          gemm.multiply_native(rounded.row(g, r), rounded.row_stride, w, even, n, c, wide, to,
                               out.row_stride);
          continue;
        }
      }
      gemm.multiply(x.row(g, r), x.row_stride, w, depth, n, c, wide, to, out.row_stride);
    }
  });
}

}  // namespace c2c::cpu
