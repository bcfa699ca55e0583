// c2c::fuse and c2c::fuse_backward on CUDA tensors: the Backend of train/backend.h, with matrix
// products through torch's bmm and everything between them in train_kernels.cu and
// train_cache_kernels.cu. No host synchronisation.
// Compiled with C2C_EMULATE they are c2c_emulated::fuse and ::fuse_backward, which run the same
// kernels on CPU tensors.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../train/ops_train.h"
#include "arguments.h"
#include "runtime.h"
#include "train_kernels.h"

namespace c2c::train {
namespace {

using cuda::CacheType;
using cuda::HeadShape;

// Enough streams at a time to fill a GPU with their products; not measured.
constexpr int64_t kScratchBytes = int64_t{512} << 20;
constexpr int64_t kMaxRows = int64_t{1} << 30;  // of one launch

class CudaBackend {
 public:
  static constexpr Placement kPlacement = cuda::kPlacement;

  explicit CudaBackend(const Call& call)
      : call_(call),
        s_(call.sizes),
        device_(call.base[0]),
        type_(cuda::cache_type(call.type)),
        sharer_(cuda::head_shape(s_.sharer)),
        receiver_(cuda::head_shape(s_.receiver)),
        tokens_(cuda::tokens_of(call.token_map, s_.batch, s_.tokens, s_.sharer_tokens)) {
    cuda::check_width("sharer", s_.sharer);
    cuda::check_width("receiver", s_.receiver);
    for (const auto& [name, tokens] :
         {std::pair{"base", s_.tokens}, {"sharer", s_.sharer_tokens}}) {
      if (s_.batch * tokens > kMaxRows) {
        throw std::runtime_error(std::string("c2c_ext.fuse: ") + name +
                                 " must have at most 2^30 tokens in all batch rows on a GPU, got " +
                                 std::to_string(s_.batch * tokens));
      }
    }
  }

  int64_t scratch_bytes() const { return cuda::scratch_limit(kScratchBytes); }
  int64_t max_streams() const { return cuda::kMaxStreams; }
  bool wide_products() const { return element_size(call_.type) == 2; }
  torch::stable::Device device() const { return device_.device(); }
  Tensor empty(const std::vector<int64_t>& sizes, ScalarType type) const {
    return torch::stable::empty(sizes, type, std::nullopt, device_.device());
  }

  void multiply(int64_t streams, int64_t rows, int64_t cols, int64_t depth, const Matrices& out,
                const Matrices& a, const Matrices& b) const {
    if (rows == 0 || cols == 0) return;
    device_.multiply(streams, rows, cols, depth, strided(out), strided(a), strided(b));
  }

  // ---- between the products --------------------------------------------------------------------

