// The training ops c2c::fuse and c2c::fuse_backward for every device: what runs in which order, for
// how many streams at a time, and what is kept for the backward. A device supplies a Backend
// (backend.h).
//
// Rows: row r of a stream is token r % tokens of batch row r / tokens; all rows are computed, also
// those that a token map leaves as they are (their inputs and gradients are zeros).
// Every norm's gain g is folded into the map behind it (W1' = W1 diag(g), rounded once), so norms
// are plain, and the two first maps that read z1 are one product over [proj W1' ; weight W1'].
// With dW1' the gradient of a folded map: dW1 = dW1' diag(g), dg = column sums of dW1' * W1.
//
// Kept for the backward without recompute, per stream and row, in the caches' dtype (see `Kept`):
//   hidden * (2 + P) block inputs and the projection's end, inner * (1 + P) + weighting
//   pre-activations, receiver width (P), and with weighting hidden + receiver heads.
// With recompute: nothing but the inputs.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "backend.h"
#include "call.h"
#include "gradients.h"

namespace c2c::train {

// What the backward reads of the forward, for all streams or for one chunk. z[0] is the input map's
// output, z[1] the shared block's, z[1 + i] that of projection block i (counted from 1); u[0] and
// u[i] are their blocks' pre-activations, u[1] with the weighting branch's beside it.
struct Kept {
  std::vector<Matrices> z, u;
  Matrices projected, weighting, logits;  // P without bias; the weighting branch's end; w's logits
};

template <class Backend>
class Fusion {
 public:
  explicit Fusion(const Call& call) : call_(call), s_(call.sizes), backend_(call) {
    const int64_t per_stream = std::max<int64_t>(1, scratch_elements()) * element_size(call.type);
    chunk_ =
        std::clamp<int64_t>(backend_.scratch_bytes() / per_stream, 1,
                            std::max<int64_t>(1, std::min(s_.streams, backend_.max_streams())));
  }

  // Writes `out` (contiguous, one per stream) and, if `saved` is not empty, those tensors, which
  // are as `saved_sizes` says.
  void forward(const std::vector<Tensor>& out, const std::vector<Tensor>& saved) {
    allocate_forward();
    if (saved.empty()) keep_ = allocate_kept();
    for_chunks([&](Chunk chunk) {
      const Kept kept = saved.empty() ? keep_ : kept_of(saved, chunk);
      run_forward(chunk, kept);
      backend_.combine(chunk, kept.projected, out_bias(chunk), kept.logits, head_bias(chunk), out);
    });
  }

  // `saved` as forward wrote them, or empty: then the forward is computed again, chunk by chunk,
  // by the same operations.
  void backward(const std::vector<Tensor>& grad_out, const std::vector<Tensor>& saved,
                const Needed& needed, Gradients& gradients) {
    allocate_forward();
    allocate_backward(needed);
    if (saved.empty()) keep_ = allocate_kept();
    for_chunks([&](Chunk chunk) {
      if (saved.empty()) run_forward(chunk, keep_);
      run_backward(chunk, saved.empty() ? keep_ : kept_of(saved, chunk), grad_out, needed,
                   gradients);
    });
  }

  // The columns of every tensor [G, rows, columns] that is saved without recompute, in order.
  std::vector<int64_t> saved_columns() const {
    std::vector<int64_t> columns;
    for (int64_t i = 0; i < s_.blocks + 2; ++i) columns.push_back(s_.hidden);
    for (int64_t i = 0; i < s_.blocks + 1; ++i) {
      columns.push_back(s_.inner + (i == 1 ? s_.weighting : 0));
    }
    columns.push_back(s_.receiver.width());
    if (weighted()) {
      columns.push_back(s_.hidden);
      columns.push_back(s_.receiver.heads);
    }
    return columns;
  }

  const Backend& backend() const { return backend_; }

 private:
  bool weighted() const { return s_.weighting > 0; }
  int64_t inner_columns() const { return s_.inner + s_.weighting; }  // of both first blocks

  // Of one stream, rows and weights; an estimate.
  int64_t scratch_elements() const {
    int64_t columns = 2 * s_.input_width() + 5 * s_.hidden + inner_columns() +
                      std::max(s_.receiver.width(), inner_columns());
    for (const int64_t kept : saved_columns()) columns += kept;
    return s_.rows() * columns + 3 * inner_columns() * s_.hidden;
  }

