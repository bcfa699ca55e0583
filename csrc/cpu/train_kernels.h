// The CPU kernels between the matrix products of the training ops (train/fuse_train.h says what
// each computes). Raw pointers and strides, no torch header; train_kernels.cpp is compiled once per
// instruction set and `train_kernels` picks the best one this CPU runs.
#pragma once

#include <cstdint>

#include "../train/dropout.h"
#include "row_kernels.h"

namespace c2c::cpu {

// Rows of a matrix whose columns lie side by side; stride in elements.
struct Rows {
  void* data = nullptr;
  int64_t stride = 0;
};

// A matrix of the caches' type; one of its strides is 1.
struct StridedMatrix {
  void* data;
  int64_t row_stride, column_stride;
};

// Gates of one stream, in S; data null: 1. Strides of batch, head and token.
struct GateView {
  const void* data = nullptr;
  int64_t stride[3] = {};
};

// What a fused token is made of, for rows of one stream. Of `projected` and `logits` the first row
// is rows[0]; biases and gates are in S.
struct FusedRows {
  CacheView base;
  HeadShape shape;
  const Row* rows;
  int64_t count;
  Rows projected;         // [count, heads * dim], without bias
  const void* out_bias;   // [heads * dim]
  Rows logits;            // [count, heads], without bias; data null: the weight is 1
  const void* head_bias;  // [heads]
  GateView gate;
  Integration integration;
};

// Where the gradients of fused tokens go; data null: not wanted.
struct FusedGradients {
  Rows projected;  // [count, heads * dim]
  Rows logits;     // [count, heads]
  CacheView base;  // as FusedRows::base
  void* gate;      // S [B, heads, N], contiguous
  int64_t tokens;  // N
};

// Matrices hold elements of the caches' type, vectors and scratch S: double for float64 caches,
// float for all others. `count` rows and `cols` columns everywhere. `scratch` has room for
// kScratchRows * cols of S.
constexpr int64_t kScratchRows = 4;

struct TrainKernels {
  void (*gather)(const CacheView& sharer, HeadShape sharer_shape, const CacheView& base,
                 HeadShape base_shape, const Row* rows, int64_t count, Rows c);

  void (*bias_norm)(Rows z, const void* bias, Rows n, int64_t count, int64_t cols, void* scratch);

  void (*activate)(Activation activation, Rows u, Rows h, int64_t count, int64_t cols);

  // `stream`, of the call, and `first_row` are those of the first of these rows.
  void (*residual_norm)(Rows z, Rows delta, const Dropout& dropout, int64_t stream,
                        int64_t first_row, Rows out, Rows n, int64_t count, int64_t cols,
                        void* scratch);

  void (*combine)(const FusedRows& fused, const CacheView& out);

  void (*combine_backward)(const FusedRows& fused, const CacheView& grad_out,
                           const FusedGradients& to, void* scratch);  // 3 * dim of S

  void (*dropout_backward)(Rows dz, const Dropout& dropout, int64_t stream, int64_t first_row,
                           Rows dd, int64_t count, int64_t cols);

  void (*activate_backward)(Activation activation, Rows u, Rows d, Rows h, int64_t count,
                            int64_t cols);

  void (*norm_backward)(Rows z, Rows dn, Rows first, Rows second, Rows dz, Rows n, int64_t count,
                        int64_t cols, void* scratch);

  // Of at most kSumColumns columns; x in the caches' type, or in S.
  void (*column_sums)(Rows x, int64_t count, int64_t cols, void* out);
  void (*column_sums_wide)(Rows x, int64_t count, int64_t cols, void* out);

  void (*add_base)(Rows dc, HeadShape shape, const Row* rows, int64_t count,
                   const CacheView& grad_base);

  // Sharer token i of the `tokens` ones of batch row `batch` is read by the rows
  // readers[starts[i] .. starts[i + 1]) of dc.
  void (*scatter)(Rows dc, HeadShape shape, const int64_t* starts, const int64_t* readers,
                  int64_t batch, int64_t first, int64_t count, const CacheView& grad_sharer,
                  void* scratch);  // dim of S

  // Rounds `count` x `cols` S to the caches' type.
  void (*narrow)(Rows from, Rows to, int64_t count, int64_t cols);
  // to += from, both S.
  void (*add)(Rows from, Rows to, int64_t count, int64_t cols);

  // Operands of a product (panel_gemm.h) in S: rows [count, depth] one after another, and
  // [depth, cols] in panels of S, what is missing in the last one filled with zeros.
  void (*pack_rows)(StridedMatrix from, int64_t count, int64_t depth, void* rows);
  void (*pack_panels)(StridedMatrix from, int64_t depth, int64_t cols, void* panels);
  // The same as they are, for the CPU's own bfloat16 product: rows of even length, panels of pairs,
  // and a zero where a last input is missing. Null for other types.
  void (*pack_even_rows)(StridedMatrix from, int64_t count, int64_t depth, uint16_t* rows);
  void (*pack_pairs)(StridedMatrix from, int64_t depth, int64_t cols, uint16_t* panels);
};

constexpr int64_t kSumColumns = 128;

const TrainKernels& train_kernels(CacheType type);

}  // namespace c2c::cpu
