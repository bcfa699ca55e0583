// The training fusion's Backend on the CPU (see train/fuse_train.h for what every member does):
// products in train_products, everything between them in train_kernels.
#pragma once

#include <vector>

#include "../train/call.h"
#include "../train/matrices.h"
#include "train_kernels.h"
#include "train_products.h"

namespace c2c::cpu {

class TrainBackend {
 public:
  static constexpr Placement kPlacement = Placement::kCpu;

  using Tensor = torch::stable::Tensor;
  using Chunk = train::Chunk;
  using Matrices = train::Matrices;

  explicit TrainBackend(const train::Call& call);

  int64_t scratch_bytes() const;
  int64_t max_streams() const { return call_.sizes.streams; }
  bool wide_products() const { return true; }
  torch::stable::Device device() const { return call_.base[0].device(); }
  Tensor empty(const std::vector<int64_t>& sizes, torch::headeronly::ScalarType type) const;

  void multiply(int64_t streams, int64_t rows, int64_t cols, int64_t depth, const Matrices& out,
                const Matrices& a, const Matrices& b) const;
  void gather(Chunk chunk, const Matrices& c) const;
  void bias_norm(Chunk chunk, const Matrices& z, const void* bias, const Matrices& n) const;
  void activate(Chunk chunk, int64_t cols, const Matrices& u, const Matrices& h) const;
  void residual_norm(Chunk chunk, const Matrices& z, const Matrices& delta, const Dropout& dropout,
                     const Matrices& out, const Matrices& n) const;
  void combine(Chunk chunk, const Matrices& projected, const void* out_bias, const Matrices& logits,
               const void* head_bias, const std::vector<Tensor>& out) const;
  void combine_backward(Chunk chunk, const std::vector<Tensor>& grad_out, const Matrices& projected,
                        const void* out_bias, const Matrices& logits, const void* head_bias,
                        const Matrices& d_projected, const Matrices& d_logits, void* d_gate,
                        const std::vector<Tensor>* grad_base) const;
  void dropout_backward(Chunk chunk, const Matrices& dz, const Dropout& dropout,
                        const Matrices& dd) const;
  void activate_backward(Chunk chunk, int64_t cols, const Matrices& u, const Matrices& d,
                         const Matrices& h) const;
  void norm_backward(Chunk chunk, const Matrices& z, const Matrices& dn, const Matrices& first,
                     const Matrices& second, const Matrices& dz, const Matrices& n) const;
  void column_sums(Chunk chunk, int64_t rows, int64_t cols, const Matrices& x, void* out) const;
  void sum_gate(Chunk chunk, const void* d_gate, const Tensor& grad_gate) const;
  void add_base(Chunk chunk, const Matrices& dc, const std::vector<Tensor>& grad_base) const;
  void scatter_sharer(Chunk chunk, const Matrices& dc,
                      const std::vector<Tensor>& grad_sharer) const;

 private:
  // Which rows of the call read each sharer token, in order: token i of batch row b is read by
  // rows[starts[b * sharer tokens + i] .. the next start).
  struct Readers {
    std::vector<int64_t> starts, rows;
  };
  Readers readers() const;
  // All about rows from `first` on of stream `g` of the chunk that combine and its backward read.
  FusedRows fused_rows(Chunk chunk, int64_t g, int64_t first, int64_t count,
                       const Matrices& projected, const void* out_bias, const Matrices& logits,
                       const void* head_bias) const;
  const char* vector(const void* vectors, int64_t g, int64_t cols) const;

  const train::Call& call_;
  const TrainKernels& kernels_;
  mutable Products products_;  // keeps its memory from product to product
  std::vector<Row> rows_;      // all of them; source -1: no sharer token
  int64_t sums_size_;          // bytes of S
};

}  // namespace c2c::cpu