  template <class F>
  void for_chunks(const F& f) const {
    if (s_.rows() == 0) return;
    for (int64_t first = 0; first < s_.streams; first += chunk_) {
      f(Chunk{first, std::min(chunk_, s_.streams - first)});
    }
  }

  // ---- memory ----------------------------------------------------------------------------------

  Matrices allocate(int64_t rows, int64_t cols, ScalarType type) {
    scratch_.push_back(backend_.empty({chunk_, rows, cols}, type));
    return {scratch_.back().data_ptr(), rows * cols, cols, 1, type};
  }
  Matrices allocate_rows(int64_t cols) { return allocate(s_.rows(), cols, call_.type); }

  void allocate_forward() {
    c_ = allocate_rows(s_.input_width());
    n_ = allocate_rows(s_.hidden);
    act_ = allocate_rows(inner_columns());
    delta_ = allocate_rows(s_.hidden);
    folded_ = allocate(inner_columns(), s_.hidden, call_.type);
    vectors_ =
        allocate(1, std::max({s_.receiver.width(), s_.hidden, s_.receiver.heads}), call_.sums);
    head_vectors_ = allocate(1, s_.receiver.heads, call_.sums);
  }
  void allocate_backward(const Needed& needed) {
    wide_ = allocate_rows(std::max(s_.receiver.width(), inner_columns()));
    dz_ = allocate_rows(s_.hidden);
    if (call_.dropout > 0) dropped_ = allocate_rows(s_.hidden);
    if (weighted()) {
      d_weighting_ = allocate_rows(s_.hidden);
      d_logits_ = allocate_rows(s_.receiver.heads);
    }
    if (needed.gate) d_gate_ = allocate(s_.rows(), s_.receiver.heads, call_.sums);
  }
  Kept allocate_kept() {
    std::vector<Matrices> all;
    for (const int64_t columns : saved_columns()) all.push_back(allocate_rows(columns));
    return kept_from(all);
  }
  Kept kept_of(const std::vector<Tensor>& saved, Chunk chunk) const {
    std::vector<Matrices> all;
    const auto columns = saved_columns();
    for (size_t i = 0; i < columns.size(); ++i) {
      const int64_t stream = s_.rows() * columns[i];
      all.push_back({static_cast<char*>(saved[i].data_ptr()) +
                         chunk.first * stream * element_size(call_.type),
                     stream, columns[i], 1, call_.type});
    }
    return kept_from(all);
  }
  Kept kept_from(const std::vector<Matrices>& all) const {
    Kept kept;
    const auto z = all.begin() + s_.blocks + 2, u = z + s_.blocks + 1;
    kept.z.assign(all.begin(), z);
    kept.u.assign(z, u);
    kept.projected = u[0];
    if (weighted()) kept.weighting = u[1], kept.logits = u[2];
    return kept;
  }

  // ---- parameters ------------------------------------------------------------------------------

