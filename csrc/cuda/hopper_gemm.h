// Launchers of the Hopper product (wgmma and the bulk tensor copy engine, sm_90a), for many tokens:
// one launch per stage of the fuser, everything between two products in the epilogue of the first.
// bfloat16 and float16. No torch header. Never run on a GPU so far: see docs/kernels.md.
#pragma once

#include <string>

#include "../scalar_math.h"
#include "device.h"
#include "fused_gemm.h"
#include "kernels.h"
#include "row_kernels.h"

namespace c2c::cuda {

// The product of a launch: sums[g, r, c] = x[g, r] . weight[g, c], in float32.
struct HopperProduct {
  CacheType type;  // kBfloat16 or kFloat16, of x, weight and what is written
  int streams, rows;
  int cols, depth;     // multiples of 128 and of 8
  Matrices x;          // [streams, rows, depth]; 16-byte aligned, strides too
  const void* weight;  // [streams, cols, depth], contiguous, 16-byte aligned
};

// Every matrix that a launch reads or writes beside: 4-byte aligned, strides too; biases 8-byte.
// Sums of squares are those of rounded values, per tile of 128 columns: [streams, rows, cols /
// 128], float32. Whoever needs the norm adds them up.

// z = sums + bias, and its sums of squares.
void launch_hopper_bias(const HopperProduct& product,
                        const float* bias,  // [streams, cols]
                        const Matrices& z,  // [streams, rows, cols]
                        float* squares, cudaStream_t stream);

// activation(sums / rms(x)), where `squares` are x's sums of squares: the norm of the input,
// applied to the product. The first `first_cols` columns (a multiple of 128) go to `first`, others
// to `second`.
void launch_hopper_activate(const HopperProduct& product, Activation activation,
                            const float* squares,   // [streams, rows, depth / 128]
                            const Matrices& first,  // [streams, rows, first_cols]
                            int first_cols,
                            const Matrices& second,  // [streams, rows, cols - first_cols]
                            cudaStream_t stream);

// z = z_in + sums, and its sums of squares unless `squares` is null. z may be z_in.
void launch_hopper_residual(const HopperProduct& product,
                            const Matrices& z_in,  // [streams, rows, cols]
                            const Matrices& z,     // [streams, rows, cols]
                            float* squares, cudaStream_t stream);

struct HopperOutput {
  HeadShape receiver;  // cols = heads * dim, dim a multiple of 32
  Tokens tokens;
  int64_t first_row;       // of the launch's rows among those of the call
  const float* bias;       // [streams, cols]
  const float* logits;     // [streams, rows, heads]; null: the weight is 1
  const float* head_bias;  // [streams, heads]
  Integration integration;
  bool accumulate;
};

// Writes the fused rows into the caches: the integration of base and P = sums + bias, weighted by
// sigmoid(logits + head_bias). With accumulate: adds what that would change base by. A token that
// stays is copied from base to out where those differ, and left alone with accumulate.
void launch_hopper_output(const HopperProduct& product, const Streams& streams,
                          const HopperOutput& output, cudaStream_t stream);

// Throws std::runtime_error where the current GPU or this build cannot run these kernels.
void check_hopper_device();

// What keeps this path from a call: one clause naming the rule and what came, "" if nothing does.
// Looks at types, sizes, strides and addresses, not at the GPU.
std::string hopper_obstacle(const FusedCall& call);
inline bool hopper_supports(const FusedCall& call) { return hopper_obstacle(call).empty(); }

// Bytes of scratch for a chunk. Grows with streams * rows alone.
size_t hopper_scratch_bytes(const FusedCall& call);

// Fuses the chunk on `stream`, with the meaning of run_fused. Returns false, with nothing launched,
// where hopper_obstacle names one. Throws std::runtime_error where the GPU is no Hopper GPU, and
// naming the kernel if a launch fails.
bool run_hopper(const FusedCall& call, cudaStream_t stream);

}  // namespace c2c::cuda
