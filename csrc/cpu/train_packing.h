// What goes into the training ops' products and comes out of them: rows and panels of S, and sums
// rounded to the caches' type. Part of train_kernels.cpp.
#pragma once

#include <algorithm>
#include <cstring>

#include "panel_gemm.h"
#include "train_rows.h"

namespace c2c::cpu {
namespace {

template <class C, class S>
void narrow_rows(Rows from, Rows to, int64_t count, int64_t cols) {
  for (int64_t r = 0; r < count; ++r) {
    const S* x = row<S>(from, r);
    C* y = row<C>(to, r);
    for (int64_t i = 0; i < cols; ++i) narrow(x[i], &y[i]);
  }
}

template <class S>
void add_rows(Rows from, Rows to, int64_t count, int64_t cols) {
  for (int64_t r = 0; r < count; ++r) {
    const S* x = row<S>(from, r);
    S* y = row<S>(to, r);
    for (int64_t i = 0; i < cols; ++i) y[i] += x[i];
  }
}

constexpr int64_t kBlock = 16;  // rows and columns that are transposed together

// to[i * ldt + j] = from[j * ldf + i] for i < rows, j < cols, both at most kBlock.
template <class C, class S>
void transpose_block(const C* from, int64_t ldf, int64_t rows, int64_t cols, S* to, int64_t ldt) {
  if (rows == kBlock && cols == kBlock) {
    S tile[kBlock][kBlock];
    for (int64_t j = 0; j < kBlock; ++j) load(from + j * ldf, 1, kBlock, tile[j]);
    for (int64_t i = 0; i < kBlock; ++i) {
      for (int64_t j = 0; j < kBlock; ++j) to[i * ldt + j] = tile[j][i];
    }
    return;
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) to[i * ldt + j] = widen(from[j * ldf + i]);
  }
}

template <class C, class S>
void pack_rows(StridedMatrix from, int64_t count, int64_t depth, void* rows) {
  const C* data = static_cast<const C*>(from.data);
  S* to = static_cast<S*>(rows);
  if (from.column_stride == 1) {
    for (int64_t r = 0; r < count; ++r) load(data + r * from.row_stride, 1, depth, to + r * depth);
    return;
  }
  for (int64_t r = 0; r < count; r += kBlock) {
    for (int64_t k = 0; k < depth; k += kBlock) {
      transpose_block(data + r + k * from.column_stride, from.column_stride,
                      std::min(kBlock, count - r), std::min(kBlock, depth - k), to + r * depth + k,
                      depth);
    }
  }
}

template <class C, class S>
void pack_panels(StridedMatrix from, int64_t depth, int64_t cols, void* panels) {
  S* to = static_cast<S*>(panels);
  for (int64_t c = 0; c < cols; c += kPanel, to += depth * kPanel) {
    const int64_t wide = std::min(kPanel, cols - c);
    const C* data = static_cast<const C*>(from.data) + c * from.column_stride;
    if (wide < kPanel) std::fill(to, to + depth * kPanel, S(0));
    if (from.column_stride == 1) {
      for (int64_t k = 0; k < depth; ++k) {
        load(data + k * from.row_stride, 1, wide, to + k * kPanel);
      }
    } else {
      for (int64_t k = 0; k < depth; k += kBlock) {
        transpose_block(data + k, from.column_stride, std::min(kBlock, depth - k), wide,
                        to + k * kPanel, kPanel);
      }
    }
  }
}

inline void pack_even_rows(StridedMatrix from, int64_t count, int64_t depth, uint16_t* rows) {
  const uint16_t* data = static_cast<const uint16_t*>(from.data);
  const int64_t even = (depth + 1) / 2 * 2;
  for (int64_t r = 0; r < count; r += kBlock) {
    const int64_t tall = std::min(kBlock, count - r);
    for (int64_t k = 0; k < depth; k += kBlock) {
      const int64_t deep = std::min(kBlock, depth - k);
      for (int64_t i = 0; i < tall; ++i) {
        const uint16_t* x = data + (r + i) * from.row_stride + k * from.column_stride;
        uint16_t* to = rows + (r + i) * even + k;
        for (int64_t j = 0; j < deep; ++j) to[j] = x[j * from.column_stride];
      }
    }
    for (int64_t i = 0; i < tall && even != depth; ++i) rows[(r + i) * even + depth] = 0;
  }
}

inline void pack_pairs(StridedMatrix from, int64_t depth, int64_t cols, uint16_t* panels) {
  const uint16_t* data = static_cast<const uint16_t*>(from.data);
  const int64_t even = (depth + 1) / 2 * 2;
  for (int64_t c = 0; c < cols; c += kPanel, panels += even * kPanel) {
    const int64_t wide = std::min(kPanel, cols - c);
    const uint16_t* first = data + c * from.column_stride;
    if (wide < kPanel || even != depth) std::memset(panels, 0, even * kPanel * sizeof(uint16_t));
    for (int64_t k = 0; k < depth; k += 2) {
      const uint16_t* x = first + k * from.row_stride;
      uint16_t* to = panels + k * kPanel;
      if (k + 1 == depth) {
        for (int64_t j = 0; j < wide; ++j) to[2 * j] = x[j * from.column_stride];
      } else if (from.column_stride == 1) {
        for (int64_t j = 0; j < wide; ++j) {
          to[2 * j] = x[j];
          to[2 * j + 1] = x[from.row_stride + j];
        }
      } else {  // both of a pair lie side by side
        for (int64_t j = 0; j < wide; ++j) {
          std::memcpy(to + 2 * j, x + j * from.column_stride, 2 * sizeof(uint16_t));
        }
      }
    }
  }
}

}  // namespace
}  // namespace c2c::cpu