  // Part `index` of `count` of every stream's `rows` x `cols` matrices in a parameter or gradient.
  static Matrices slice(Chunk chunk, const Tensor& t, int64_t rows, int64_t cols, int64_t index = 0,
                        int64_t count = 1) {
    const int64_t size = rows * cols;
    const ScalarType type = t.scalar_type();
    return {static_cast<char*>(t.data_ptr()) +
                (chunk.first * count + index) * size * element_size(type),
            count * size, cols, 1, type};
  }
  int64_t largest_weight() const {
    return std::max({s_.hidden * s_.input_width(), s_.hidden * s_.inner, s_.hidden * s_.hidden,
                     s_.receiver.width() * s_.hidden, s_.receiver.heads * s_.hidden});
  }
  // The matrices in the caches' dtype; `cast_` holds the last one that had to be rounded.
  Matrices weight(Chunk chunk, const Tensor& t, int64_t rows, int64_t cols, int64_t index = 0,
                  int64_t count = 1) {
    const Matrices own = slice(chunk, t, rows, cols, index, count);
    if (own.type == call_.type) return own;
    if (cast_.data == nullptr) cast_ = allocate(1, largest_weight(), call_.type);
    const Matrices to{cast_.data, rows * cols, cols, 1, call_.type};
    copy(view(to, chunk, rows, cols), view(own, chunk, rows, cols));
    return to;
  }
  // W1 diag(g) in the caches' dtype, from row `first_row` of `folded_` on.
  Matrices fold(Chunk chunk, const Tensor& w1, const Tensor& norm, int64_t inner,
                int64_t first_row = 0, int64_t index = 0, int64_t count = 1) {
    const int64_t h = s_.hidden;
    const Matrices to{static_cast<char*>(folded_.data) + first_row * h * element_size(call_.type),
                      folded_.stream_stride, h, 1, call_.type};
    multiply_elements(view(to, chunk, inner, h),
                      view(slice(chunk, w1, inner, h, index, count), chunk, inner, h),
                      view(slice(chunk, norm, 1, h, index, count), chunk, 1, h));
    return to;
  }
  Tensor view(const Matrices& m, Chunk chunk, int64_t rows, int64_t cols) const {
    return view_of(m, {chunk.streams, rows, cols}, backend_.device());
  }
  // A vector per stream in S, at `buffer` unless it is so by itself.
  const void* sums_of(Chunk chunk, const Tensor& t, int64_t cols, const Matrices& buffer) {
    const Matrices own = slice(chunk, t, 1, cols);
    if (own.type == call_.sums) return own.data;
    const Matrices to{buffer.data, cols, cols, 1, call_.sums};
    copy(view(to, chunk, 1, cols), view(own, chunk, 1, cols));
    return to.data;
  }
  const void* out_bias(Chunk chunk) {
    return sums_of(chunk, call_.parameters.out_bias, s_.receiver.width(), vectors_);
  }
  const void* head_bias(Chunk chunk) {
    if (!weighted()) return nullptr;
    return sums_of(chunk, *call_.parameters.head_bias, s_.receiver.heads, head_vectors_);
  }
  // Of feed-forward block `block`: 0 the shared one, 1 .. P the projection's, P + 1 the
  // weighting's.
  Dropout dropout(int64_t block) const {
    Dropout d;
    d.seed = call_.seed;
    d.offset = call_.offset;
    if (call_.row_seeds) {
      d.row_seeds = static_cast<const int64_t*>(call_.row_seeds->const_data_ptr());
    }
    d.rows = static_cast<uint64_t>(s_.rows());
    d.tokens = static_cast<uint64_t>(s_.tokens);
    d.first_stream = static_cast<uint64_t>(block * s_.streams);
    d.threshold = static_cast<uint32_t>(call_.dropout * 4294967296.0);  // below 1
    d.scale = 1 / (1 - call_.dropout);
    return d;
  }

  // ---- forward ---------------------------------------------------------------------------------

  // out = x @ weight^T; weight [cols, depth].
  void map(Chunk chunk, const Matrices& out, int64_t cols, const Matrices& x, int64_t depth,
           const Matrices& weight) const {
    backend_.multiply(chunk.streams, s_.rows(), cols, depth, out, x, weight.transposed());
  }

  void run_forward(Chunk chunk, const Kept& kept) {
    const Parameters& w = call_.parameters;
    const int64_t h = s_.hidden, m = s_.inner, blocks = s_.blocks;
    const Matrices none;
    backend_.gather(chunk, c_);
    map(chunk, kept.z[0], h, c_, s_.input_width(), weight(chunk, w.in_weight, h, s_.input_width()));
    backend_.bias_norm(chunk, kept.z[0], sums_of(chunk, w.in_bias, h, vectors_), n_);

    map(chunk, kept.u[0], m, n_, h, fold(chunk, w.shared_w1, w.shared_norm, m));
    backend_.activate(chunk, m, kept.u[0], act_);
    map(chunk, delta_, h, act_, m, weight(chunk, w.shared_w2, h, m));
    backend_.residual_norm(chunk, kept.z[0], delta_, dropout(0), kept.z[1], n_);

    map(chunk, kept.u[1], inner_columns(), n_, h, fold_first(chunk));
    backend_.activate(chunk, inner_columns(), kept.u[1], act_);
    if (weighted()) {
      map(chunk, delta_, h, act_.columns_from(m), h, weight(chunk, *w.weight_w2, h, h));
      backend_.residual_norm(chunk, kept.z[1], delta_, dropout(blocks + 1), kept.weighting, none);
      map(chunk, kept.logits, s_.receiver.heads, kept.weighting, h,
          weight(chunk, *w.head_weight, s_.receiver.heads, h));
    }
    for (int64_t i = 0; i < blocks; ++i) {
      if (i > 0) {
        map(chunk, kept.u[1 + i], m, n_, h, fold(chunk, w.proj_w1, w.proj_norm, m, 0, i, blocks));
        backend_.activate(chunk, m, kept.u[1 + i], act_);
      }
      map(chunk, delta_, h, act_, m, weight(chunk, w.proj_w2, h, m, i, blocks));
      backend_.residual_norm(chunk, kept.z[1 + i], delta_, dropout(1 + i), kept.z[2 + i],
                             i + 1 < blocks ? n_ : none);
    }
    map(chunk, kept.projected, s_.receiver.width(), kept.z[1 + blocks], h,
        weight(chunk, w.out_weight, s_.receiver.width(), h));
  }

