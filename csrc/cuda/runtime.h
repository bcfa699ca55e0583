// What the CUDA op's host code asks of torch: the current stream, scratch memory, matrix products;
// and which kernels the user wants. Compiled with C2C_EMULATE, all of it is on the CPU.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <memory>

#include "dispatch.h"
#include "row_kernels.h"

namespace c2c::cuda {

// Matrices [streams, rows, cols] of a product.
struct Strided {
  void* data;
  int64_t stream_stride, row_stride, column_stride;  // in elements of `type`
  torch::headeronly::ScalarType type;
};

// Makes a tensor's GPU the current one until it is destroyed, and knows torch's stream there.
class Device {
 public:
  // Throws std::runtime_error where this torch has no CUDA.
  explicit Device(const torch::stable::Tensor& on);
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  cudaStream_t stream() const { return stream_; }

  // Compute capability, 10 * major + minor; the GPU is asked once. Under C2C_EMULATE the
  // environment variable C2C_EMULATE_CAPABILITY, else 0. Throws std::runtime_error if the GPU does
  // not answer.
  int capability() const;

  // Uninitialised, from torch's allocator: belongs to the current stream.
  torch::stable::Tensor scratch(int64_t bytes) const;

  const torch::stable::Device& device() const { return device_; }

  // out[g] = a[g] @ b[g] by torch's bmm, [rows, cols] = [rows, depth] @ [depth, cols]; float32 is
  // true float32 unless the user allowed torch TF32. a and b are of one dtype; out too, or float32
  // where they have 16 bits.
  void multiply(int64_t streams, int64_t rows, int64_t cols, int64_t depth, const Strided& out,
                const Strided& a, const Strided& b) const;

  // out[g] = x[g] @ weight[g]^T, in the caches' dtype.
  void multiply(torch::headeronly::ScalarType type, const Block& block, const Matrices& out,
                int64_t cols,                      // [streams, rows, cols]
                const Matrices& x, int64_t depth,  // [streams, rows, depth]
                const void* weight) const;         // [streams, cols, depth]

 private:
  struct Guard;
  std::unique_ptr<Guard> guard_;
  torch::stable::Device device_;
  cudaStream_t stream_;
};

// The path that the environment variable C2C_EXT_CUDA_PATH asks for (plain, fused or hopper), or,
// where it says auto or is not set, what dispatch_table.h says of a call of so many rows on this
// GPU. Throws std::runtime_error naming the variable, or if the GPU does not tell what it is.
Path chosen_path(const Device& device, CacheType type, int64_t rows);

// The environment variable C2C_EMULATE_SCRATCH (bytes) in place of `bytes` under C2C_EMULATE, so
// that tests reach more than one chunk.
int64_t scratch_limit(int64_t bytes);

}  // namespace c2c::cuda
