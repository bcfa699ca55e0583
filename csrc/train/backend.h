// What a device supplies to the training fusion (fuse_train.h).
//
// A Backend is constructed from the checked Call, which outlives it, and has these members.
// `Matrices` are in the caches' dtype T unless stated; S is Call::sums. A `Chunk` says which
// streams of the call a launch works on; matrices begin at the chunk's first stream, lists of
// tensors, gates and dropout count streams of the call. Rows are always all rows of the call.
// Everything that a kernel reads is widened to S and what it writes rounded to its dtype once, to
// nearest even. Sums have a fixed order: the same input gives the same bits, whatever the threads
// and chunks.
//
//   int64_t scratch_bytes() const;
//       about how much scratch a call may use: streams are chunked by it
//   int64_t max_streams() const;
//       of one chunk
//   bool wide_products() const;
//       can multiply() write S where its inputs are T?
//   Tensor empty(const std::vector<int64_t>& sizes, ScalarType) const;
//       uninitialised, contiguous, on the device
//   torch::stable::Device device() const;
//
//   void multiply(streams, rows, cols, depth, const Matrices& out, const Matrices& a,
//                 const Matrices& b) const;
//       out[g] = a[g] @ b[g]: [rows, cols] = [rows, depth] @ [depth, cols]. a, b: T, with any of
//       row_stride and column_stride equal to 1 (a transposed view has row_stride 1). out: T, or S
//       if wide_products(); column_stride 1. Sums in S at least. depth 0 gives zeros; rows or cols
//       0 nothing.
//   void gather(Chunk, const Matrices& c) const;                       // [rows, input width]
//       c = [sharer heads flattened ; base heads flattened (if reads_receiver)], zeros in a row
//       without sharer token.
//   void bias_norm(Chunk, const Matrices& z, const void* bias, const Matrices& n) const;
//       z += bias (S [streams of chunk, hidden], or null: z stays unwritten);
//       n = z / sqrt(mean(z^2) + kRmsEps), from z as rounded to T.
//   void activate(Chunk, int64_t cols, const Matrices& u, const Matrices& h) const;  // h = act(u)
//   void residual_norm(Chunk, const Matrices& z, const Matrices& delta, const Dropout&,
//                      const Matrices& out, const Matrices& n) const;
//       out = z + dropout(delta); n as above, from out as rounded; n.data null: no norm follows.
//       n may be delta.
//   void combine(Chunk, const Matrices& projected, const void* out_bias, const Matrices& logits,
//                const void* head_bias, const std::vector<Tensor>& out) const;
//       per head, P = projected + out_bias; w = sigmoid(logits + head_bias), or 1 where logits.data
//       is null; g = Call::gate or 1; t = base:
//         residual t + g w P;  interpolation t + g w (P - t);  replacement (1 - g) t + g w P.
//       out: contiguous [B, Ht, N, Dt]. A row without sharer token, and where g is 0 (a closed
//       gate), gets t, bit for bit.
//       out_bias S [streams of chunk, receiver width]; head_bias S [streams of chunk, heads].
//
//   void combine_backward(Chunk, const std::vector<Tensor>& grad_out, const Matrices& projected,
//                         const void* out_bias, const Matrices& logits, const void* head_bias,
//                         const Matrices& d_projected, const Matrices& d_logits, void* d_gate,
//                         const std::vector<Tensor>* grad_base) const;
//       with o = grad_out (T [B, Ht, N, Dt], any strides, also 0) and sums over a head's channels:
//         d_projected = g w o, T [rows, receiver width];
//         d_logits = g w (1 - w) sum o V, T [rows, heads]; data null: not wanted;
//         d_gate = w sum o V, for replacement w sum o V - sum o t,
//           S [streams of chunk, B, Ht, N]; null: not wanted;
//         grad_base = o, interpolation o (1 - g w), replacement o (1 - g),
//           contiguous T; null: not wanted;
//       where V = P, or P - t for interpolation. Where g is 0: d_projected and d_logits are zeros,
//       grad_base = o. A row without sharer token: zeros, d_gate too, and grad_base = o.
//   void dropout_backward(Chunk, const Matrices& dz, const Dropout&, const Matrices& dd) const;
//       dd = kept ? scale * dz : 0                             // [rows, hidden]
//   void activate_backward(Chunk, int64_t cols, const Matrices& u, const Matrices& d,
//                          const Matrices& h) const;
//       d = d * act'(u) in place, h = act(u). act'(0) of relu is 0.
//   void norm_backward(Chunk, const Matrices& z, const Matrices& dn, const Matrices& first,
//                      const Matrices& second, const Matrices& dz, const Matrices& n) const;
//       n = z * rstd; dz = first + second + rstd * (dn - n * mean(dn * n)). second.data may be
//       null: zero. dz may be first or second; n may be dn.
//   void column_sums(Chunk, int64_t rows, int64_t cols, const Matrices& x, void* out) const;
//       out[g] = sum over `rows` rows of x[g] (T or S by x.type). out S [streams of chunk, cols].
//   void sum_gate(Chunk, const void* d_gate, const Tensor& grad_gate) const;
//       grad_gate (S, contiguous, shape of Call::gate) of the chunk's streams = d_gate summed over
//       every dimension that is 1 there and not in [B, Ht, N].
//   void add_base(Chunk, const Matrices& dc, const std::vector<Tensor>& grad_base) const;
//       grad_base += dc[rows, receiver width], except in a row without sharer token.
//   void scatter_sharer(Chunk, const Matrices& dc, const std::vector<Tensor>& grad_sharer) const;
//       grad_sharer (contiguous T [B, Hs, S, Ds]) = sum, in the order of n, of dc[rows, sharer
//       width] over the receiver tokens n that read the sharer token; zeros where none does.
#pragma once

#include "matrices.h"