  // [proj W1' ; weight W1'], what reads z1.
  Matrices fold_first(Chunk chunk) {
    const Parameters& w = call_.parameters;
    const Matrices all = fold(chunk, w.proj_w1, w.proj_norm, s_.inner, 0, 0, s_.blocks);
    if (weighted()) fold(chunk, *w.weight_w1, *w.weight_norm, s_.hidden, s_.inner);
    return all;
  }

  // ---- backward --------------------------------------------------------------------------------

  void run_backward(Chunk chunk, const Kept& kept, const std::vector<Tensor>& grad_out,
                    const Needed& needed, Gradients& grad) {
    const Parameters& w = call_.parameters;
    const int64_t h = s_.hidden, blocks = s_.blocks, width = s_.receiver.width();
    const int64_t heads = s_.receiver.heads;
    const Matrices none;
    // Does anything before z0, before z1, or at all on a branch want a gradient?
    const bool before_z0 =
        needed.in_weight || needed.in_bias || needed.sharer || (needed.base && s_.reads_receiver);
    const bool before_z1 = before_z0 || needed.shared_norm || needed.shared_w1 || needed.shared_w2;
    const bool projection = before_z1 || needed.proj_norm || needed.proj_w1 || needed.proj_w2;
    const bool weighting =
        weighted() && (before_z1 || needed.weight_norm || needed.weight_w1 || needed.weight_w2);
    const bool logits = weighting || needed.head_weight || needed.head_bias;

    backend_.combine_backward(chunk, grad_out, kept.projected, out_bias(chunk), kept.logits,
                              head_bias(chunk), wide_, logits ? d_logits_ : none, d_gate_.data,
                              needed.base ? &grad.base : nullptr);
    if (needed.gate) backend_.sum_gate(chunk, d_gate_.data, *grad.gate);
    if (needed.out_bias) sum_columns(chunk, width, wide_, *grad.out_bias);
    if (needed.out_weight) {
      weight_gradient(chunk, *grad.out_weight, width, h, wide_, kept.z[1 + blocks]);
    }
    if (projection) {
      through(chunk, dz_, h, wide_, width, weight(chunk, w.out_weight, width, h));
      for (int64_t i = blocks - 1; i > 0; --i) {
        const Block block{w.proj_norm,  w.proj_w1,    w.proj_w2, grad.proj_norm,
                          grad.proj_w1, grad.proj_w2, i,         blocks};
        block_backward(chunk, block, 1 + i, kept.z[1 + i], kept.u[1 + i], true);
      }
    }
    if (logits) {
      if (needed.head_bias) sum_columns(chunk, heads, d_logits_, *grad.head_bias);
      if (needed.head_weight) {
        weight_gradient(chunk, *grad.head_weight, heads, h, d_logits_, kept.weighting);
      }
    }
    if (weighting) {
      through(chunk, d_weighting_, h, d_logits_, heads, weight(chunk, *w.head_weight, heads, h));
    }
    if (projection || weighting)
      first_blocks_backward(chunk, kept, projection, weighting, before_z1, grad);
    if (before_z1) {
      const Block block{w.shared_norm,  w.shared_w1,    w.shared_w2, grad.shared_norm,
                        grad.shared_w1, grad.shared_w2, 0,           1};
      block_backward(chunk, block, 0, kept.z[0], kept.u[0], before_z0);
    }
    if (!before_z0) return;
    const int64_t in = s_.input_width(), sharer = s_.sharer.width();
    if (needed.in_bias) sum_columns(chunk, h, dz_, *grad.in_bias);
    if (needed.in_weight) {
      backend_.gather(chunk, c_);
      weight_gradient(chunk, *grad.in_weight, h, in, dz_, c_);
    }
    const bool base = needed.base && s_.reads_receiver;
    if (base || needed.sharer) {
      const int64_t first = needed.sharer ? 0 : sharer, last = base ? in : sharer;
      const Matrices in_weight = weight(chunk, w.in_weight, h, in);
      backend_.multiply(chunk.streams, s_.rows(), last - first, h, c_.columns_from(first), dz_,
                        in_weight.columns_from(first));
      if (base) backend_.add_base(chunk, c_.columns_from(sharer), grad.base);
      if (needed.sharer) backend_.scatter_sharer(chunk, c_, grad.sharer);
    }
  }

