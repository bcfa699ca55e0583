// Launchers of the CUDA kernels between the matrix products, for all streams and rows of a chunk in
// one launch each. Every kernel sums in double for float64 caches, in float for all others, and
// rounds what it stores to the caches' dtype once. The same input gives the same bits.
#pragma once

#include "../scalar_math.h"
#include "device.h"
#include "kernels.h"

namespace c2c::cuda {

// Rows of an intermediate: element (g, r, i) is at data + g * stream_stride + r * row_stride + i,
// in elements of the caches' dtype, or of sums where a launcher says so.
struct Matrices {
  void* data;
  int64_t stream_stride, row_stride;
};

// What a launch works on: `streams` streams x the rows [first_row, first_row + rows) of the call.
struct Block {
  int streams;
  int64_t first_row, rows;
};

// c[g, r] = [sharer heads flattened ; receiver heads flattened], zeros for a token that stays.
// receiver.heads is 0 where the fuser reads the sharer alone.
void launch_gather(CacheType type, const Block& block, const Streams& streams, HeadShape sharer,
                   HeadShape receiver, const Tokens& tokens,
                   const Matrices& c,  // [streams, rows, sharer width + receiver width]
                   cudaStream_t stream);

// z += bias; normed = z / sqrt(mean(z^2) + eps).
void launch_bias_stats(CacheType type, const Block& block, int64_t cols,
                       const Matrices& z,       // [streams, rows, cols]
                       const void* bias,        // [streams, cols], sums
                       const Matrices& normed,  // [streams, rows, cols]
                       cudaStream_t stream);

// z += delta; normed as above. normed may be delta; normed.data may be null: no norm follows.
void launch_residual_stats(CacheType type, const Block& block, int64_t cols,
                           const Matrices& z_in,    // [streams, rows, cols]
                           const Matrices& delta,   // [streams, rows, cols]
                           const Matrices& z,       // [streams, rows, cols], may be z_in
                           const Matrices& normed,  // [streams, rows, cols]
                           cudaStream_t stream);

// first = activation(x[.., :first_cols]), second = activation(x[.., first_cols:]).
void launch_activate(CacheType type, Activation activation, const Block& block,
                     const Matrices& x,  // [streams, rows, first_cols + second_cols]
                     int64_t first_cols, const Matrices& first, int64_t second_cols,
                     const Matrices& second, cudaStream_t stream);

// logits[g, r] = weight[g] x[g, r]. In sums, where the folded head of 2 * hidden terms belongs:
// each logit scales a whole head.
void launch_head(CacheType type, const Block& block, int64_t cols, int heads,
                 const Matrices& x,       // [streams, rows, cols]
                 const void* weight,      // [streams, heads, cols], sums
                 const Matrices& logits,  // [streams, rows, heads], sums
                 cudaStream_t stream);

struct Combine {
  Integration integration;
  bool accumulate;
  Matrices projected;     // [streams, rows, heads * dim]
  const void* bias;       // [streams, heads * dim], sums
  Matrices logits;        // [streams, rows, heads], sums; data null: the weight is 1
  const void* head_bias;  // [streams, heads], sums
};

// Writes the fused rows into the caches: the integration of base and P = projected + bias, weighted
// by sigmoid(logits + head_bias). With accumulate: adds what that would change base by. A token
// that stays is copied from base to out where those differ, and left alone with accumulate.
void launch_combine(CacheType type, const Block& block, const Streams& streams, HeadShape receiver,
                    const Tokens& tokens, const Combine& combine, cudaStream_t stream);

}  // namespace c2c::cuda
