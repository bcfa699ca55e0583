// Launchers of the CUDA kernels between the matrix products of the training op and its backward;
// their formulas stand in train/backend.h. As those of row_kernels.h: all streams of a chunk in
// one launch each, sums in double for float64 caches and in float for all others, every stored
// value rounded once, no atomics: the same input gives the same bits.
#pragma once

#include "../train/dropout.h"
#include "row_kernels.h"

namespace c2c::cuda {

// ---- between the products
// ------------------------------------------------------------------------

// normed = z / sqrt(mean(z^2) + eps).
void launch_norm(CacheType type, const Block& block, int64_t cols,
                 const Matrices& z,       // [streams, rows, cols]
                 const Matrices& normed,  // [streams, rows, cols]
                 cudaStream_t stream);

// z = z_in + dropout(delta), and normed of that; normed may be delta, null: no norm follows.
void launch_dropout_residual(CacheType type, const Block& block, int64_t cols,
                             const Matrices& z_in,    // [streams, rows, cols]
                             const Matrices& delta,   // [streams, rows, cols]
                             const Dropout& dropout,  // of streams of the call ..
                             int64_t first_stream,    // .. which the block's first is
                             const Matrices& z,       // [streams, rows, cols]
                             const Matrices& normed,  // [streams, rows, cols]
                             cudaStream_t stream);

// d_delta = kept ? scale * dz : 0.
void launch_dropout_backward(CacheType type, const Block& block, int64_t cols, const Matrices& dz,
                             const Dropout& dropout, int64_t first_stream, const Matrices& d_delta,
                             cudaStream_t stream);

// d *= activation'(u), activated = activation(u).
void launch_activate_backward(CacheType type, Activation activation, const Block& block,
                              int64_t cols,
                              const Matrices& u,          // [streams, rows, cols]
                              const Matrices& d,          // [streams, rows, cols]
                              const Matrices& activated,  // [streams, rows, cols]
                              cudaStream_t stream);

// n = z * rstd, dz = first + second + rstd * (dn - n * mean(dn * n)). second.data null: zero; dz
// may be first or second, n may be dn.
void launch_norm_backward(CacheType type, const Block& block, int64_t cols, const Matrices& z,
                          const Matrices& dn, const Matrices& first, const Matrices& second,
                          const Matrices& dz, const Matrices& n, cudaStream_t stream);

// ---- the caches
// ----------------------------------------------------------------------------------

// Values of the soft gates, in sums: the one of stream g, head h of row (b, n) is at
// g * stride[0] + b * stride[1] + h * stride[2] + n * stride[3].
struct Gate {
  const void* data;  // nullptr: 1
  int64_t stride[4];
};

struct Weighted {
  Integration integration;
  Matrices projected;     // [streams, rows, heads * dim]
  const void* bias;       // [streams, heads * dim], sums
  Matrices logits;        // [streams, rows, heads]; data null: the weight is 1
  const void* head_bias;  // [streams, heads], sums
  Gate gate;
};

// out = the integration of base and projected + bias, weighted by sigmoid(logits + head_bias) and
// gated; base itself for a token that stays. Streams' sharers are not read.
void launch_gated_combine(CacheType type, const Block& block, const Streams& streams,
                          HeadShape receiver, const Tokens& tokens, const Weighted& weighted,
                          cudaStream_t stream);

struct GradientViews {
  CacheView grad_out, base, grad_base;  // grad_base.data is written; null: not wanted
};
struct GradientStreams {
  GradientViews view[kMaxStreams];
};

struct CombineGradients {
  Matrices projected;  // [streams, rows, heads * dim]
  Matrices logits;     // [streams, rows, heads]; data null: not wanted
  void* gate;          // [streams, batch, heads, tokens], sums; null: not wanted
};

void launch_combine_backward(CacheType type, const Block& block, const GradientStreams& streams,
                             HeadShape receiver, const Tokens& tokens, const Weighted& weighted,
                             const CombineGradients& gradients, cudaStream_t stream);

// One contiguous [B, H, tokens, D] per stream.
struct Contiguous {
  void* data[kMaxStreams];
};

// caches += dc, but for tokens that stay.
void launch_add_base(CacheType type, const Block& block, const Contiguous& caches,
                     HeadShape receiver, const Tokens& tokens,
                     const Matrices& dc,  // [streams, rows, receiver width]
                     cudaStream_t stream);

// The receiver tokens that read a sharer token, as lists in the order of tokens: the first is
// first[b, s], the one after n is next[b, n]; `tokens` ends a list.
struct Readers {
  int64_t* first;  // [batch, sharer_tokens]
  int64_t* next;   // [batch, tokens]
};
void launch_readers(const Tokens& tokens, const Readers& readers, cudaStream_t stream);

// caches[b, s] = sum of dc over the receiver tokens that read s. Without a map readers is not read.
void launch_scatter_sharer(CacheType type, int streams, const Contiguous& caches, HeadShape sharer,
                           const Tokens& tokens, const Readers& readers,
                           const Matrices& dc,  // [streams, rows, sharer width]
                           cudaStream_t stream);

// ---- sums over rows
// ------------------------------------------------------------------------------

// How many parts launch_column_sums splits that many rows into: a function of the rows alone.
int64_t column_sum_parts(int64_t rows);

// out[g] = sum of x[g] over rows; x of the caches' dtype or, with `wide`, of sums.
void launch_column_sums(CacheType type, bool wide, const Block& block, int64_t cols,
                        const Matrices& x,
                        void* partial,  // [streams, column_sum_parts(rows), cols], sums
                        void* out,      // [streams, cols], sums
                        cudaStream_t stream);

// grad = d_gate summed over the dimensions that are 1 in grad's shape.
void launch_sum_gate(CacheType type, int streams, int64_t batch, int64_t heads, int64_t tokens,
                     const void* d_gate,      // [streams, batch, heads, tokens], sums
                     const int64_t shape[3],  // each 1 or batch, heads, tokens
                     void* grad,              // [streams, shape], sums
                     cudaStream_t stream);

}  // namespace c2c::cuda