  struct Block {
    const Tensor &norm, &w1, &w2;
    const std::optional<Tensor>&d_norm, &d_w1, &d_w2;
    int64_t index, count;  // which of the stream's matrices in these tensors
  };

  // dx = dy @ weight; weight [depth, cols].
  void through(Chunk chunk, const Matrices& dx, int64_t cols, const Matrices& dy, int64_t depth,
               const Matrices& weight) const {
    backend_.multiply(chunk.streams, s_.rows(), cols, depth, dx, dy, weight);
  }

  Matrices dropped(Chunk chunk, const Matrices& dz, int64_t block) const {
    const Dropout drawn = dropout(block);
    if (drawn.threshold == 0) return dz;
    backend_.dropout_backward(chunk, dz, drawn, dropped_);
    return dropped_;
  }

  // dz_, the gradient of the block's output, becomes that of its input z.
  void block_backward(Chunk chunk, const Block& block, int64_t number, const Matrices& z,
                      const Matrices& u, bool upstream) {
    const int64_t h = s_.hidden, m = s_.inner;
    const Matrices none;
    const Matrices dd = dropped(chunk, dz_, number);
    through(chunk, wide_, m, dd, h, weight(chunk, block.w2, h, m, block.index, block.count));
    backend_.activate_backward(chunk, m, u, wide_, act_);
    if (block.d_w2) {
      weight_gradient(chunk, *block.d_w2, h, m, dd, act_, block.index, block.count);
    }
    if (upstream) {
      through(chunk, delta_, h, wide_, m,
              fold(chunk, block.w1, block.norm, m, 0, block.index, block.count));
      backend_.norm_backward(chunk, z, delta_, dz_, none, dz_, n_);
    } else if (block.d_norm || block.d_w1) {
      backend_.bias_norm(chunk, z, nullptr, n_);
    }
    folded_gradient(chunk, block, m, wide_);
  }

  // The first block of the projection and the weighting branch, which both read z1: dz_ and
  // d_weighting_, the gradients of their outputs, become the gradient dz_ of z1.
  void first_blocks_backward(Chunk chunk, const Kept& kept, bool projection, bool weighting,
                             bool upstream, Gradients& grad) {
    const Parameters& w = call_.parameters;
    const int64_t h = s_.hidden, m = s_.inner;
    const Matrices &z = kept.z[1], &u = kept.u[1], none;
    if (projection) {
      const Matrices dd = dropped(chunk, dz_, 1);
      through(chunk, wide_, m, dd, h, weight(chunk, w.proj_w2, h, m, 0, s_.blocks));
      backend_.activate_backward(chunk, m, u, wide_, act_);
      if (grad.proj_w2) weight_gradient(chunk, *grad.proj_w2, h, m, dd, act_, 0, s_.blocks);
    }
    if (weighting) {
      const Matrices inner = wide_.columns_from(m), act = act_.columns_from(m);
      const Matrices dd = dropped(chunk, d_weighting_, s_.blocks + 1);
      through(chunk, inner, h, dd, h, weight(chunk, *w.weight_w2, h, h));
      backend_.activate_backward(chunk, h, u.columns_from(m), inner, act);
      if (grad.weight_w2) weight_gradient(chunk, *grad.weight_w2, h, h, dd, act);
    }
    if (upstream) {
      through(chunk, delta_, h, wide_, inner_columns(), fold_first(chunk));
      backend_.norm_backward(chunk, z, delta_, dz_, weighting ? d_weighting_ : none, dz_, n_);
    } else {
      backend_.bias_norm(chunk, z, nullptr, n_);
    }
    folded_gradient(chunk,
                    {w.proj_norm, w.proj_w1, w.proj_w2, grad.proj_norm, grad.proj_w1, grad.proj_w2,
                     0, s_.blocks},
                    m, wide_);
    if (weighting) {
      folded_gradient(chunk,
                      {*w.weight_norm, *w.weight_w1, *w.weight_w2, grad.weight_norm, grad.weight_w1,
                       grad.weight_w2, 0, 1},
                      h, wide_.columns_from(m));
    }
  }