  void bias_norm(Chunk chunk, const Matrices& z, const void* bias, const Matrices& n) const {
    if (bias == nullptr) {
      cuda::launch_norm(type_, block(chunk), s_.hidden, rows_of(z), rows_of(n), stream());
    } else {
      cuda::launch_bias_stats(type_, block(chunk), s_.hidden, rows_of(z), bias, rows_of(n),
                              stream());
    }
  }
  void activate(Chunk chunk, int64_t cols, const Matrices& u, const Matrices& h) const {
    cuda::launch_activate(type_, call_.activation, block(chunk), rows_of(u), cols, rows_of(h), 0,
                          rows_of(h), stream());
  }
  void residual_norm(Chunk chunk, const Matrices& z, const Matrices& delta, const Dropout& dropout,
                     const Matrices& out, const Matrices& n) const {
    if (dropout.threshold == 0) {
      cuda::launch_residual_stats(type_, block(chunk), s_.hidden, rows_of(z), rows_of(delta),
                                  rows_of(out), rows_of(n), stream());
    } else {
      cuda::launch_dropout_residual(type_, block(chunk), s_.hidden, rows_of(z), rows_of(delta),
                                    dropout, chunk.first, rows_of(out), rows_of(n), stream());
    }
  }
  void dropout_backward(Chunk chunk, const Matrices& dz, const Dropout& dropout,
                        const Matrices& dd) const {
    cuda::launch_dropout_backward(type_, block(chunk), s_.hidden, rows_of(dz), dropout, chunk.first,
                                  rows_of(dd), stream());
  }
  void activate_backward(Chunk chunk, int64_t cols, const Matrices& u, const Matrices& d,
                         const Matrices& h) const {
    cuda::launch_activate_backward(type_, call_.activation, block(chunk), cols, rows_of(u),
                                   rows_of(d), rows_of(h), stream());
  }
  void norm_backward(Chunk chunk, const Matrices& z, const Matrices& dn, const Matrices& first,
                     const Matrices& second, const Matrices& dz, const Matrices& n) const {
    cuda::launch_norm_backward(type_, block(chunk), s_.hidden, rows_of(z), rows_of(dn),
                               rows_of(first), rows_of(second), rows_of(dz), rows_of(n), stream());
  }
  void column_sums(Chunk chunk, int64_t rows, int64_t cols, const Matrices& x, void* out) const {
    const cuda::Block all{static_cast<int>(chunk.streams), 0, rows};
    const int64_t parts = cuda::column_sum_parts(rows);
    const Tensor partial = empty({parts > 1 ? chunk.streams * parts * cols : 0}, call_.sums);
    cuda::launch_column_sums(type_, x.type != call_.type, all, cols, rows_of(x), partial.data_ptr(),
                             out, stream());
  }

  // ---- the caches ------------------------------------------------------------------------------

  void gather(Chunk chunk, const Matrices& c) const {
    const HeadShape read{s_.reads_receiver ? receiver_.heads : 0, receiver_.dim};
    cuda::launch_gather(type_, block(chunk), views(chunk, nullptr), sharer_, read, tokens_,
                        rows_of(c), stream());
  }
  void combine(Chunk chunk, const Matrices& projected, const void* out_bias, const Matrices& logits,
               const void* head_bias, const std::vector<Tensor>& out) const {
    cuda::launch_gated_combine(type_, block(chunk), views(chunk, &out), receiver_, tokens_,
                               weighted(chunk, projected, out_bias, logits, head_bias), stream());
  }
  void combine_backward(Chunk chunk, const std::vector<Tensor>& grad_out, const Matrices& projected,
                        const void* out_bias, const Matrices& logits, const void* head_bias,
                        const Matrices& d_projected, const Matrices& d_logits, void* d_gate,
                        const std::vector<Tensor>* grad_base) const {
    cuda::GradientStreams streams{};
    for (int64_t i = 0; i < chunk.streams; ++i) {
      const int64_t g = chunk.first + i;
      streams.view[i].grad_out = cuda::view_of(grad_out[g]);
      streams.view[i].base = cuda::view_of(call_.base[g]);
      if (grad_base != nullptr) streams.view[i].grad_base = cuda::view_of((*grad_base)[g]);
    }
    cuda::launch_combine_backward(type_, block(chunk), streams, receiver_, tokens_,
                                  weighted(chunk, projected, out_bias, logits, head_bias),
                                  {rows_of(d_projected), rows_of(d_logits), d_gate}, stream());
  }
  void sum_gate(Chunk chunk, const void* d_gate, const Tensor& grad_gate) const {
    const int64_t shape[3] = {grad_gate.size(1), grad_gate.size(2), grad_gate.size(3)};
    const int64_t first = chunk.first * shape[0] * shape[1] * shape[2] * element_size(call_.sums);
    cuda::launch_sum_gate(type_, static_cast<int>(chunk.streams), s_.batch, s_.receiver.heads,
                          s_.tokens, d_gate, shape,
                          static_cast<char*>(grad_gate.data_ptr()) + first, stream());
  }
  void add_base(Chunk chunk, const Matrices& dc, const std::vector<Tensor>& grad_base) const {
    cuda::launch_add_base(type_, block(chunk), contiguous(chunk, grad_base), receiver_, tokens_,
                          rows_of(dc), stream());
  }
  void scatter_sharer(Chunk chunk, const Matrices& dc,
                      const std::vector<Tensor>& grad_sharer) const {
    cuda::launch_scatter_sharer(type_, static_cast<int>(chunk.streams),
                                contiguous(chunk, grad_sharer), sharer_, tokens_, readers(),
                                rows_of(dc), stream());
  }

