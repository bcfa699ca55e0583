// Batched matrix products of the training ops on the CPU.
#pragma once

#include <vector>

#include "../train/matrices.h"
#include "train_kernels.h"

namespace c2c::cpu {

// out[g] = a[g] @ b[g] for `streams` products [rows, depth] @ [depth, cols], as train/fuse_train.h
// has it, by the inference op's product (panel_gemm.h): b is brought into panels first, and a,
// where its rows do not lie as that reads them, into rows. 16-bit inputs are widened on the way, so
// that products and sums are float32's. The same bits whatever the number of threads.
class Products {
 public:
  explicit Products(CacheType type);

  void multiply(int64_t streams, int64_t rows, int64_t cols, int64_t depth,
                const train::Matrices& out, const train::Matrices& a, const train::Matrices& b);

 private:
  template <class S>
  void multiply_as(int64_t streams, int64_t rows, int64_t cols, int64_t depth,
                   const train::Matrices& out, const train::Matrices& a, const train::Matrices& b);

  // Memory that keeps its size from call to call: `count` elements of S.
  struct Buffer {
    torch::stable::Tensor memory;
    int64_t size = 0;
    template <class S>
    S* get(int64_t count);
  };

  const TrainKernels& kernels_;
  const bool native_;  // by the CPU's own bfloat16 product
  Buffer rows_, panels_, sums_;
};

}  // namespace c2c::cpu
