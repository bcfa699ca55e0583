// Matrix products of the CPU path: weights in panels, widened in registers. Raw pointers and no
// torch header; panel_gemm.cpp is compiled once per instruction set.
#pragma once

#include <cstdint>

#include "row_kernels.h"

namespace c2c::cpu {

// Output columns of one panel.
constexpr int64_t kPanel = 16;

// A weight [cols, depth] is stored as [ceil(cols / 16)][ceil(depth / pair)][16][pair], what is
// missing filled with zeros: the 16 outputs of a panel lie side by side for every input. bfloat16
// is stored in pairs along the depth, which widens by a shift and a mask and is what the native
// dot product takes; every other type has pair = 1. Weights have the caches' type.
constexpr int64_t weight_pair(CacheType type) { return type == CacheType::kBfloat16 ? 2 : 1; }
constexpr int64_t weight_size(CacheType type) {
  return type == CacheType::kFloat64 ? 8 : type == CacheType::kFloat32 ? 4 : 2;
}
constexpr int64_t panel_elements(int64_t depth, CacheType type) {
  const int64_t pair = weight_pair(type);
  return (depth + pair - 1) / pair * pair * kPanel;
}

// T: double for float64 caches, float for all others.
template <class T>
struct PanelGemm {
  // out[r][c] = sum over i of x[r][i] * weight[first + c][i], c in [0, cols); `first` is a multiple
  // of 16. The order of each sum depends on depth alone, not on how rows and cols are split.
  void (*multiply)(const T* x, int64_t ldx,  // [rows, depth]
                   const void* panels,       // of one stream, from its first panel on
                   int64_t depth, int64_t rows, int64_t first, int64_t cols, T* out,
                   int64_t ldo);  // [rows, cols]

  // The same from inputs rounded to bfloat16, by the CPU's own dot product of pairs; null where it
  // has none or the weights are not bfloat16. depth is even, a missing last input is zero.
  void (*multiply_native)(const uint16_t* x, int64_t ldx, const void* panels, int64_t depth,
                          int64_t rows, int64_t first, int64_t cols, float* out, int64_t ldo);

  // Rounds rows to bfloat16, an odd last column followed by a zero; null where multiply_native is.
  void (*round_rows)(const T* x, int64_t ldx, int64_t rows, int64_t depth, uint16_t* out,
                     int64_t ldo);

  int64_t column_step;  // columns that `multiply` works on at once: split work at multiples of it
};

template <class T>
const PanelGemm<T>& panel_gemm(CacheType type);
template <>
const PanelGemm<float>& panel_gemm<float>(CacheType type);
template <>
const PanelGemm<double>& panel_gemm<double>(CacheType type);

}  // namespace c2c::cpu