 private:
  cudaStream_t stream() const { return device_.stream(); }
  cuda::Block block(Chunk chunk) const { return {static_cast<int>(chunk.streams), 0, s_.rows()}; }
  static cuda::Matrices rows_of(const Matrices& m) {
    return {m.data, m.stream_stride, m.row_stride};
  }
  static cuda::Strided strided(const Matrices& m) {
    return {m.data, m.stream_stride, m.row_stride, m.column_stride, m.type};
  }

  cuda::Streams views(Chunk chunk, const std::vector<Tensor>* out) const {
    cuda::Streams streams{};
    for (int64_t i = 0; i < chunk.streams; ++i) {
      const int64_t g = chunk.first + i;
      streams.view[i].base = cuda::view_of(call_.base[g]);
      streams.view[i].sharer = cuda::view_of(call_.sharer[g]);
      if (out != nullptr) streams.view[i].out = cuda::view_of((*out)[g]);
    }
    return streams;
  }
  static cuda::Contiguous contiguous(Chunk chunk, const std::vector<Tensor>& tensors) {
    cuda::Contiguous result{};
    for (int64_t i = 0; i < chunk.streams; ++i) {
      result.data[i] = tensors[chunk.first + i].data_ptr();
    }
    return result;
  }
  cuda::Weighted weighted(Chunk chunk, const Matrices& projected, const void* out_bias,
                          const Matrices& logits, const void* head_bias) const {
    cuda::Gate gate{};
    if (call_.gate) {
      const Tensor& values = *call_.gate;
      for (int d = 0; d < 4; ++d) gate.stride[d] = values.size(d) == 1 ? 0 : values.stride(d);
      gate.data = static_cast<const char*>(values.const_data_ptr()) +
                  chunk.first * gate.stride[0] * element_size(call_.sums);
    }
    return {call_.integration, rows_of(projected), out_bias, rows_of(logits), head_bias, gate};
  }
  // Made at first use, for all chunks.
  cuda::Readers readers() const {
    if (tokens_.map == nullptr) return {nullptr, nullptr};
    const int64_t first = s_.batch * s_.sharer_tokens;
    const bool made = readers_.has_value();
    if (!made) readers_ = empty({first + s_.rows()}, ScalarType::Long);
    int64_t* data = static_cast<int64_t*>(readers_->data_ptr());
    const cuda::Readers result{data, data + first};
    if (!made) cuda::launch_readers(tokens_, result, stream());
    return result;
  }

  const Call& call_;
  const Sizes& s_;
  const cuda::Device device_;
  const CacheType type_;
  const HeadShape sharer_, receiver_;
  const cuda::Tokens tokens_;
  mutable std::optional<Tensor> readers_;
};

}  // namespace
}  // namespace c2c::train

#ifdef C2C_EMULATE
STABLE_TORCH_LIBRARY_FRAGMENT(c2c_emulated, m) {
  m.def(c2c::kFuseTrainSchema);
  m.def(c2c::kFuseTrainBackwardSchema);
}
STABLE_TORCH_LIBRARY_IMPL(c2c_emulated, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(c2c, CUDA, m) {
#endif
  m.impl("fuse", TORCH_BOX(&c2c::train::fuse_op<c2c::train::CudaBackend>));
  m.impl("fuse_backward", TORCH_BOX(&c2c::train::fuse_backward_op<c2c::train::CudaBackend>));
}