  // ---- gradients of parameters -----------------------------------------------------------------

  bool product_writes(ScalarType type) const {
    return type == call_.type || (backend_.wide_products() && type == call_.sums);
  }
  Matrices product_buffer(int64_t rows, int64_t cols) {
    if (product_.data == nullptr) {
      product_ = allocate(1, std::max(largest_weight(), s_.hidden * inner_columns()),
                          backend_.wide_products() ? call_.sums : call_.type);
    }
    return {product_.data, rows * cols, cols, 1, product_.type};
  }
  // Part `index` of `count` of `gradient` = dy^T @ x; dy [rows of the call, rows], x [.., cols].
  void weight_gradient(Chunk chunk, const Tensor& gradient, int64_t rows, int64_t cols,
                       const Matrices& dy, const Matrices& x, int64_t index = 0,
                       int64_t count = 1) {
    const Matrices own = slice(chunk, gradient, rows, cols, index, count);
    const Matrices to = product_writes(own.type) ? own : product_buffer(rows, cols);
    backend_.multiply(chunk.streams, rows, cols, s_.rows(), to, dy.transposed(), x);
    if (to.data != own.data) copy(view(own, chunk, rows, cols), view(to, chunk, rows, cols));
  }
  // What a block's norm and W1 get from du [rows of the call, inner] and the norm in n_.
  void folded_gradient(Chunk chunk, const Block& block, int64_t inner, const Matrices& du) {
    if (!block.d_norm && !block.d_w1) return;
    const int64_t h = s_.hidden;
    const auto part = [&](const Tensor& t, int64_t rows) {
      return slice(chunk, t, rows, h, block.index, block.count);
    };
    const Matrices own = block.d_w1 ? part(*block.d_w1, inner) : Matrices{};
    const Matrices folded = block.d_w1 && product_writes(own.type) ? own : product_buffer(inner, h);
    backend_.multiply(chunk.streams, inner, h, s_.rows(), folded, du.transposed(), n_);
    const Tensor all = view(folded, chunk, inner, h);
    if (block.d_norm) {
      if (terms_.data == nullptr) terms_ = allocate(inner_columns(), h, call_.sums);
      const Matrices terms{terms_.data, inner * h, h, 1, call_.sums};
      multiply_elements(view(terms, chunk, inner, h), all,
                        view(part(block.w1, inner), chunk, inner, h));
      column_sums(chunk, inner, h, terms, part(*block.d_norm, 1));
    }
    if (block.d_w1) {
      multiply_elements(view(own, chunk, inner, h), all, view(part(block.norm, 1), chunk, 1, h));
    }
  }
  void sum_columns(Chunk chunk, int64_t cols, const Matrices& dy, const Tensor& gradient) {
    column_sums(chunk, s_.rows(), cols, dy, slice(chunk, gradient, 1, cols));
  }
  void column_sums(Chunk chunk, int64_t rows, int64_t cols, const Matrices& x, const Matrices& to) {
    const Matrices sums{vectors_.data, cols, cols, 1, call_.sums};
    backend_.column_sums(chunk, rows, cols, x, sums.data);
    copy(view(to, chunk, 1, cols), view(sums, chunk, 1, cols));
  }

  const Call& call_;
  const Sizes& s_;
  const Backend backend_;
  int64_t chunk_;
  std::vector<Tensor> scratch_;  // owns what the following point to
  Kept keep_;                    // of one chunk
  Matrices c_, n_, act_, delta_, wide_, dz_, d_weighting_, dropped_;  // [rows, ..]
  Matrices d_logits_, d_gate_;
  Matrices folded_, cast_, product_, terms_;  // weights and their gradients
  Matrices vectors_, head_vectors_;           // [1, ..] in S
};

}  // namespace c2c::train
